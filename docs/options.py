"""Write docs/options.md from the scripts' dataclasses: an option's comment is its meaning.

python -m docs.options
"""

import inspect
import re
from pathlib import Path

import eval_wer
import export
import preprocess
import sagemaker_launch
import train_lora
import transcribe
from jobs import request

PAGE = Path(__file__).with_name("options.md")
INTRODUCTION = """\
# Options

<!-- Written by `python -m docs.options`: edit the comments in the scripts, not this page. -->

Every option is written `--key value`; booleans are `true` or `false`. `--help` prints the same
list. An empty default is an empty string, or an option that must be given."""
SCRIPTS = {
    "preprocess.py": preprocess.Config,
    "train_lora.py": train_lora.Config,
    "eval_wer.py": eval_wer.Config,
    "transcribe.py": transcribe.Config,
    "export.py": export.Config,
}
COMMANDS = {  # of sagemaker_launch.py: heading -> where its options are defined
    "All jobs": request.Job,
    "`train`, `eval` and `export`": request.TrainingJob,
    "`train`": request.Train,
    "`eval` and `export`": request.Eval,
    "`export`": request.Export,
    "`prepare`": request.Prepare,
    "`transcribe`": request.Transcribe,
    "`status`, `logs`, `stop`, `release`, `fetch`": sagemaker_launch.Watch,
    "`logs`": sagemaker_launch.Logs,
    "`fetch`": sagemaker_launch.Fetch,
    "`prices`": sagemaker_launch.Prices,
}


def table(config: type) -> str:
    """The options that a dataclass itself defines, a row each, with default and comment.

    Raises:
        ValueError: an option has no comment, or is not on one line.
    """
    pattern = r"^    (\w+): .*? = (.*?)  # (.*)$"
    rows = re.findall(pattern, inspect.getsource(config), flags=re.M)
    options = list(inspect.get_annotations(config))
    if [name for name, _, _ in rows] != options:
        raise ValueError(f"{config}: an option without a comment among {', '.join(options)}")
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, default, meaning in rows:
        meaning = meaning.replace("|", "\\|")
        lines.append(f"| `--{name}` | {shown_default(default)} | {meaning} |")
    return "\n".join(lines)


def shown_default(source: str) -> str:
    """A default as it is typed on the command line, outside SageMaker.

    >>> shown_default("False"), shown_default('os.environ.get("SM_CHANNEL_TRAIN", "prepared")')
    ('`false`', '`prepared`')
    """
    environment = re.fullmatch(r'os\.environ\.get\("\w+", "(.*)"\)', source)
    if environment:
        source = environment[1]
    if source == "os.cpu_count() or 1":
        return "all cores"
    value = {"True": "true", "False": "false"}.get(source, source.strip('"'))
    return f"`{value}`" if value else ""


def page() -> str:
    """The whole page."""
    sections = [INTRODUCTION]
    for script, config in SCRIPTS.items():
        sections += [f"## {script}", table(config)]
    sections.append("## sagemaker_launch.py")
    for heading, config in COMMANDS.items():
        sections += [f"### {heading}", table(config)]
    sections.append(
        "`train`, `eval`, `export`, `prepare` and `transcribe` also take every option of their "
        "script, as\n`--train.KEY VALUE`, `--eval.KEY VALUE` and so on."
    )
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
