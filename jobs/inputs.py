"""What a job's scripts read: data and models of its channels, and the Hub's token."""

import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.aws import client, explain_errors
from common.cli import UserError
from jobs.archive import unpack
from jobs.contract import CHECKPOINTS, ML, say

SCRATCH = Path(tempfile.gettempdir())  # on the node's disk
COPY_THREADS = 16  # FastFile answers a read after 20 ms or more
TRAINED = {
    "adapter": "adapter_config.json",
    "model": "config.json",
}  # kind -> what it must hold


def set_by_job(script: str, channels: dict[str, Path], *, stage: bool) -> dict[str, str]:
    """Options that name the folders of a job's data and results.

    Args:
        stage: copy the data to the node's disk first.
    """
    options, is_training = {}, script == "train_lora.py"
    if "model" in channels:
        options["model"] = str(find_trained(channels["model"], "model"))
    data = channels.get("train" if is_training else "test")
    if data is not None:
        options["data_dir"] = str(copy_to_disk(data) if stage else data)
    if is_training:
        return options | {
            "output_dir": str(CHECKPOINTS),  # all that a run writes outlives a spot instance
            "cache_dir": str(SCRATCH / "encoder_cache"),  # but this, which can be computed again
        }
    if "adapter" in channels:
        options["adapter"] = str(find_trained(channels["adapter"], "adapter"))
    output = ML / "output" / "data"
    return options | {"output_dir": str(output / "export" if script == "export.py" else output)}


def copy_to_disk(folder: Path, scratch: Path = SCRATCH) -> Path:
    """Copy a channel to this node's disk; returns the copy's folder.

    Raises:
        UserError: the disk is too small.
    """
    target, start = scratch / "data" / folder.name, time.monotonic()
    files = [path for path in folder.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise UserError(
            f"--stage_to_local true: {folder} takes {num_bytes / 1e9:.1f} GB, {target} has "
            f"{free / 1e9:.1f} GB: give a larger --volume_gb, or leave it out"
        )

    def copy(path: Path) -> None:
        copied = target / path.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(copy, files))
    say(f"copied {num_bytes / 1e9:.2f} GB to {target} in {time.monotonic() - start:.1f} s")
    return target


def find_trained(folder: Path, kind: str, scratch: Path = SCRATCH) -> Path:
    """The model or adapter in a channel, which may hold the model.tar.gz of a training job.

    Args:
        kind: `model` or `adapter`.
    """
    archive = folder / "model.tar.gz"
    if archive.is_file():
        folder = scratch / f"{kind}_channel"
        unpack(archive, folder)
    for place in (folder / kind, folder, folder / f"{kind}_best"):
        if (place / TRAINED[kind]).is_file():
            return place
    raise UserError(f"--{kind}_s3: no {TRAINED[kind]} in {folder}: give a folder that has one")


def read_token(source: str) -> str:
    """The Hub's token from `secretsmanager:NAME` or `ssm:NAME`; a name may be an ARN."""
    kind, _, name = source.partition(":")
    region = name.split(":")[3] if name.startswith("arn:") else ""
    with explain_errors(f"--hf_token_from {source}"):
        if kind == "ssm":
            parameter = client(kind, region).get_parameter(Name=name, WithDecryption=True)
            return parameter["Parameter"]["Value"]
        text = client(kind, region).get_secret_value(SecretId=name).get("SecretString", "{}")
    try:
        content = json.loads(text)
    except ValueError:
        return text
    if isinstance(content, dict) and "HF_TOKEN" not in content:
        raise UserError(f"--hf_token_from {source}: has no key HF_TOKEN: store the token there")
    return content["HF_TOKEN"] if isinstance(content, dict) else text
