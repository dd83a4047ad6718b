"""The container's first process: options, order of nodes, staging, secrets, failures, results."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import boto3
import launch
import pytest
import sagemaker
import tiny
from short_run import SMALL
from strict_aws import BUCKET, REGION, strict_aws
from test_house import FILES, REACHED, ROOMS, SCRIPTS

import train_lora
from common import cli, provenance
from common.prepared import load_prepared
from jobs import contract, entry, inputs, node

DOCKER = launch.ROOT / "docker"
STRANGE = [
    "two words",
    'a "quote"',
    "it's",
    "$(id)",
    "`id`",
    "é",
    "True",
    "no",
    "",
    "--seed",
    "a=b",
]


# ------ options


@pytest.mark.parametrize("value", STRANGE)
def test_a_hyperparameter_arrives_unchanged(value, tmp_path):
    file = tmp_path / "hyperparameters.json"
    file.write_text(json.dumps({"model": value, "sagemaker_program": "x"}), encoding="utf-8")
    options = contract.read_options(file)
    assert options == {"model": value}
    show = "import sys, json; print(json.dumps(sys.argv[1:]))"
    shown = subprocess.run(
        [sys.executable, "-c", show, *entry.words(options)], capture_output=True, text=True
    )
    assert cli.parse(train_lora.Config, json.loads(shown.stdout)).model == value


def test_booleans_of_either_sdk_are_understood():
    for spelled in ("True", "true"):
        options = entry.words({"cache_encoder": spelled, "lora_scope": "decoder"})
        assert cli.parse(train_lora.Config, options).cache_encoder is True


def test_a_nodes_number_orders_it(tmp_path):
    names = [f"algo-{number}" for number in (10, 2, 1, 11, 3)]
    assert contract.in_order(names) == ("algo-1", "algo-2", "algo-3", "algo-10", "algo-11")
    file = tmp_path / "resourceconfig.json"
    file.write_text(json.dumps({"hosts": names, "current_host": "algo-10"}))
    assert contract.read_cluster(file).rank == 3
    assert contract.read_cluster(tmp_path / "none.json").hosts == ("localhost",)


def test_a_name_that_never_appears_ends_the_wait():
    node.wait_for_names(["localhost"])
    with pytest.raises(cli.UserError, match=r"no address of algo-2\.invalid within 0 s"):
        node.wait_for_names(["localhost", "algo-2.invalid"], seconds=0)


def command_for(hosts, host="algo-1", config="auto", per_host=1):
    cluster, options = contract.Cluster(tuple(hosts), host, "eth0"), {"seed": "1"}
    program = entry.launch(cluster, "train_lora.py", options, config=config, per_host=per_host)
    return program.command, program.environment


def test_one_process_is_started_without_the_launcher_and_chooses_its_precision_itself():
    command, environment = command_for(["algo-1"])
    assert command == [sys.executable, str(launch.ROOT / "train_lora.py"), "--seed=1"]
    assert "ACCELERATE_MIXED_PRECISION" not in environment
    assert "NCCL_SOCKET_IFNAME" not in environment


def test_many_processes_are_started_as_accelerate_takes_them():
    hosts = ["algo-1", "algo-2"]
    command, environment = command_for(hosts, "algo-2", "deepspeed_zero2", per_host=8)
    text = " ".join(command)
    assert "--num_processes 16 --num_machines 2 --machine_rank 1" in text
    assert "--main_process_ip algo-1 --main_process_port 7777" in text
    assert "accelerate_configs/deepspeed_zero2.yaml --num_processes" in text
    assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "100"
    assert not [name for name in environment if name.startswith(("FI_", "NCCL_PROTO"))]
    assert "multi_gpu.yaml" in " ".join(command_for(["algo-1"], per_host=4)[0])
    assert "multi_node.yaml" in " ".join(command_for(hosts, per_host=4)[0])
    with pytest.raises(cli.UserError, match="--accelerate_config nine"):
        command_for(hosts, config="nine")


def test_the_job_sets_the_folders_of_its_channels_and_results(tmp_path):
    for name in ("train", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model" / "config.json").touch()
    options = inputs.set_by_job("train_lora.py", contract.read_channels(tmp_path), stage=False)
    assert options["data_dir"] == str(tmp_path / "train")
    assert options["model"] == str(tmp_path / "model")
    assert options["output_dir"] == "/opt/ml/checkpoints"
    for script, folder in (("eval_wer.py", ""), ("export.py", "/export")):
        options = inputs.set_by_job(script, {}, stage=False)
        assert options == {"output_dir": f"/opt/ml/output/data{folder}"}


@pytest.mark.parametrize("program", ["jobs.entry", "sagemaker_launch"])
def test_entry_and_launcher_start_without_heavy_libraries(program):
    heavy = "{'boto3', 'botocore', 'numpy', 'pandas', 'pyarrow', 'torch', 'transformers'}"
    show = f"import sys, {program}; sys.exit(' '.join({heavy} & sys.modules.keys()))"
    words = [sys.executable, "-c", show]
    done = subprocess.run(words, cwd=launch.ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_clients_of_aws_are_made_in_one_place():
    files = [launch.ROOT / "sagemaker_launch.py", *(launch.ROOT / "jobs").glob("*.py")]
    for file in files:
        assert not re.search(r"(import|from) boto3", file.read_text(encoding="utf-8")), file


def test_a_dataset_is_prepared_on_one_node():
    assert entry.processing_program("prepare", ["--language", "mr"]).command == [
        sys.executable, str(launch.ROOT / "preprocess.py"), "--language", "mr",
        "--output_dir=/opt/ml/processing/prepared",
    ]  # fmt: skip


def test_recordings_are_transcribed_on_one_node_with_the_models_of_the_channels(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(entry, "PROCESSING", tmp_path)
    monkeypatch.setattr(entry, "find_gpus", lambda instance_type: 1)
    (tmp_path / "input" / "adapter").mkdir(parents=True)
    with pytest.raises(cli.UserError, match=r"--adapter_s3: no adapter_config.json in"):
        entry.processing_program("transcribe", [])
    (tmp_path / "input" / "adapter" / "adapter_config.json").touch()
    assert entry.processing_program("transcribe", ["--audio", "a"]).command == [
        sys.executable, str(launch.ROOT / "transcribe.py"), "--audio", "a",
        f"--adapter={tmp_path}/input/adapter", f"--output_dir={entry.TRANSCRIPTS}",
    ]  # fmt: skip
    failure = entry.failure_file(["transcribe", "--audio", "a"])
    assert failure == entry.failure_file(["prepare"]) != entry.failure_file(["train"])


# ------ GPUs


@pytest.mark.parametrize(
    ("instance_type", "answer", "message"),
    [
        ("ml.g5.2xlarge", (0, "Error: driver too old"), "CUDA does not start (Error: driver"),
        ("ml.g5.12xlarge", (3, ""), "ml.g5.12xlarge has 4 GPUs, CUDA finds 3"),
        ("ml.new.xlarge", (0, "RuntimeError: x"), ""),
        ("ml.m5.xlarge", (0, "RuntimeError: x"), ""),
        ("ml.g5.2xlarge", (1, ""), ""),
    ],
)  # fmt: skip
def test_a_gpu_instance_without_cuda_fails_at_once(instance_type, answer, message, monkeypatch):
    monkeypatch.setattr(node, "ask_cuda", lambda: answer)
    monkeypatch.setattr(node, "DEVICES", Path("/nonexistent"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if message:
        with pytest.raises(cli.UserError, match=re.escape(message)):
            node.find_gpus(instance_type)
    else:
        assert node.find_gpus(instance_type) == answer[0]


def test_a_gpus_device_file_tells_of_it_where_the_instance_type_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "ask_cuda", lambda: (0, "RuntimeError: no driver"))
    monkeypatch.setattr(node, "DEVICES", tmp_path)
    (tmp_path / "nvidiactl").touch()
    assert node.find_gpus("ml.new.xlarge") == 0
    (tmp_path / "nvidia0").touch()
    with pytest.raises(cli.UserError, match=r"CUDA does not start .*no driver"):
        node.find_gpus("ml.new.xlarge")


def test_cuda_is_asked_in_a_process_of_its_own(monkeypatch):
    assert node.ask_cuda()[0] == 0, "on this machine"
    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setattr(node, "PROBE", "import nothing_like_it")
    assert node.ask_cuda() == (0, "ModuleNotFoundError: No module named 'nothing_like_it'")
    monkeypatch.setattr(node, "PROBE", "print('noise'); print(4)")
    assert node.ask_cuda() == (4, "")


KERNEL_MODULES = {
    "x86_64 Kernel Module  535.183.01  Sun May 12": (535, 183, 1),
    "Open Kernel Module for x86_64  580.65.06  Release Build": (580, 65, 6),
}


@pytest.mark.parametrize(("line", "version"), KERNEL_MODULES.items())
@pytest.mark.parametrize("compat", ["550.54.14", "580.65.06", "610.1"])
def test_compatibility_libraries_come_first_where_the_driver_is_older(
    line, version, compat, tmp_path
):
    (tmp_path / f"libcuda.so.{compat}").touch()
    (tmp_path / "libcuda.so.1").symlink_to(f"libcuda.so.{compat}")
    driver = tmp_path / "version"
    driver.write_text(f"NVRM version: NVIDIA UNIX {line} 2026\nGCC version: 11.4.0\n")
    is_older = version < tuple(int(part) for part in compat.split("."))
    got = node.library_path("/usr/lib64:/opt/lib", tmp_path, driver)
    assert got == (f"{tmp_path}:" if is_older else "") + "/usr/lib64:/opt/lib"
    assert node.library_path("", tmp_path, driver) == (str(tmp_path) if is_older else "")
    for missing in (tmp_path / "none", tmp_path):
        assert node.library_path("/a", missing, tmp_path / "none") == "/a"
    driver.unlink()
    driver.write_text("something else\n")
    assert node.library_path("/a", tmp_path, driver) == "/a"


# ------ spot


@pytest.mark.parametrize(
    ("spot", "code", "received", "note", "reclaimed"),
    [
        ("true", 0, 0, "SIGTERM", True),  # on a node that got no signal itself
        ("true", 0, signal.SIGTERM, "SIGTERM", True),
        ("true", -15, signal.SIGTERM, "", True),  # eval_wer.py, or before the first step
        ("true", 0, signal.SIGTERM, "", False),  # finished all the same
        ("true", 0, 0, "", False),  # --max_minutes
        ("true", 1, 0, "", False),  # a failure
        ("true", 0, signal.SIGINT, "SIGINT", False),
        ("false", 0, signal.SIGTERM, "SIGTERM", False),
    ],
)
def test_who_waits_to_be_taken_away(spot, code, received, note, reclaimed, tmp_path, monkeypatch):
    monkeypatch.setenv("LAUNCH_SPOT", spot)
    if note:
        (tmp_path / "note").write_text(note)
    assert entry.is_reclaimed(code, received, tmp_path / "note") is reclaimed


STOPS = """
import os, pathlib, sys
pathlib.Path(os.environ["STOPPED_BY_FILE"]).write_text("SIGTERM")
"""


@pytest.mark.parametrize(("spot", "code"), [("true", 143), ("", 0)])
def test_a_reclaimed_node_that_is_not_killed_ends_as_failed(
    spot, code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(entry, "ML", tmp_path)
    monkeypatch.setattr(entry, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(entry, "KILL_SECONDS", 0.0)
    monkeypatch.setenv("LAUNCH_SPOT", spot)
    for name in ("LD_LIBRARY_PATH", "HF_HOME"):
        monkeypatch.setenv(name, "")
    command = [sys.executable, "-c", STOPS]
    cluster = contract.Cluster(("algo-1", "algo-2"), "algo-2", "")
    program = entry.Program(cluster, "train_lora.py", command, {})
    monkeypatch.setattr(entry, "train_program", lambda: program)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    ended = contextlib.nullcontext() if code == 0 else pytest.raises(SystemExit)
    try:
        with ended as raised:
            entry.run(["train"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failure = tmp_path / "output" / "failure"
    if code:
        assert raised.value.code == code
        assert failure.read_text() == "stopped by SIGTERM before the end: run it again"
    assert failure.exists() is bool(code)
    assert ("waits up to 0 s" in capsys.readouterr().out) is bool(code)


# ------ data and adapters


def test_a_staged_channel_is_a_whole_copy(tmp_path, monkeypatch, capsys):
    source = tmp_path / "train"
    (source / "test").mkdir(parents=True)
    (source / "test" / "a.arrow").write_bytes(b"abc")
    (source / "preprocess.json").write_text("{}")
    copy = inputs.copy_to_disk(source, tmp_path / "scratch")
    assert (copy / "test" / "a.arrow").read_bytes() == b"abc"
    assert (copy / "preprocess.json").read_text() == "{}"
    assert "copied 0.00 GB" in capsys.readouterr().out
    monkeypatch.setattr(inputs.shutil, "disk_usage", lambda path: type("D", (), {"free": 1})())
    with pytest.raises(cli.UserError, match=r"--stage_to_local true: .* give a larger --v"):
        inputs.copy_to_disk(source, tmp_path / "scratch")


def pack(file, *names):
    with tarfile.open(file, "w:gz") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def test_an_adapter_is_found_in_its_folder_or_in_a_training_jobs_archive(tmp_path):
    scratch = tmp_path / "scratch"
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(cli.UserError, match=r"--adapter_s3: no adapter_config\.json"):
        inputs.find_trained(plain, "adapter", scratch)
    (plain / "adapter_config.json").touch()
    assert inputs.find_trained(plain, "adapter", scratch) == plain
    packed = tmp_path / "packed"
    packed.mkdir()
    names = ("adapter/adapter_config.json", "model/config.json", "model_best/config.json")
    pack(packed / "model.tar.gz", *names)
    for kind in ("adapter", "model"):
        found = inputs.find_trained(packed, kind, scratch)
        assert found == scratch / f"{kind}_channel" / kind
    pack(packed / "model.tar.gz", "../evil")
    with pytest.raises(cli.UserError, match="cannot be unpacked"):
        inputs.find_trained(packed, "adapter", scratch)
    assert not list(tmp_path.rglob("evil"))


# ------ secrets and failures


@pytest.mark.parametrize(
    ("kind", "text"), [("secretsmanager", "hf_abc"), ("secretsmanager", None), ("ssm", "hf_abc")]
)
def test_the_hubs_token_is_read_inside_the_container(kind, text, monkeypatch):
    with strict_aws() as aws:
        monkeypatch.setenv("AWS_REGION", REGION)
        for name in ("AWS_DEFAULT_REGION", "HF_HOME"):
            monkeypatch.setenv(name, "restored after the test")
            monkeypatch.delenv(name)
        entry.set_defaults()
        assert os.environ["HF_HOME"] == str(entry.SCRATCH / "huggingface")
        content = text or json.dumps({"HF_TOKEN": "hf_abc"})
        if kind == "ssm":
            client = aws.session.client("ssm")
            client.put_parameter(Name="hf", Value=content, Type="SecureString")
            arn = f"arn:aws:ssm:{REGION}:123456789012:parameter/hf"
            assert inputs.read_token(f"ssm:{arn}") == "hf_abc"
        else:
            client = boto3.client("secretsmanager", region_name=REGION)
            client.create_secret(Name="hf", SecretString=content)
            client.create_secret(Name="other", SecretString="{}")
            with pytest.raises(cli.UserError, match=r"--hf_token_from .*:other: has no key"):
                inputs.read_token("secretsmanager:other")
        assert inputs.read_token(f"{kind}:hf") == "hf_abc"
        with pytest.raises(cli.UserError, match=f"--hf_token_from {kind}:nobody: AWS answers: "):
            inputs.read_token(f"{kind}:nobody")


def test_a_failures_text_is_short_valid_and_without_the_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = tmp_path / "output" / "failure"
    contract.report_failure("hf_secret " + "मराठी" * 1000, file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("*** मराठी")
    assert len(file.read_bytes()) < 1024
    assert "hf_secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            "warning\nerror: --model x: no such\nTraceback\nChildFailedError: y\n",
            "error: --model x",
        ),
        ("Traceback (most recent call last):\n  File\nValueError: bad\nlast\n", "ValueError: bad"),
        ("x.ChildFailedError: y\n[rank1]: KeyError: 'a'\n", "[rank1]: KeyError: 'a'"),
        ("one\ntwo\n", "one / two"),
    ],
)
def test_the_reason_of_a_failure_is_the_scripts_own_line(stderr, said):
    assert contract.explain_failure(stderr.encode(), 2).startswith(f"exit code 2: {said}")


# ------ Dockerfile, script, policies


def test_the_dockerfile_is_clean_and_the_entry_is_process_1():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", text, flags=re.M)
    assert json.loads(entrypoint) == ["python", "/opt/program/jobs/entry.py"]
    assert not re.search(r"TOKEN|SECRET|PASSWORD", text)
    for line in re.findall(r"^COPY (.*) \S+$", text, flags=re.M):
        for name in line.split():
            assert (launch.ROOT / name).exists(), name


@pytest.mark.parametrize("program", [*sorted({*SCRIPTS} - {"sagemaker_launch"}), "jobs.entry"])
def test_the_image_has_every_file_that_its_programs_import(program):
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    copied = set(" ".join(re.findall(r"^COPY (.*) \S+$", text, flags=re.M)).split())
    files = [FILES[name].relative_to(launch.ROOT) for name in (program, *REACHED[program])]
    needed = {file.parts[0] for file in files}
    assert needed <= copied, f"{program} needs {needed - copied}"


def test_results_of_the_image_name_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    assert re.match(r"[0-9a-f]{40}", provenance.git_commit()), "of this checkout"
    monkeypatch.setenv("GIT_COMMIT", "abc")
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert provenance.git_commit() == "abc"
    monkeypatch.delenv("GIT_COMMIT")
    assert provenance.git_commit() == ""


def test_what_the_dockerfile_copies_is_in_the_build_context():
    dockerfile = (launch.ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in dockerfile.splitlines() if line.startswith("COPY ")]
    allowed = (launch.ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    missing = [path for paths in copied for path in paths if f"!{path}" not in allowed]
    assert not missing, f".dockerignore leaves out {missing}"


def test_the_image_asks_for_everything_but_torch():
    lines = (launch.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    kept = subprocess.run(
        ["grep", "-v", "^torch==", "requirements.txt"],
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert [line for line in lines if line not in kept] == [
        line for line in lines if line.startswith("torch==")
    ]
    assert len(kept) == len(lines) - 1


DOCKER_V2 = "application/vnd.docker.distribution.manifest.v2+json"
OCI = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def build(tmp_path):
    """Run build_and_push.sh with tools that note what they are called with, and a fixed answer."""

    def run(*words, manifest=DOCKER_V2):
        for name in ("aws", "docker"):
            fake = tmp_path / name
            fake.write_text(
                f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n'
                'case "$*" in *caller-identity*) echo 123456789012;; *describe-repos*) exit 1;; '
                f"*Manifest.MediaType*) echo {manifest};; *Manifest.Digest*) echo sha256:0;; esac\n"
            )
            fake.chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        words = [DOCKER / "build_and_push.sh", *words]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        calls = tmp_path / "calls"
        return done, calls.read_text() if calls.exists() else ""

    return run


def test_build_and_push_logs_in_builds_and_pushes_without_breaking_words(build):
    done, calls = build("whisper-lora", "eu-west-1")
    assert done.returncode == 0, done.stderr
    registry = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
    assert done.stdout.splitlines()[-1] == f"{registry}/whisper-lora@sha256:0"
    assert calls.count("docker login") == 1, "the public gallery needs none"
    assert f"docker login --username AWS --password-stdin {registry}\n" in calls
    assert "create-repository --region eu-west-1 --repository-name whisper-lora" in calls
    base = "public.ecr.aws/deep-learning-containers/pytorch:2.13-cu133-amzn2023-sagemaker"
    assert f"--build-arg BASE_IMAGE={base}" in calls
    assert f"name={registry}/whisper-lora:latest,push=true,oci-mediatypes=false ." in calls
    assert "--provenance=false --sbom=false" in calls
    assert build("whisper-lora")[0].returncode == 2


def test_a_base_image_of_a_registry_needs_a_login_there(build):
    base = "763104351884.dkr.ecr.us-west-2.amazonaws.com/pytorch:2.13"
    done, calls = build("whisper-lora:v1", "eu-west-1", base)
    assert done.returncode == 0, done.stderr
    assert "aws ecr get-login-password --region us-west-2" in calls
    assert f"docker login --username AWS --password-stdin {base.split('/')[0]}\n" in calls


def test_an_image_that_sagemaker_refuses_is_told_where_it_is_pushed(build):
    done, _ = build("whisper-lora", "eu-west-1", manifest=OCI)
    assert done.returncode == 1
    assert f"was pushed as {OCI}, which SageMaker refuses" in done.stderr
    assert "@sha256" not in done.stdout


@pytest.mark.parametrize("name", ["role", "user", "trust"])
def test_a_policy_allows_no_more_than_it_names(name):
    policy = json.loads((DOCKER / f"{name}_policy.json").read_text(encoding="utf-8"))
    everywhere = {  # actions that AWS grants on all resources or none
        "ecr:GetAuthorizationToken", "cloudwatch:PutMetricData", "sagemaker:ListTrainingJobs",
        "pricing:GetProducts", "ssmmessages:CreateControlChannel",
        "ssmmessages:CreateDataChannel", "ssmmessages:OpenControlChannel",
        "ssmmessages:OpenDataChannel",
    }  # fmt: skip
    for statement in policy["Statement"]:
        actions = statement["Action"]
        actions = {actions} if isinstance(actions, str) else set(actions)
        assert statement["Effect"] == "Allow"
        assert not [action for action in actions if "*" in action]
        if statement.get("Resource") == "*":
            assert actions <= everywhere, actions - everywhere


def actions(name):
    policy = json.loads((DOCKER / f"{name}_policy.json").read_text(encoding="utf-8"))
    of = [statement["Action"] for statement in policy["Statement"]]
    return {action for one in of for action in ([one] if isinstance(one, str) else one)}


def test_the_policies_allow_every_call_of_the_launcher():
    files = [launch.ROOT / "sagemaker_launch.py", *(launch.ROOT / "jobs").glob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    calls = set(re.findall(r"sagemaker\.((?:create|update|stop)_\w+_job)", source))
    calls |= {"describe_training_job", "describe_processing_job"}  # `describe` composes the names
    assert {"update_training_job", "create_training_job"} <= calls
    wanted = {f"sagemaker:{call.title().replace('_', '')}" for call in calls}
    assert wanted <= actions("user"), wanted - actions("user")


def test_the_policies_allow_what_a_key_and_a_shell_need():
    key = {"kms:Encrypt", "kms:Decrypt", "kms:GenerateDataKey", "kms:CreateGrant"}
    assert key <= actions("role")
    assert {"kms:CreateGrant", "kms:DescribeKey"} <= actions("user")
    assert len([action for action in actions("role") if action.startswith("ssmmessages:")]) == 4


# ------ one node, for real


@pytest.mark.slow
@pytest.mark.root
def test_a_job_that_pays_for_a_gpu_does_not_train_on_the_cpu(checkpoint, prepared, tmp_path):
    channels = {"train": prepared, "model": checkpoint}
    ml = sagemaker.make_ml(tmp_path / "ml", SMALL, channels, instance_type="ml.g5.2xlarge")
    code, out, err = sagemaker.end(sagemaker.start_node(ml))
    assert code == 1, out[-2000:]
    failure = (ml / "output" / "failure").read_text(encoding="utf-8")
    assert failure.startswith("ml.g5.2xlarge has 1 GPUs, CUDA does not start ("), failure
    assert failure in err
    assert not (ml / "checkpoints" / "metrics.jsonl").exists(), "not a step was trained"


@pytest.mark.slow
@pytest.mark.root
def test_a_job_that_is_stopped_and_then_reclaimed_saves_and_goes_on_to_a_finished_adapter(
    checkpoint, prepared, tmp_path
):
    channels = {"train": prepared, "model": checkpoint}
    ml = sagemaker.make_ml(tmp_path / "ml", SMALL | {"max_steps": 80}, channels)
    metrics = ml / "checkpoints" / "metrics.jsonl"
    node = sagemaker.start_node(ml)
    launch.wait_for(metrics.exists, node)
    sagemaker.process_1(node).send_signal(signal.SIGTERM)
    code, out, err = sagemaker.end(node, 120)
    assert code == 0, err[-3000:]
    assert "stopped by SIGTERM after step" in out
    assert not any((ml / "model").iterdir()), "nothing is called finished"

    # A spot instance: SageMaker takes exit code 0 for the end of the job, and starts no other.
    before = metrics.stat().st_size
    node = sagemaker.start_node(ml, LAUNCH_SPOT="true")
    launch.wait_for(lambda: metrics.stat().st_size > before, node)
    first = sagemaker.process_1(node)
    first.send_signal(signal.SIGTERM)
    launch.wait_for(lambda: not launch.ranks(first), node, 60)
    assert list((ml / "checkpoints" / "checkpoints").glob("step-*"))
    time.sleep(3)
    assert node.poll() is None, "ended by itself: exit code 0 would be Completed"
    first.kill()  # as SageMaker does
    code, out, err = sagemaker.end(node, 60)
    assert code != 0
    assert "stopped by SIGTERM after step" in out, err[-3000:]
    assert not any((ml / "model").iterdir())

    code, out, err = sagemaker.end(sagemaker.start_node(ml, LAUNCH_SPOT="true"))
    assert code == 0, err[-3000:]
    assert "entry: algo-1 is node 1 of 1" in out
    assert "resumed at step" in out
    assert "step=80 " in out
    kept = {path.name for path in (ml / "model").iterdir()}
    assert {"adapter", "train.json", "metrics.jsonl"} <= kept
    assert (ml / "model" / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert metrics.exists()
    assert not (ml / "output" / "failure").exists()


@pytest.mark.slow
@pytest.mark.root
def test_a_spot_job_whose_own_time_is_up_ends_at_once(checkpoint, prepared, tmp_path):
    channels = {"train": prepared, "model": checkpoint}
    options = SMALL | {"max_steps": 5000, "max_minutes": 0.1}
    ml = sagemaker.make_ml(tmp_path / "ml", options, channels)
    code, out, err = sagemaker.end(sagemaker.start_node(ml, LAUNCH_SPOT="true"), 100)
    assert code == 0, err[-3000:]
    assert "stopped by --max_minutes" in out
    assert "entry: the run is not finished" in out


@pytest.mark.slow
@pytest.mark.root
def test_an_evaluation_scores_the_adapter_of_a_training_jobs_archive(
    checkpoint, prepared, adapted, tmp_path
):
    adapted.save_pretrained(tmp_path / "adapter")
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "adapter", "adapter")
    channels = {"test": prepared, "model": checkpoint, "adapter": tmp_path / "model.tar.gz"}
    options = {"compare_base": "true", "panels": "false"}
    ml = sagemaker.make_ml(tmp_path / "ml", options, channels)
    node = sagemaker.start_node(ml, LAUNCH_SCRIPT="eval_wer.py", LAUNCH_STAGE="true")
    code, out, err = sagemaker.end(node)
    assert code == 0, err[-3000:]
    scores = json.loads((ml / "output" / "data" / "wer.json").read_text(encoding="utf-8"))
    assert {"base", "adapter"} <= scores.keys()
    assert "adapter: wer_raw=" in out
    assert "entry: copied" in out


@pytest.mark.slow
@pytest.mark.root
def test_a_preparation_leaves_the_whole_dataset_in_s3(checkpoint, tmp_path):
    clips = {"train": 7, "validation": 2, "test": 2}
    source = tiny.make_corpus(tmp_path / "source", clips=clips)
    ml = tmp_path / "ml"
    shutil.copytree(source.parent, ml / "processing" / "input" / "source")
    (ml / "input").mkdir()
    given = [
        "prepare", "--source", f"/opt/ml/processing/input/source/{source.name}", "--language", "mr",
        "--model", str(checkpoint), "--num_workers", "1", "--s3_uri", f"s3://{BUCKET}/prepared",
    ]  # fmt: skip
    with strict_aws() as aws:
        code, _, err = sagemaker.end(sagemaker.start_node(ml, *given))
        assert code == 0, err[-3000:]
        listed = aws.session.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="prepared/")
    folder = ml / "processing" / "prepared"
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {one["Key"].removeprefix("prepared/") for one in listed["Contents"]} == written
    assert {name: len(split) for name, split in load_prepared(str(folder))[0].items()} == clips


@pytest.mark.slow
@pytest.mark.root
def test_a_crash_has_an_exit_code_and_a_failure_text_and_the_token_is_nowhere(checkpoint, tmp_path):
    with strict_aws() as aws:
        client = aws.session.client("secretsmanager")
        client.create_secret(Name="hf", SecretString="hf_very_secret")
        options = {"nonsense" + "x" * 3000: "1"}
        ml = sagemaker.make_ml(tmp_path / "ml", options, {"train": checkpoint})
        node = sagemaker.start_node(ml, HF_TOKEN_FROM="secretsmanager:hf", AWS_REGION=REGION)
        code, out, err = sagemaker.end(node)
    assert code == 2
    assert "unknown option --nonsense" in err
    failure = (ml / "output" / "failure").read_bytes()
    assert failure.startswith(b"exit code 2: error: ")
    assert len(failure) < 1024
    assert not any((ml / "model").iterdir())
    written = b"".join(path.read_bytes() for path in ml.rglob("*") if path.is_file())
    assert "hf_very_secret" not in out + err
    assert b"hf_very_secret" not in written


@pytest.mark.slow
@pytest.mark.root
def test_the_toolkit_of_aws_base_images_starts_the_same_entry(checkpoint, prepared, tmp_path):
    toolkit = Path(sys.executable).with_name("train")
    program = tmp_path / "program"
    for name in ("common", "accelerate_configs", *ROOMS):
        shutil.copytree(launch.ROOT / name, program / name)
    for name in ("train_lora.py", "eval_wer.py"):
        shutil.copy(launch.ROOT / name, program)
    options = SMALL | {
        "sagemaker_program": "jobs/entry.py",
        "sagemaker_submit_directory": str(program),
    }
    ml = sagemaker.make_ml(tmp_path / "ml", options, {"train": prepared, "model": checkpoint})
    (ml / "hosts").write_text("127.0.0.1 localhost algo-1\n")  # the toolkit waits for the name
    path = f"{toolkit.parent}:{os.environ['PATH']}"
    node = sagemaker.start_node(ml, command=(str(toolkit),), PATH=path)
    code, out, err = sagemaker.end(node)
    assert code == 0, (out[-1500:], err[-3000:])
    assert (ml / "model" / "adapter" / "adapter_config.json").exists()
