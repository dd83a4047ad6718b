"""First process of the container: starts the unchanged scripts, passes on signals and exit code.

SageMaker runs the image with the argument `train` (a training job, of train_lora.py, eval_wer.py or
export.py) or with the arguments that sagemaker_launch.py gave a processing job: `prepare --key
value ...` or `transcribe --key value ...`.
Everything else is in files below /opt/ml, and in LAUNCH_* variables that jobs/request.py sets.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

PROGRAM = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROGRAM))

from common.cli import UserError  # noqa: E402
from common.files import MARKERS  # noqa: E402
from jobs.contract import (  # noqa: E402
    CHECKPOINTS,
    ML,
    PROCESSING,
    TRANSCRIPTS,
    Cluster,
    explain_failure,
    read_channels,
    read_cluster,
    read_options,
    report_failure,
    say,
)
from jobs.inputs import SCRATCH, find_trained, read_token, set_by_job  # noqa: E402
from jobs.node import find_gpus, library_path, wait_for_names  # noqa: E402

PORT = 7777  # where the processes of several nodes meet
KILL_SECONDS = 130.0  # SageMaker kills a container 120 seconds after its SIGTERM
SHUTDOWN_SECONDS = 100  # that the launcher gives its processes after a SIGTERM
TAIL_BYTES = 262_144  # of stderr, kept to explain a failure: eight tracebacks
PROCESSING_SCRIPTS = {"prepare": "preprocess.py", "transcribe": "transcribe.py"}
RESULTS = ("adapter", "adapter_best", "model", "model_best", "train.json", "metrics.jsonl")


# ------ what is started


@dataclass(frozen=True)
class Program:
    """What a node runs."""

    cluster: Cluster
    script: str
    command: list[str]
    environment: dict[str, str]  # on top of the container's


def set_defaults() -> None:
    """Set variables that libraries read and SageMaker does not set."""
    if region := os.environ.get("AWS_REGION"):
        os.environ.setdefault("AWS_DEFAULT_REGION", region)  # the only one that boto3 reads
    # The home folder is on the small disk of the image.
    os.environ.setdefault("HF_HOME", str(SCRATCH / "huggingface"))


def words(options: dict[str, str]) -> list[str]:
    """Options for a command line; `=` keeps values that are empty or look like an option."""
    return [f"--{key}={value}" for key, value in options.items()]


def processing_program(command: str, arguments: list[str]) -> Program:
    """preprocess.py or transcribe.py on the one node of a processing job."""
    cluster = read_cluster(ML / "config" / "resourceconfig.json")
    options = {"output_dir": str(PROCESSING / "prepared")}
    if command == "transcribe":
        find_gpus(cluster.instance_type)  # fails if those of the instance cannot be used
        channels = read_channels(PROCESSING / "input")
        options = {
            kind: str(find_trained(channels[kind], kind))
            for kind in ("model", "adapter")
            if kind in channels
        } | {"output_dir": str(TRANSCRIPTS)}
    script = PROCESSING_SCRIPTS[command]
    words_of_script = [sys.executable, str(PROGRAM / script), *arguments, *words(options)]
    return Program(cluster, script, words_of_script, {})


def train_program() -> Program:
    """This node's processes of a training or an evaluation."""
    config_dir = ML / "input" / "config"
    cluster = read_cluster(config_dir / "resourceconfig.json")
    gpus = find_gpus(cluster.instance_type)  # before data is copied
    if len(cluster.hosts) > 1:
        wait_for_names(cluster.hosts)
    script = os.environ.get("LAUNCH_SCRIPT", "train_lora.py")
    channels = read_channels(ML / "input" / "data")
    options = set_by_job(script, channels, stage=os.environ.get("LAUNCH_STAGE") == "true")
    options |= read_options(config_dir / "hyperparameters.json")
    per_host = int(os.environ.get("LAUNCH_PROCESSES_PER_HOST", "0")) or max(gpus, 1)
    config = os.environ.get("LAUNCH_CONFIG", "auto")
    return launch(cluster, script, options, config=config, per_host=per_host)


def launch(
    cluster: Cluster, script: str, options: dict[str, str], *, config: str, per_host: int
) -> Program:
    """A script under `accelerate launch`; a single process without it, which would drop SIGTERM.

    Args:
        config: a name in accelerate_configs, or `auto`.
        per_host: processes of each node.
    """
    nodes, count = len(cluster.hosts), per_host * len(cluster.hosts)
    if config == "auto":
        config = "single_gpu" if count == 1 else "multi_gpu" if nodes == 1 else "multi_node"
    file = PROGRAM / "accelerate_configs" / f"{config}.yaml"
    if not file.is_file():
        raise UserError(f"--accelerate_config {config}: is not in this image: build it again")
    program = [str(PROGRAM / script), *words(options)]
    environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS)}
    if cluster.interface and nodes > 1:
        environment |= {
            "NCCL_SOCKET_IFNAME": cluster.interface,
            "GLOO_SOCKET_IFNAME": cluster.interface,
        }
    if count == 1:
        return Program(cluster, script, [sys.executable, *program], environment)
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
    return Program(cluster, script, [*command, *program], environment)


# ------ the process that is started


class Child:
    """A started command: signals are passed on to it, the end of its stderr is kept."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=PROGRAM, env=os.environ | environment, stderr=subprocess.PIPE
        )
        self.stderr = b""  # the end of it
        self.signal = 0  # the last that was received
        self.reader = threading.Thread(target=self._pass_on_stderr, daemon=True)
        self.reader.start()

    def _pass_on_stderr(self) -> None:
        descriptor = self.process.stderr.fileno()
        while block := os.read(descriptor, 65_536):
            sys.stderr.buffer.write(block)
            sys.stderr.buffer.flush()
            self.stderr = (self.stderr + block)[-TAIL_BYTES:]

    def pass_on(self, number: int, _frame: FrameType | None) -> None:
        """Send a signal to the ranks; the launcher itself would report it as a failure."""
        self.signal = number
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            ranks = [process for process in top.children() if _is_rank(process)]
            for process in ranks or [top]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def wait(self) -> int:
        """Return the exit code; process 1 of a container also has to reap orphans."""
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


# ------ how it ends


def is_finished(since: float) -> bool:
    """Whether a training run that was started at `since` reached its end; the first node knows."""
    record = CHECKPOINTS / "train.json"
    return record.is_file() and record.stat().st_mtime >= since


def keep_results(checkpoints: Path, model: Path) -> None:
    """Copy the results of a finished run into the folder that SageMaker packs and keeps."""
    model.mkdir(parents=True, exist_ok=True)
    markers = shutil.ignore_patterns(*(f"*{marker}" for marker in MARKERS))
    for name in RESULTS:
        source, target = checkpoints / name, model / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=markers)
        elif source.is_file():
            shutil.copyfile(source, target)
    say(f"{', '.join(sorted(path.name for path in model.iterdir()))} in {model}")


def is_reclaimed(code: int, received: int, note: Path) -> bool:
    """Whether a SIGTERM, on this node or another, ended a spot job before it was finished.

    Args:
        code: exit code of the script.
        received: the last signal that this node received, or 0.
        note: where the script writes the signal that stopped it; a time limit writes none.
    """
    if os.environ.get("LAUNCH_SPOT") != "true":
        return False
    stopped_by = note.read_text() if note.is_file() else ""
    return stopped_by == "SIGTERM" or (code != 0 and received == signal.SIGTERM)


def await_kill() -> None:
    """In a spot job, wait until SageMaker takes the instance away.

    If a container ends by itself, SageMaker does not start the job again: exit code 0 means
    Completed, any other Failed.
    """
    if os.environ.get("LAUNCH_SPOT") == "true":
        say(f"SIGTERM: waits up to {KILL_SECONDS:g} s for the instance to be taken away")
        time.sleep(KILL_SECONDS)


def failure_file(arguments: list[str]) -> Path:
    """Where SageMaker looks for the reason of a failure, for both kinds of job."""
    return ML / "output" / ("message" if is_processing(arguments) else "failure")


def is_processing(arguments: list[str]) -> bool:
    """Whether the container's arguments are those of a processing job."""
    return bool(arguments) and arguments[0] in PROCESSING_SCRIPTS


# ------ main


def run(arguments: list[str]) -> None:
    """Start a job's program and wait for it.

    Raises:
        UserError: it could not be started.
        SystemExit: it failed; its reason has been written.
    """
    set_defaults()
    os.environ["LD_LIBRARY_PATH"] = library_path(os.environ.get("LD_LIBRARY_PATH", ""))
    if source := os.environ.get("HF_TOKEN_FROM"):
        os.environ["HF_TOKEN"] = read_token(source)
    start = time.time()
    if is_processing(arguments):
        program = processing_program(arguments[0], arguments[1:])
    else:
        program = train_program()
    cluster = program.cluster
    say(f"{cluster.host} is node {cluster.rank + 1} of {len(cluster.hosts)}: {program.command}")
    note = Path(tempfile.mkdtemp()) / "stopped_by"
    child = Child(program.command, program.environment | {"STOPPED_BY_FILE": str(note)})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, child.pass_on)
    code = child.wait()
    if is_reclaimed(code, child.signal, note) and not is_finished(start):
        await_kill()
        report_failure("stopped by SIGTERM before the end: run it again", failure_file(arguments))
        sys.exit(128 + signal.SIGTERM)
    if code:
        report_failure(explain_failure(child.stderr, code), failure_file(arguments))
        sys.exit(code if code > 0 else 128 - code)
    if program.script != "train_lora.py" or cluster.rank > 0:
        return
    if is_finished(start):
        keep_results(CHECKPOINTS, ML / "model")
    else:
        say("the run is not finished: run again, it resumes from its checkpoints")


def stop_early(number: int, _frame: FrameType | None) -> None:
    """End before the program is started; without a handler process 1 gets no signal."""
    if number == signal.SIGTERM:
        await_kill()
    sys.exit(128 + number)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop_early)
    arguments = sys.argv[1:]
    try:
        run(arguments)
    except UserError as error:
        report_failure(str(error), failure_file(arguments))
        sys.exit(1)
    except Exception as error:
        report_failure(f"{type(error).__name__}: {error}", failure_file(arguments))
        raise


if __name__ == "__main__":
    main()
