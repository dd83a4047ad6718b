"""The command line: `--key value` only, both spellings of booleans, errors of one line."""

import dataclasses
import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

import eval_wer
import preprocess
import train_lora
from common import cli

SCRIPTS = (preprocess, train_lora, eval_wer)


@dataclass
class Example:
    """An example."""

    learning_rate: float = 1e-3  # peak
    name: str = "x"  # any text
    quiet: bool = False  # say less
    kind: Literal["a", "b"] = "a"  # one of two


def booleans():
    for script in SCRIPTS:
        for field in dataclasses.fields(script.Config):
            if field.type is bool or field.type == "bool":
                yield pytest.param(script, field.name, id=f"{script.__name__}-{field.name}")


@pytest.mark.parametrize(("script", "name"), booleans())
@pytest.mark.parametrize("value", [True, False])
def test_both_sagemaker_spellings_of_booleans_pass_through_every_config(script, name, value):
    for spelling in (str(value), str(value).lower()):
        config = cli.parse(script.Config, [f"--{name}", spelling])
        assert getattr(config, name) is value


def test_values_arrive_unchanged():
    for text in ("two words", "a'b\"c", "$(id)", "é नमस्ते", "", "-1", "no", "True"):
        assert cli.parse(Example, ["--name", text]).name == text
    assert cli.parse(Example, ["--learning_rate", "5e-4"]).learning_rate == 5e-4
    assert cli.parse(Example, ["--learning-rate=2"]).learning_rate == 2.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--learning_rat", "1"], "unknown option --learning_rat: did you mean --learning_rate?"),
        (["--zzz", "1"], "unknown option --zzz: see --help"),
        (["--quiet"], "--quiet has no value: write --quiet VALUE"),
        (["--name", "a", "--name", "b"], "--name is given twice"),
        (["stray"], "'stray' stands where an option should"),
        (["--quiet", "no"], "'no' for argument '--quiet'"),
        (["--learning_rate", "fast"], "--learning_rate: could not convert string to float: 'fast'"),
        (["--kind", "c"], "'c' for argument '--kind'. Expected one of ('a', 'b')"),
    ],
)
def test_each_mistake_is_one_line_that_names_it(args, message):
    with pytest.raises(cli.UserError) as error:
        cli.parse(Example, args)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(cli.UserError) as error:
        cli.parse(Example, ["--nam", "a", "--quie", "true", "--kind"])
    for name in ("--nam:", "--quie:", "--kind has no value"):
        assert name in str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_option_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(script.Config, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(script.Config):
        assert f"--{field.name}" in shown


def test_a_user_error_is_one_line_on_stderr_exit_code_two_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "eval_wer.py", "--modle", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: unknown option --modle: did you mean --model?\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("in_words", [False, True])
def test_a_full_disk_or_quota_is_one_line_that_names_the_remedy(
    monkeypatch, capsys, code, in_words
):
    def fill(config):
        if in_words:  # as safetensors tells it
            raise RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})")
        raise OSError(code, os.strerror(code), "out")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        cli.run(fill, Example)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: the disk is full") and os.strerror(code) in shown
    assert shown.count("\n") == 1 and "free some space" in shown


def test_a_thread_that_meets_the_full_disk_adds_no_traceback():
    """TensorBoard's writer is one: what the thread met is raised where its next line is written."""
    code = """if True:
        import dataclasses, errno, sys, threading
        from common import cli

        @dataclasses.dataclass
        class Config: pass

        def fail(error):
            raise error

        def main(config):
            for error in (OSError(errno.EDQUOT, "quota"), ValueError("another")):
                thread = threading.Thread(target=fail, args=(error,))
                thread.start()
                thread.join()
            raise OSError(errno.EDQUOT, "quota")

        cli.run(main, Config)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("Traceback") == 1 and "ValueError: another" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the disk is full")


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda config: (tmp_path / "file" / "out").mkdir(), Example)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file/out cannot be written")


def test_only_the_first_process_of_a_machine_tells_the_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--nam", "x"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        cli.run(print, Example)
    assert capsys.readouterr().err == ""


def test_all_broken_rules_are_told_at_once():
    cli.refuse([(False, "--a 1: give 2")])
    with pytest.raises(cli.UserError, match=r"^--a 1: give 2; --c 3: give 4$"):
        cli.refuse([(True, "--a 1: give 2"), (False, "--b"), (True, "--c 3: give 4")])


def test_an_exception_is_quoted_by_its_first_line_or_its_name():
    assert cli.first_line(ValueError("\nno such column\n  hint: none")) == "no such column"
    assert cli.first_line(KeyError()) == "KeyError"
