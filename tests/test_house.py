"""The house: `common/` has only files that two scripts reach, the rest is in a script's room."""

import ast
from pathlib import Path

import launch
import pytest

SCRIPTS = ("preprocess", "train_lora", "eval_wer", "sagemaker_launch", "transcribe", "export")
ROOMS = {  # room -> the programs that may reach its files
    "prepare": {"preprocess"},
    "training": {"train_lora"},
    "evaluation": {"eval_wer"},
    "jobs": {"sagemaker_launch", "jobs.entry"},
    "transcription": {"transcribe"},
    "conversion": {"export"},
}


def name_of(path: Path) -> str:
    """`common/cli.py` -> `common.cli`."""
    return ".".join(path.relative_to(launch.ROOT).with_suffix("").parts)


FILES = {
    name_of(path): path
    for folder in (".", "common", *ROOMS)
    for path in sorted((launch.ROOT / folder).glob("*.py"))
    if path.name != "__init__.py"
}


def imports(name: str) -> set[str]:
    """The project's files that a file imports, wherever in it."""
    used = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return used & FILES.keys()


def reached_from(program: str) -> set[str]:
    """All files that a program imports, also by way of others; never those of another script."""
    reached, waiting = set(), [program]
    while waiting:
        new = imports(waiting.pop()) - reached - set(SCRIPTS)
        reached |= new
        waiting += new
    return reached


REACHED = {program: reached_from(program) for program in (*SCRIPTS, "jobs.entry")}


def test_the_imports_of_a_file_are_seen():
    assert {"common.cli", "common.predictions", "evaluation.report"} <= REACHED["eval_wer"]


@pytest.mark.parametrize("name", [name for name in FILES if name not in SCRIPTS])
def test_every_file_is_in_the_room_of_who_reaches_it(name):
    room = name.split(".")[0]
    users = {program for program, reached in REACHED.items() if name in reached} - {name}
    if room == "common":
        assert len(users) >= 2, f"{name} is reached by {users} only: it belongs in a room of theirs"
    elif name != "jobs.entry":  # a program itself
        assert users, f"nothing reaches {name}"
        assert users <= ROOMS[room], f"{name} is reached by {users}"


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_a_script(name):
    """But the launcher, by name and only for a script's options."""
    assert not imports(name) & set(SCRIPTS)


def test_what_lies_in_common_imports_no_room():
    for name in FILES:
        if name.startswith("common."):
            rooms = {used for used in imports(name) if used.split(".")[0] in ROOMS}
            assert not rooms, f"{name} imports {rooms}"
