"""Dataclass <-> `--key value`. The only file that knows the argument library (tyro).

Every option is a scalar with a value, because SageMaker can send nothing else. Booleans are
spelled `true`/`false` in any case: SageMaker's SDK v2 sends `True`, v3 sends `true`.
"""

import contextlib
import dataclasses
import difflib
import errno
import gc
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

C = TypeVar("C")  # a script's Config dataclass


class UserError(ValueError):
    """A mistake the user can mend: one line that names the option, its value and the remedy."""


class OwnError(UserError):
    """A UserError of one process alone, which that process prints, whichever it is."""


def refuse(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise one UserError with the message of every rule that is broken.

    Args:
        rules: pairs of whether the rule is broken, and what to say then.

    >>> refuse([(False, "--seed -1: give 0 or more"), (False, "--name is empty: give one")])
    """
    messages = [message for is_broken, message in rules if is_broken]
    if messages:
        raise UserError("; ".join(messages))


def out_of_range(
    config: Any,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> list[tuple[bool, str]]:
    """Rules for `refuse` about numeric options, by their names in `config`; shares are below 1.

    >>> from types import SimpleNamespace
    >>> out_of_range(SimpleNamespace(seed=-1), not_negative=["seed"])
    [(True, '--seed -1: give a positive number, or 0')]
    """
    value = vars(config)
    return [
        *((not value[name] > 0, f"--{name} {value[name]}: give a positive number")
          for name in positive),
        *((not value[name] >= 0, f"--{name} {value[name]}: give a positive number, or 0")
          for name in not_negative),
        *((not 0 <= value[name] < 1, f"--{name} {value[name]}: give a share from 0 up to 1")
          for name in shares),
    ]  # fmt: skip


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, to be quoted in a UserError; else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, or largest file (ulimit, FAT)
usual_thread_hook = threading.excepthook
BOOLEANS = {"true": True, "false": False}

registry = tyro.constructors.ConstructorRegistry()


@registry.primitive_rule
def _boolean_rule(
    type_info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Accept `true` and `True` alike; tyro's own rule knows only `True`."""
    if type_info.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: BOOLEANS[words[0].lower()],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(spelling for word in BOOLEANS for spelling in (word, word.title())),
    )


def parse(config_class: type[C], args: Sequence[str] | None = None) -> C:
    """Build a `config_class` from `--key value` arguments.

    Raises:
        UserError: naming every argument that is not an option, lacks its value or is given twice;
            or the first value that does not fit its option.
    """
    args = list(sys.argv[1:] if args is None else args)
    if "-h" not in args and "--help" not in args:
        _check_pairs(config_class, args)
    printed = io.StringIO()
    try:
        with registry, contextlib.redirect_stderr(printed):
            return tyro.cli(
                config_class,
                args=args,
                config=(tyro.conf.FlagConversionOff,),
                use_underscores=True,
                add_help=True,
            )
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        raise UserError(_one_line(printed.getvalue())) from None


def _check_pairs(config_class: type, args: list[str]) -> None:
    """Refuse anything but `--key value` pairs of known options, every problem in one message."""
    names = [field.name for field in dataclasses.fields(config_class)]
    problems, seen, position = [], set(), 0
    while position < len(args):
        word = args[position]
        key, equals, _ = word.partition("=")
        name = key[2:].replace("-", "_")
        if not key.startswith("--"):
            problems.append(f"{word!r} stands where an option should: write --key value")
            position += 1
            continue
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean --{close[0]}?" if close else "see --help for the options"
            problems.append(f"unknown option {key}: {hint}")
        if name in seen:
            problems.append(f"{key} is given twice: keep one")
        seen.add(name)
        has_value = bool(equals) or (
            position + 1 < len(args) and not args[position + 1].startswith("--")
        )
        if name in names and not has_value:
            problems.append(f"{key} has no value: write {key} VALUE")
        position += 2 if has_value and not equals else 1
    if problems:
        raise UserError("; ".join(problems))


def take_prefixed(args: Sequence[str], prefix: str) -> tuple[list[str], list[str]]:
    """Part `--PREFIX.key value` pairs from the others; they lose their prefix.

    >>> take_prefixed(["--role", "r", "--train.seed", "1", "--train.tune=full"], "train")
    (['--role', 'r'], ['--seed', '1', '--tune=full'])
    """
    own, prefixed, start = [], [], f"--{prefix}."
    into = own
    for word in args:
        if word.startswith("--"):
            into = prefixed if word.startswith(start) else own
        into.append(f"--{word[len(start) :]}" if word.startswith(start) else word)
    return own, prefixed


@contextlib.contextmanager
def naming(prefix: str) -> Iterator[None]:
    """Let a UserError about `--key` tell of `--PREFIX.key`."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(?<![\w-])--(?=[a-z])", f"--{prefix}.", str(error))) from error


def _one_line(box: str) -> str:
    """Flatten tyro's framed message: its first paragraph, without the frame."""
    lines = [re.sub(r"[─-╿]", "", line).strip() for line in box.splitlines()]
    body = []
    for line in lines[1:]:
        if not line:  # the rule below the first paragraph
            break
        body.append(line)
    return " ".join(body) or box.strip()


def run(main: Callable[[C], None], config_class: type[C]) -> None:
    """Parse the command line and call `main`; a UserError becomes one line and exit code 2.

    With several processes the first one of each machine prints it, or the one it strikes alone.
    What was imported by now is left out of all garbage collections to come.
    """
    gc.freeze()
    gc.enable()  # the scripts disable it while they import
    with _one_line_errors():
        main(parse(config_class))


def run_commands(commands: dict[str, Callable[[list[str]], None]], about: str) -> None:
    """Call the sub-command that the first word names with the words after it; errors as in `run`.

    Args:
        about: what `--help` prints.
    """
    name, *args = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(about)
        return
    with _one_line_errors():
        if name not in commands:
            close = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(commands)}"
            raise UserError(f"unknown command {name}: {hint}")
        commands[name](args)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    threading.excepthook = _report_thread_error
    try:
        yield
    except UserError as error:
        _fail(str(error), alone=isinstance(error, OwnError))
    except Exception as error:
        if _is_disk_full(error):
            _fail(f"the disk is full ({error}): free some space or give another --output_dir")
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            _fail(f"{error.filename} cannot be written ({error.strerror}): give another place")
        raise


def _report_thread_error(args: Any) -> None:
    """Report what ended a thread, but not a full disk: whoever waits for the thread raises it."""
    if not _is_disk_full(args.exc_value):
        usual_thread_hook(args)


def _fail(message: str, *, alone: bool = False) -> None:
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_disk_full(error: BaseException) -> bool:
    """Whether `error` says one of NO_ROOM; safetensors and pyarrow say it in words only."""
    words = str(error)
    return getattr(error, "errno", None) in NO_ROOM or any(
        os.strerror(code) in words for code in NO_ROOM
    )
