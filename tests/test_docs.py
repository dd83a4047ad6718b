"""The pages stay true: commands parse, links lead somewhere, tables are current."""

import importlib
import inspect
import json
import re
import shlex
import subprocess
from pathlib import Path

import botocore.session
import launch
import pytest
from accelerate.commands.launch import launch_command_parser
from botocore import xform_name
from test_house import ROOMS

import sagemaker_launch
from common import cli
from docs import curve, options

ROOT = launch.ROOT
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = {name: importlib.import_module(name.removesuffix(".py")) for name in options.SCRIPTS}
LAUNCHER_OPTIONS = {
    "logs": sagemaker_launch.Logs,
    "fetch": sagemaker_launch.Fetch,
    "prices": sagemaker_launch.Prices,
}
PROGRAMS = ("python ", "accelerate launch ", "make ", "runs/", "docker/", "aws ", "sed ", ".ci/run")


# ------ commands


def shown_commands() -> dict[str, str]:
    """Every command of the pages, in a block or inline, -> the first page that shows it."""
    commands = {}
    for name, text in TEXTS.items():
        blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
        lines = "".join(blocks).replace("\\\n", " ").splitlines()
        prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        lines += [
            code.replace("\n", " ")
            for code in re.findall(r"`([^`]+)`", prose)
            if code.startswith(PROGRAMS) and " " in code
        ]
        for line in lines:
            if line.strip():
                commands.setdefault(line.strip(), name)
    return commands


COMMANDS = shown_commands()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_parses(command, tmp_path):
    words = shlex.split(command, comments=True)
    if words[0] == "accelerate":
        words = ["python", *check_accelerate(words[2:])]
    program, *arguments = words[1:] if words[0] == "python" else words
    if program == "-m":
        program, *arguments = arguments
        check_module(program, arguments)
    elif program == "sagemaker_launch.py":
        check_launcher(arguments)
    elif program in SCRIPTS:
        check_script(program, arguments, tmp_path)
    elif program == "make":
        check_make(arguments)
    elif program == "aws":
        check_aws(*arguments)
    elif program == "sed":
        check_sed(command, tmp_path)
    elif program == "tests/simulated_cuda/run.py":
        json.loads(*arguments)
    else:
        check_shell_script(program, arguments)


def check_accelerate(words: list[str]) -> list[str]:
    """Parse the launcher's own options; return the script and its options."""
    if not any(word in SCRIPTS for word in words):
        words = [*words, "train_lora.py", "--help"]
    parsed, unknown = launch_command_parser().parse_known_args(words)
    assert not [word for word in unknown if word in words[: words.index(parsed.training_script)]]
    if parsed.config_file and "NAME" not in parsed.config_file:
        assert (ROOT / parsed.config_file).is_file()
    return [parsed.training_script, *parsed.training_script_args]


def check_script(script: str, arguments: list[str], tmp_path: Path) -> None:
    """Parse a script's options, and have the script check their values."""
    if arguments in ([], ["--help"]):
        return
    config = cli.parse(SCRIPTS[script].Config, arguments)
    if getattr(config, "adapter", ""):
        config.adapter = str(tmp_path)
    if getattr(config, "also", ""):
        config.also = str(tmp_path)
    SCRIPTS[script].check(config)


def check_module(module: str, arguments: list[str]) -> None:
    if module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.endswith(".py"))
        return
    config = getattr(importlib.import_module(module), "Config", None)
    if config or arguments:
        cli.parse(config, arguments)


def check_launcher(arguments: list[str]) -> None:
    """Build the request of a dry run; parse the options of other commands."""
    command, *rest = arguments
    assert command in sagemaker_launch.COMMANDS
    if "--dry_run" in rest:
        sagemaker_launch.COMMANDS[command](rest)
    else:
        cli.parse(LAUNCHER_OPTIONS.get(command, sagemaker_launch.Watch), rest)


def check_make(arguments: list[str]) -> None:
    """Every target and variable of a `make` command is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in arguments:
        name, equals, _ = word.partition("=")
        assert re.search(rf"^{name} *{':=' if equals else ':'}", makefile, flags=re.M), word


def check_aws(service: str, operation: str, *arguments: str) -> None:
    """The operation has all options that are given, and all that it requires are given."""
    if (service, operation) == ("s3", "mb"):  # of the command-line program alone
        return
    model = botocore.session.get_session().get_service_model(service)
    names = {xform_name(name, "-"): name for name in model.operation_names}
    shape = model.operation_model(names[operation]).input_shape
    given = {word.removeprefix("--") for word in arguments if word.startswith("--")}
    assert given <= {xform_name(name, "-") for name in shape.members}
    assert {xform_name(name, "-") for name in shape.required_members} <= given


def check_sed(command: str, tmp_path: Path) -> None:
    """A policy is filled in completely: run it, and look for words in capitals."""
    (tmp_path / "docker").symlink_to(ROOT / "docker")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    (written,) = tmp_path.glob("*.json")
    policy = written.read_text(encoding="utf-8")
    json.loads(policy)
    assert not re.findall(r"\b[A-Z]{3,}\b", policy)


def check_shell_script(program: str, arguments: list[str]) -> None:
    """The script exists, and its comment shows as many arguments."""
    text = (ROOT / program).read_text(encoding="utf-8")
    if arguments:
        usages = re.findall(rf"^# +{re.escape(program)}(.*)$", text, flags=re.M)
        required = [re.sub(r"\[\w+\]$", "", usage) for usage in usages]
        counts = [
            (len(least.split()), len(most.split()))
            for least, most in zip(required, usages, strict=True)
        ]
        assert any(least <= len(arguments) <= most for least, most in counts), usages


@pytest.mark.parametrize(
    "path", ["Makefile", *(f"runs/{p.name}" for p in (ROOT / "runs").glob("*.sh"))]
)
def test_scripts_called_by_the_makefile_and_the_reference_runs_parse(path, tmp_path):
    text = (ROOT / path).read_text(encoding="utf-8")
    joined = text.replace("\\\n", " ")
    for variable, value in (("$context", "full"), ("$(EPOCHS)", "3"), ("$(PANELS)", "true")):
        joined = joined.replace(variable, value)
    calls = re.findall(r"(?:python|launch\b.*) (\w+\.py) (--.*)", joined)
    assert calls or path == "runs/kill.sh", path
    for script, arguments in calls:
        check_script(script, shlex.split(arguments, comments=True), tmp_path)


def test_every_script_and_every_command_of_the_launcher_is_shown():
    shown = "\n".join(COMMANDS)
    for script in SCRIPTS:
        assert f"{script} --" in shown
        assert f"{script} --" in TEXTS["README.md"]
    commands = set(re.findall(r"sagemaker_launch\.py (\w+)", shown))
    assert commands == set(sagemaker_launch.COMMANDS)


def test_the_curves_of_a_run_are_drawn(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    picture = tmp_path / "run.png"
    curve.main(curve.Config(metrics=str(tmp_path / "metrics.jsonl"), output=str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")


# ------ tables


def test_options_md_is_up_to_date():
    assert TEXTS["docs/options.md"] == options.page(), "run python -m docs.options"


def test_options_md_has_every_command_of_the_launcher():
    named = set(re.findall(r"`(\w+)`", " ".join(options.COMMANDS)))
    assert named == set(sagemaker_launch.COMMANDS)
    defined = {
        value
        for value in vars(sagemaker_launch).values()
        if inspect.isclass(value) and hasattr(value, "__dataclass_fields__")
    }
    assert defined <= set(options.COMMANDS.values())


def tree() -> list[str]:
    """The paths that docs/design.md's tree names, folders with a slash at the end."""
    lines = re.findall(r"^( *)(\S+)  +\S", TEXTS["docs/design.md"].split("## Files")[1], flags=re.M)
    paths, folder = [], ""
    for indent, name in lines:
        folder = folder if indent else name if name.endswith("/") else ""
        paths.append(folder + name if indent else name)
    return paths


def test_every_file_in_the_tree_exists_and_every_file_of_the_rooms_is_in_it():
    named = tree()
    assert len(named) == len(set(named))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"in the tree of docs/design.md, but not there: {missing}"
    files = {
        str(path.relative_to(ROOT))
        for folder in (".", "common", *ROOMS)
        for path in (ROOT / folder).glob("[!_]*.py")
    }
    assert files <= set(named), f"not in the tree of docs/design.md: {files - set(named)}"


NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?(%|s|h|[KMG]i?B|USD|min))?( / [\d.,]+)?")


def tables_of_numbers(text: str) -> list[str]:
    """Tables in which some row has two cells that are numbers."""
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    return [
        table
        for table in tables
        if any(
            sum(bool(NUMBER.fullmatch(cell.strip())) for cell in row.split("|")) >= 2
            for row in table.splitlines()
        )
    ]


@pytest.mark.parametrize("page", TEXTS)
def test_every_table_of_numbers_has_its_command_in_the_same_section(page):
    for section in re.split(r"^(?=## )", TEXTS[page], flags=re.M):
        for table in tables_of_numbers(section):
            assert "```bash" in section, f"no command for {table.splitlines()[0]}"


def test_tables_of_numbers_are_recognised():
    assert len(tables_of_numbers(TEXTS["docs/results.md"])) >= 8
    assert len(tables_of_numbers(TEXTS["README.md"])) >= 1


# ------ links and paths


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", TEXTS)
def test_files_named_in_code_exist(page):
    folders = "|".join(("common", "tests", "docker", "runs", "benchmarks", "demo", *ROOMS))
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", TEXTS[page]):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\(([^)#\s]+)", TEXTS["README.md"])
    assert set(TEXTS) - {"README.md"} <= set(linked)
