"""The README stays true: its commands parse, its option tables are the dataclasses."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
from test_house import ROOMS

import eval_wer
import preprocess
import sagemaker_launch
import train_lora
from common import cli
from jobs import request as job_request

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"preprocess.py": preprocess, "train_lora.py": train_lora, "eval_wer.py": eval_wer}
SHOWN = {"README.md": README, "Makefile": (ROOT / "Makefile").read_text(encoding="utf-8")} | {
    path.name: path.read_text(encoding="utf-8") for path in (ROOT / "runs").glob("*.sh")
}


def commands():
    """Every call of one of the scripts in the README, the Makefile and the reference runs."""
    for name, text in SHOWN.items():
        joined = text.replace("\\\n", " ").replace("$context", "full")
        for line in joined.splitlines():
            for script in SCRIPTS:
                found = re.search(rf"(?:python|launch\b.*) {script} (--.*)", line)
                if found:
                    yield pytest.param(script, found[1], id=f"{name}: {script}")


def test_the_readme_shows_all_three_scripts():
    assert {command.values[0] for command in commands()} == set(SCRIPTS)


@pytest.mark.parametrize(("script", "options"), commands())
def test_every_command_shown_parses_and_passes_the_scripts_own_check(script, options, tmp_path):
    module = SCRIPTS[script]
    config = cli.parse(module.Config, shlex.split(options, comments=True))
    if script == "eval_wer.py" and config.adapter:
        config = dataclasses.replace(config, adapter=str(tmp_path))
    module.check(config)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_option_table_is_the_dataclass(script):
    section = README.split(f"### Options of {script}")[1].split("\n#")[0]
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*?) \|$", section, flags=re.M)
    source = (ROOT / script).read_text(encoding="utf-8")
    expected = []
    for field in dataclasses.fields(SCRIPTS[script].Config):
        line = re.search(rf"^    {field.name}: .*?  # (.*)$", source, flags=re.M)
        assert line, f"--{field.name} has no comment, which is its help"
        written = re.search(rf"^    {field.name}: .*? = (.*?)  # ", source, flags=re.M)[1]
        expected.append((field.name, shown_default(written), line[1]))
    assert rows == expected


JOBS = {
    "all jobs": job_request.Job, "`train`, `eval`": job_request.TrainingJob,
    "`train`": job_request.Train, "`eval`": job_request.Eval, "`prepare`": job_request.Prepare,
    "`status`, `logs`, `stop`, `release`, `fetch`": sagemaker_launch.Watch,
    "`logs`": sagemaker_launch.Logs,
    "`fetch`": sagemaker_launch.Fetch, "`prices`": sagemaker_launch.Prices,
}  # fmt: skip


def test_the_option_table_of_the_launcher_is_its_dataclasses():
    section = README.split("### Options of sagemaker_launch.py")[1].split("\n#")[0]
    rows = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, flags=re.M)
    expected = []
    for commands_of, config in JOBS.items():
        written = re.findall(
            r"^    (\w+): .*? = (.*?)  # (.*)$", inspect.getsource(config), flags=re.M
        )
        assert {name for name, _, _ in written} == set(config.__annotations__)
        expected += [
            (name, shown_default(value), help, commands_of) for name, value, help in written
        ]
    assert rows == expected


LAUNCHES = re.findall(r"^python sagemaker_launch\.py (\w+) (.*)$", README, flags=re.M)


@pytest.mark.parametrize(("command", "options"), LAUNCHES, ids=[name for name, _ in LAUNCHES])
def test_every_launch_shown_is_accepted(command, options, capsys):
    words = shlex.split(options.replace("BUCKET", "my-bucket"))
    if "--dry_run" in words:
        sagemaker_launch.COMMANDS[command](words)
        assert "JobName" in capsys.readouterr().out
        return
    config = {"logs": sagemaker_launch.Logs, "fetch": sagemaker_launch.Fetch}
    cli.parse(config.get(command, sagemaker_launch.Watch), words)


def test_every_command_of_the_launcher_is_shown():
    shown = set(re.findall(r"sagemaker_launch\.py (\w+)", README))
    assert shown == set(sagemaker_launch.COMMANDS)


def shown_default(written):
    """A default as the README shows it: what it is outside SageMaker."""
    environment = re.fullmatch(r'os\.environ\.get\("\w+", "(.*)"\)', written)
    if environment:
        return f"`{environment[1]}`" if environment[1] else ""
    if written == "os.cpu_count() or 1":
        return "all cores"
    value = {"True": "true", "False": "false"}.get(written, written.strip('"'))
    return f"`{value}`" if value else ""


def test_every_file_in_the_tree_is_there_and_every_room_is_in_the_tree():
    tree = README.split("## Files")[1].split("```")[1]
    named = set(re.findall(r"^ *([\w./-]+?)/?  ", tree, flags=re.M))
    folders = [ROOT, *(ROOT / room for room in ("common", *ROOMS))]
    files = {path.name for folder in folders for path in folder.glob("[!_]*.py")}
    assert files <= named, f"not in the tree: {sorted(files - named)}"
    for name in named:
        assert any((folder / name).exists() for folder in folders), name


def test_every_number_table_has_its_command():
    results = README.split("## Measured")[1].split("\n## ")[0]
    for table in re.split(r"\n### ", results)[1:]:
        assert "```bash" in table, f"no command for: {table.splitlines()[0]}"
