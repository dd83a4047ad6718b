"""A scored adapter and its model card on the Hub, only if asked: nothing else is ever sent.

What is sent is named below. Voices, transcripts, scores of single clips, checkpoints and logs are
not, and paths of the machine are cut down to their last part.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from common import cli
from common.cli import UserError, first_line

CARD = "README.md"
RECORDS = ("recipe.json", "adapter_config.json", "config.json")  # they may hold paths
SENT = (
    "adapter_config.json", "adapter_model.safetensors", "recipe.json", ".eval_results/*.yaml",
    # of a full fine-tune
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "normalizer.json",
    "added_tokens.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip


def is_repo(name: str) -> bool:
    """Whether a name is OWNER/NAME as the Hub allows it.

    >>> is_repo("me/whisper-mr"), is_repo("whisper-mr"), is_repo("/tmp/x"), is_repo("a/b c")
    (True, False, False, False)
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"[^/]+/[^/]+", name) is not None


def rules(
    repo: str, model: str, adapter: str, *, has_card: bool, is_recorded: bool
) -> list[tuple[bool, str]]:
    """Rules of `cli.refuse` for --push_to_hub; none is broken where it is empty.

    Args:
        adapter: as --adapter has it.
        has_card: whether a model card is written.
        is_recorded: whether the adapter, or else the model, is of train_lora.py.
    """
    option = f"--push_to_hub {repo}:"
    return [
        (bool(repo) and broken, f"{option} {message}")
        for broken, message in (
            (not is_repo(repo), "is no name on the Hub: give OWNER/NAME"),
            (
                not has_card,
                "goes with a model card: score all of --split test, with --model_card true",
            ),
            ("," in adapter, "takes one adapter: give --adapter one folder"),
            (
                not is_recorded,
                f"--model {model} has no recipe.json of train_lora.py: give --adapter, or a full "
                "fine-tune of your own",
            ),
        )
    ]


def check_access(repo: str) -> None:
    """Ask the Hub, before hours of decoding, whether it answers and knows the token.

    Raises:
        UserError: it does not, or there is no token, or one that cannot write.
    """
    cli.refuse(
        [
            (
                constants.HF_HUB_OFFLINE,
                f"--push_to_hub {repo}: HF_HUB_OFFLINE is set: unset it, or push later",
            ),
            (
                get_token() is None,
                f"--push_to_hub {repo}: no token: set HF_TOKEN, or log in with `hf auth login`",
            ),
        ]
    )
    account = _ask(repo, lambda: HfApi().whoami())
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"--push_to_hub {repo}: the token can only read: give one that can write")


def push(repo: str, folder: Path, card: Path, base: str) -> str:
    """Send a folder's model and its card in one commit; a new repository is private.

    Args:
        card: sent as README.md.
        base: the base's id on the Hub, for an adapter's configuration; empty: as it is there.

    Returns:
        A line to print.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    disable_progress_bars()
    operations = [CommitOperationAdd(CARD, card.read_bytes())]
    for path in sorted({path for pattern in SENT for path in folder.glob(pattern)}):
        name = path.relative_to(folder).as_posix()
        content = published(path, base) if name in RECORDS else path
        operations.append(CommitOperationAdd(name, content))
    message = "Model and card, written by eval_wer.py"
    api = HfApi()
    address = _ask(repo, lambda: api.create_repo(repo, private=True, exist_ok=True))
    _ask(repo, lambda: api.create_commit(repo, operations, commit_message=message))
    return f"pushed {', '.join(own.path_in_repo for own in operations)} to {address}"


def published(path: Path, base: str) -> bytes:
    """The content of a JSON file with the last parts of paths alone."""
    record = shorten(json.loads(path.read_text(encoding="utf-8")))
    if base and "base_model_name_or_path" in record:
        record["base_model_name_or_path"] = base
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()


def shorten(value: Any) -> Any:
    """A JSON value with absolute paths cut down to their last part.

    >>> shorten({"model": "openai/whisper-tiny", "dirs": ["/home/me/run"]})
    {'model': 'openai/whisper-tiny', 'dirs': ['run']}
    """
    if isinstance(value, dict):
        return {key: shorten(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shorten(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _ask(repo: str, call: Callable[[], Any]) -> Any:
    """What the Hub answers; its refusal, or that it cannot be reached, as one line."""
    try:
        return call()
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--push_to_hub {repo}: {constants.ENDPOINT} does not take it ({first_line(error)}): "
            "check the name, the token's rights and the connection"
        ) from error
