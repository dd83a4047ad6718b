"""First process of the container: from SageMaker's files to the unchanged scripts, and back.

SageMaker runs the image with the argument `train` (a training job, of train_lora.py or eval_wer.py)
or with the arguments that sagemaker_launch.py gave a processing job: `prepare --key value ...`.
Everything else is in files below /opt/ml and in LAUNCH_* variables, which jobs/request.py
sets. Signals are handed to the training processes, the exit code is theirs, and what went wrong is
left where SageMaker shows it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

PROGRAM = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROGRAM))

from common.files import MARKERS  # noqa: E402
from jobs import instances  # noqa: E402

ML = Path("/opt/ml")
CHECKPOINTS = ML / "checkpoints"
PREPARED = ML / "processing" / "prepared"
SCRATCH = Path(tempfile.gettempdir())  # on the node's disk
DEVICES = Path("/dev")
COMPAT = Path("/usr/local/cuda/compat")  # of the base image: a driver for its CUDA
DRIVER = Path("/proc/driver/nvidia/version")  # of the host
PROBE = "import torch; torch.cuda.init(); print(torch.cuda.device_count())"
PORT = 7777  # where the processes of several nodes meet
HOSTS_SECONDS = 300.0  # that a node's name may take to appear
KILL_SECONDS = 130.0  # within which SageMaker kills what it has sent a SIGTERM
SHUTDOWN_SECONDS = 100  # of the 120 that SageMaker leaves after a SIGTERM
FAILURE_BYTES = 1000  # SageMaker shows 1,024
TAIL_BYTES = 262_144  # of stderr, to find the reason of a failure in: eight tracebacks
COPY_THREADS = 16  # FastFile answers a read after 20 ms or more
MAX_UNPACKED = 64 * 2**30  # bytes of an adapter's archive
EXCEPTION = re.compile(r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b")
TRAINED = {"adapter": "adapter_config.json", "model": "config.json"}  # by what it is known
RESULTS = ("adapter", "adapter_best", "model", "model_best", "train.json", "metrics.jsonl")


class EntryError(Exception):
    """What SageMaker is to show as the job's failure."""


# ------ nodes


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job, in the order of their numbers, and this one."""

    hosts: tuple[str, ...]
    host: str
    interface: str  # of the network between them; empty where it is not said
    instance_type: str = ""

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host)


def in_order(hosts: Sequence[str]) -> tuple[str, ...]:
    """By the number in the name: algo-10 comes after algo-2."""

    def key(host: str) -> tuple[int, str]:
        number = re.search(r"(\d+)$", host)
        return (int(number[1]) if number else sys.maxsize, host)

    return tuple(sorted(hosts, key=key))


def read_cluster(file: Path) -> Cluster:
    """From SageMaker's resourceconfig.json; one node where there is none."""
    if not file.is_file():
        return Cluster(("localhost",), "localhost", "")
    said = json.loads(file.read_text(encoding="utf-8"))
    hosts = in_order(said["hosts"])
    return Cluster(
        hosts,
        said["current_host"],
        said.get("network_interface_name", ""),
        said.get("current_instance_type", ""),
    )


def wait_for_names(hosts: Sequence[str], seconds: float = HOSTS_SECONDS) -> None:
    """Wait until every node's name leads to an address: nodes come up one after another."""
    deadline = time.monotonic() + seconds
    missing = list(hosts)
    while missing:
        missing = [host for host in missing if not _has_address(host)]
        if missing and time.monotonic() > deadline:
            raise EntryError(f"no address of {', '.join(missing)} within {seconds:g} s")
        if missing:
            time.sleep(0.5)


def _has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


# ------ what the scripts get


def read_options(file: Path) -> dict[str, str]:
    """hyperparameters.json as it is, without what SageMaker's toolkit keeps for itself."""
    if not file.is_file():
        return {}
    said = json.loads(file.read_text(encoding="utf-8"))
    return {key: str(value) for key, value in said.items() if not key.startswith("sagemaker_")}


def channel(name: str) -> Path | None:
    """The folder of an input channel, if the job has it."""
    folder = ML / "input" / "data" / name
    return folder if folder.is_dir() else None


def set_by_job(script: str, *, stage: bool) -> dict[str, str]:
    """Options that say where a job's data is, and where results go."""
    model = channel("model")
    own = {} if model is None else {"model": str(find_trained(model, "model"))}
    data = channel("train" if script == "train_lora.py" else "test")
    if data is not None:
        own["data_dir"] = str(staged(data) if stage else data)
    if script == "train_lora.py":
        return own | {
            "output_dir": str(CHECKPOINTS),  # all that a run writes outlives a spot instance
            "cache_dir": str(SCRATCH / "encoder_cache"),  # but this, which can be computed again
        }
    adapter = channel("adapter")
    if adapter is not None:
        own["adapter"] = str(find_trained(adapter, "adapter"))
    return own | {"output_dir": str(ML / "output" / "data")}


def staged(folder: Path) -> Path:
    """A copy of a channel on this node's disk."""
    target, start = SCRATCH / "data" / folder.name, time.monotonic()
    files = [path for path in folder.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise EntryError(
            f"--stage_to_local true: {folder} takes {num_bytes / 1e9:.1f} GB, {target} has "
            f"{free / 1e9:.1f} GB: give a larger --volume_gb, or leave it out"
        )

    def copy(path: Path) -> None:
        there = target / path.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there)

    with ThreadPoolExecutor(COPY_THREADS) as threads:
        list(threads.map(copy, files))
    say(f"copied {num_bytes / 1e9:.2f} GB to {target} in {time.monotonic() - start:.1f} s")
    return target


def find_trained(folder: Path, kind: str) -> Path:
    """The model or adapter of a channel, which may hold the model.tar.gz of a training job."""
    archive = folder / "model.tar.gz"
    if archive.is_file():
        folder = SCRATCH / f"{kind}_channel"
        try:
            with tarfile.open(archive, mode="r:gz") as packed:
                if sum(member.size for member in packed) > MAX_UNPACKED:
                    raise EntryError(f"{archive}: unpacks to over 64 GiB")
                packed.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise EntryError(f"{archive}: cannot be unpacked ({error})") from error
    for place in (folder / kind, folder, folder / f"{kind}_best"):
        if (place / TRAINED[kind]).is_file():
            return place
    raise EntryError(f"--{kind}_s3: no {TRAINED[kind]} in {folder}")


def read_token(source: str) -> str:
    """The Hub's token from `secretsmanager:NAME` or `ssm:NAME`; a name may be an ARN."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    kind, _, name = source.partition(":")
    region = name.split(":")[3] if name.startswith("arn:") else None
    try:
        client = boto3.client(kind, region_name=region)
        if kind == "ssm":
            return client.get_parameter(Name=name, WithDecryption=True)["Parameter"]["Value"]
        text = client.get_secret_value(SecretId=name)["SecretString"]
    except (BotoCoreError, ClientError, KeyError) as error:
        raise EntryError(f"--hf_token_from {source}: cannot be read ({error})") from error
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return content["HF_TOKEN"]
    return text


# ------ starting


def set_defaults() -> None:
    """What libraries look for and SageMaker does not set."""
    if region := os.environ.get("AWS_REGION"):
        os.environ.setdefault("AWS_DEFAULT_REGION", region)  # the only one that boto3 reads
    # The home folder lies on the small disk of the image.
    os.environ.setdefault("HF_HOME", str(SCRATCH / "huggingface"))


def library_path(before: str, compat: Path = COMPAT, driver: Path = DRIVER) -> str:
    """LD_LIBRARY_PATH, with the image's own driver libraries first where the host's are older.

    The entrypoint of AWS's base images does the same, and this one is in its place. Where the
    host's driver is newer, the image's would not start.
    """
    library = compat / "libcuda.so.1"
    if not library.exists() or not driver.is_file():
        return before
    own = re.fullmatch(r"libcuda\.so\.([\d.]+)", library.resolve().name)
    hosts = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", driver.read_text(encoding="utf-8"))
    if not own or not hosts or _version(hosts[1]) >= _version(own[1]):
        return before
    say(f"the host's driver {hosts[1]} is older than the image's {own[1]}, which comes first")
    return ":".join(filter(None, [str(compat), before]))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def ask_cuda() -> tuple[int, str]:
    """GPUs that CUDA starts on, and why there are none.

    Another process is asked: this one has been started with another LD_LIBRARY_PATH.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode == 0:
        return int(done.stdout.split()[-1]), ""
    return 0, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def find_gpus(instance_type: str) -> int:
    """GPUs of this node.

    Raises:
        EntryError: it has GPUs, and CUDA does not find them: training on the CPU would cost as
            much an hour, for days.
    """
    gpus, problem = ask_cuda()
    expected = instances.num_gpus(instance_type)
    if expected is None:
        expected = len([path for path in DEVICES.glob("nvidia*") if path.name[6:].isdigit()])
    if gpus >= expected or (gpus and "CUDA_VISIBLE_DEVICES" in os.environ):
        return gpus
    found = f"CUDA finds {gpus}" if gpus else f"CUDA does not start ({problem or 'finds none'})"
    raise EntryError(
        f"{instance_type} has {expected} GPUs, {found}: the image's CUDA may be too new for the "
        "host's driver: build it on an older BASE_IMAGE; or the instance is faulty: start again"
    )


def words(options: dict[str, str]) -> list[str]:
    """Options for a command line; `=` keeps values that are empty or look like an option."""
    return [f"--{key}={value}" for key, value in options.items()]


def launch(
    cluster: Cluster, script: str, options: dict[str, str], *, config: str, per_host: int
) -> tuple[list[str], dict[str, str]]:
    """The command that starts this node's processes, and what its environment has on top.

    Args:
        config: a name in accelerate_configs, or `auto`.
        per_host: processes of each node.
    """
    nodes, count = len(cluster.hosts), per_host * len(cluster.hosts)
    if config == "auto":
        config = "single_gpu" if count == 1 else "multi_gpu" if nodes == 1 else "multi_node"
    file = PROGRAM / "accelerate_configs" / f"{config}.yaml"
    if not file.is_file():
        raise EntryError(f"--accelerate_config {config}: is not in this image")
    program = [str(PROGRAM / script), *words(options)]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    if cluster.interface and nodes > 1:
        environment |= {
            "NCCL_SOCKET_IFNAME": cluster.interface,
            "GLOO_SOCKET_IFNAME": cluster.interface,
        }
    if count == 1:  # without `accelerate launch`, which keeps SIGTERM from a single process
        return [sys.executable, *program], environment
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(file),
        "--num_processes", str(count),
        "--num_machines", str(nodes), "--machine_rank", str(cluster.rank),
    ]  # fmt: skip
    if nodes > 1:
        command += ["--main_process_ip", cluster.hosts[0], "--main_process_port", str(PORT)]
        command += ["--same_network"]
    else:
        command += ["--main_process_port", "0"]
    return [*command, *program], environment


# ------ the processes that are started


class Watched:
    """The started command: its end, its last words, and who in it hears a signal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=PROGRAM, env=os.environ | environment, stderr=subprocess.PIPE
        )
        self.tail = b""
        self.heard = 0
        self.reader = threading.Thread(target=self._pass_on, daemon=True)
        self.reader.start()

    def _pass_on(self) -> None:
        """Hand stderr on as it comes, and remember its end."""
        descriptor = self.process.stderr.fileno()
        while block := os.read(descriptor, 65_536):
            sys.stderr.buffer.write(block)
            sys.stderr.buffer.flush()
            self.tail = (self.tail + block)[-TAIL_BYTES:]

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Hand a signal to the training processes: the launcher would call it a failure."""
        self.heard = number
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            ranks = [child for child in top.children() if _is_rank(child)]
            for one in ranks or [top]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

    def wait(self) -> int:
        """The exit code; as the first process of the container, orphans are waited for, too."""
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == self.process.pid:
                break
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.reader.join(5)
        return self.process.returncode


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "RANK" in process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def reason(tail: bytes, code: int) -> str:
    """Why a command failed: its own line, or that of the exception, or what it said last."""
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if EXCEPTION.match(line) and "ChildFailedError" not in line]
    said = own[:1] or raised[:1] or [" / ".join(lines[-3:])]
    killed = f" ({signal.Signals(-code).name})" if code < 0 else ""
    return f"exit code {code}{killed}: {said[0]}"


# ------ results


def is_finished(since: float) -> bool:
    """Whether a training run, started at `since`, came to its end; its first node knows."""
    told = CHECKPOINTS / "train.json"
    return told.is_file() and told.stat().st_mtime >= since


def keep_results(since: float) -> None:
    """Copy what a finished run leaves into the folder that SageMaker packs and keeps."""
    if not is_finished(since):
        say("the run is not finished: it goes on from its checkpoints when it is started again")
        return
    (ML / "model").mkdir(parents=True, exist_ok=True)
    markers = shutil.ignore_patterns(*(f"*{marker}" for marker in MARKERS))
    for name in RESULTS:
        source, target = CHECKPOINTS / name, ML / "model" / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=markers)
        elif source.is_file():
            shutil.copyfile(source, target)
    say(f"{', '.join(sorted(path.name for path in (ML / 'model').iterdir()))} in {ML / 'model'}")


def fail(message: str, file: Path) -> None:
    """Leave a failure's text where SageMaker looks for it; no secret is in it."""
    token = os.environ.get("HF_TOKEN")
    message = message.replace(token, "***") if token else message
    print(f"error: {message}", file=sys.stderr, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(message.encode()[:FAILURE_BYTES].decode(errors="ignore").encode())


def say(message: str) -> None:
    print(f"entry: {message}", flush=True)


# ------ main


def prepare_command(arguments: list[str]) -> tuple[Cluster, list[str]]:
    """preprocess.py on the one node of a processing job."""
    cluster = read_cluster(ML / "config" / "resourceconfig.json")
    command = [sys.executable, str(PROGRAM / "preprocess.py"), *arguments]
    return cluster, [*command, "--output_dir", str(PREPARED)]


def train_command() -> tuple[Cluster, list[str], dict[str, str], str]:
    """This node's share of a training or an evaluation, and the script's name."""
    config_dir = ML / "input" / "config"
    cluster = read_cluster(config_dir / "resourceconfig.json")
    gpus = find_gpus(cluster.instance_type)  # before data is copied
    if len(cluster.hosts) > 1:
        wait_for_names(cluster.hosts)
    script = os.environ.get("LAUNCH_SCRIPT", "train_lora.py")
    own = set_by_job(script, stage=os.environ.get("LAUNCH_STAGE") == "true")
    options = own | read_options(config_dir / "hyperparameters.json")
    command, environment = launch(
        cluster, script, options,
        config=os.environ.get("LAUNCH_CONFIG", "auto"),
        per_host=int(os.environ.get("LAUNCH_PROCESSES_PER_HOST", "0")) or max(gpus, 1),
    )  # fmt: skip
    return cluster, command, environment, script


def run(arguments: list[str]) -> None:
    """Start what the job is for and wait for it.

    Raises:
        EntryError: it could not be started, or failed.
        SystemExit: with its exit code, after a failure was written down.
    """
    environment: dict[str, str] = {}
    set_defaults()
    os.environ["LD_LIBRARY_PATH"] = library_path(os.environ.get("LD_LIBRARY_PATH", ""))
    if source := os.environ.get("HF_TOKEN_FROM"):
        os.environ["HF_TOKEN"] = read_token(source)
    since, script = time.time(), "preprocess.py"
    if arguments[:1] == ["prepare"]:
        cluster, command = prepare_command(arguments[1:])
    else:
        cluster, command, environment, script = train_command()
    say(f"{cluster.host} is node {cluster.rank + 1} of {len(cluster.hosts)}: {command}")
    note = Path(tempfile.mkdtemp()) / "stopped_by"
    watched = Watched(command, environment | {"STOPPED_BY_FILE": str(note)})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watched.hear)
    code = watched.wait()
    if is_reclaimed(code, watched.heard, note) and not is_finished(since):
        await_kill()
        fail("stopped by SIGTERM before the end: start it again", failure_file(arguments))
        sys.exit(128 + signal.SIGTERM)
    if code:
        fail(reason(watched.tail, code), failure_file(arguments))
        sys.exit(code if code > 0 else 128 - code)
    if script == "train_lora.py" and cluster.rank == 0:
        keep_results(since)


def failure_file(arguments: list[str]) -> Path:
    """Where SageMaker looks for the reason of a failure, in jobs of either kind."""
    return ML / "output" / ("message" if arguments[:1] == ["prepare"] else "failure")


def stopped_early(number: int, _frame: Any) -> None:
    """The first process of a container gets no signal that it has no handler for."""
    if number == signal.SIGTERM:
        await_kill()
    sys.exit(128 + number)


def is_reclaimed(code: int, heard: int, note: Path) -> bool:
    """Whether a spot job was told to end before it was finished, on this node or another.

    A time limit of its own, which leaves no note, is no such end.
    """
    if os.environ.get("LAUNCH_SPOT") != "true":
        return False
    noted = note.read_text() if note.is_file() else ""
    return noted == "SIGTERM" or (code != 0 and heard == signal.SIGTERM)


def await_kill() -> None:
    """In a spot job, stay until SageMaker takes the instance away.

    To SageMaker exit code 0 is a finished job, which is not started again; any other, of a
    container that ends by itself, a failed one.
    """
    if os.environ.get("LAUNCH_SPOT") == "true":
        say(f"SIGTERM: waits up to {KILL_SECONDS:g} s for the instance to be taken away")
        time.sleep(KILL_SECONDS)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopped_early)
    arguments = sys.argv[1:]
    try:
        run(arguments)
    except EntryError as error:
        fail(str(error), failure_file(arguments))
        sys.exit(1)
    except Exception as error:
        fail(f"{type(error).__name__}: {error}", failure_file(arguments))
        raise


if __name__ == "__main__":
    main()
