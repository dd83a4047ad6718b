"""What SageMaker tells a container in files below /opt/ml, and where it looks for a failure.

https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html
"""

import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ML = Path("/opt/ml")
CHECKPOINTS = ML / "checkpoints"  # copied to S3 while a training job runs, and back at its start
PROCESSING = ML / "processing"  # of a processing job
TRANSCRIPTS = PROCESSING / "output" / "transcripts"  # copied to S3 while a processing job runs
FAILURE_BYTES = 1000  # SageMaker shows 1,024
EXCEPTION = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job, in the order of their numbers, and this one."""

    hosts: tuple[str, ...]
    host: str  # this node
    interface: str  # of the network between the nodes; empty: unknown
    instance_type: str = ""

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host)


def in_order(hosts: Sequence[str]) -> tuple[str, ...]:
    """Sort by the number in the name: algo-10 comes after algo-2."""

    def key(host: str) -> tuple[int, str]:
        number = re.search(r"(\d+)$", host)
        return (int(number[1]) if number else sys.maxsize, host)

    return tuple(sorted(hosts, key=key))


def read_cluster(file: Path) -> Cluster:
    """Read resourceconfig.json; one node if there is no such file."""
    if not file.is_file():
        return Cluster(("localhost",), "localhost", "")
    config = json.loads(file.read_text(encoding="utf-8"))
    return Cluster(
        in_order(config["hosts"]),
        config["current_host"],
        config.get("network_interface_name", ""),
        config.get("current_instance_type", ""),
    )


def read_options(file: Path) -> dict[str, str]:
    """Read hyperparameters.json, without the `sagemaker_*` of SageMaker's own toolkit."""
    if not file.is_file():
        return {}
    options = json.loads(file.read_text(encoding="utf-8"))
    return {key: str(value) for key, value in options.items() if not key.startswith("sagemaker_")}


def read_channels(folder: Path) -> dict[str, Path]:
    """The folders of the job's input channels by name."""
    return {path.name: path for path in folder.glob("*") if path.is_dir()}


# ------ messages


def say(message: str) -> None:
    """Print a line into the job's log."""
    print(f"entry: {message}", flush=True)


def explain_failure(stderr: bytes, code: int) -> str:
    """Why a command failed: its own `error:` line, else its exception, else its last lines."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if EXCEPTION.match(line) and "ChildFailedError" not in line]
    reason = (errors or raised or [" / ".join(lines[-3:])])[0]
    killed = f" ({signal.Signals(-code).name})" if code < 0 else ""
    return f"exit code {code}{killed}: {reason}"


def report_failure(message: str, file: Path) -> None:
    """Print a failure and write it where SageMaker looks for it, without the Hub's token."""
    token = os.environ.get("HF_TOKEN")
    message = message.replace(token, "***") if token else message
    print(f"error: {message}", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(message.encode()[:FAILURE_BYTES].decode(errors="ignore").encode())
