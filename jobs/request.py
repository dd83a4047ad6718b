"""Options of a SageMaker job -> the request that starts it: pure functions, without network, clock
or credentials.

The container reads what is set here in jobs/entry.py.
"""

import dataclasses
import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from common.cli import UserError
from jobs.contract import CHECKPOINTS, PROCESSING, TRANSCRIPTS
from jobs.instances import has_local_disk, num_gpus

SPOT_SAVE_MINUTES = 10  # between checkpoints of a spot job, by default
WAIT_FACTOR = 2  # by default a spot job may wait for instances as long as it may run
NUMBER = r"(-?[0-9.]+(?:e[-+]?[0-9]+)?)"  # as train_lora.py writes it: 0.42, 1e-05
METRICS = {  # name in SageMaker -> name in a log line
    "train:loss": "loss",
    "train:learning_rate": "learning_rate",
    "train:grad_norm": "grad_norm",
    "train:clips_per_second": "clips_per_second",
    "train:audio_seconds_per_second": "audio_seconds_per_second",
    "validation:loss": "eval_loss",
    "validation:wer_raw": "wer_raw",
    "validation:cer_raw": "cer_raw",
    "validation:wer_keep_marks": "wer_keep_marks",
    "validation:cer_keep_marks": "cer_keep_marks",
}
SYSTEMS = ("base", "adapter")  # that eval_wer.py scores
RATES = ("wer_raw", "cer_raw", "wer_keep_marks", "cer_keep_marks")


# ------ options


@dataclass
class Job:
    """Options of all jobs."""

    role: str = ""  # execution role of the job: its ARN, or its name, which is looked up in IAM
    image_uri: str = ""  # container image, as printed by docker/build_and_push.sh
    output_s3: str = ""  # s3://BUCKET/PREFIX: results are written to PREFIX/JOB
    region: str = ""  # AWS region; empty: the one of --image_uri
    name: str = "whisper"  # first part of the job's name; date and time are appended
    instance_type: str = "ml.g5.2xlarge"  # instance type
    instance_count: int = 1  # number of instances; prepare takes one
    volume_gb: int = 200  # disk size in GB; ignored by instance types with their own disk
    max_run_seconds: int = 86400  # maximum run time in seconds
    environment: str = ""  # variables of the container: NAME=VALUE,NAME=VALUE; no secrets
    hf_token_from: str = ""  # source of the Hub's token: secretsmanager:NAME or ssm:NAME
    tags: str = ""  # tags of the job: NAME=VALUE,NAME=VALUE
    subnets: str = ""  # subnets of a VPC: subnet-1,subnet-2; needs --security_groups
    security_groups: str = ""  # security groups of a VPC: sg-1,sg-2; needs --subnets
    kms_key: str = ""  # KMS key that encrypts results, and disks if SageMaker allows it
    encrypt_traffic: bool = False  # encrypt the traffic between instances; slower
    network_isolation: bool = False  # no network access in the container; needs --model_s3
    request: str = ""  # JSON merged into the request, for members that have no option
    wait: bool = False  # wait until the job ends; exit code 1 unless it is finished
    dry_run: bool = False  # print the request and the maximum cost, start nothing


@dataclass
class TrainingJob(Job):
    """Options of jobs on GPUs: training and evaluation."""

    model_s3: str = ""  # folder of the base model, or a job's model.tar.gz; empty: the Hub
    input_mode: Literal["File", "FastFile"] = "File"  # FastFile streams the data from S3
    stage_to_local: bool = False  # with FastFile, copy the data to the instance's disk first
    accelerate_config: str = "auto"  # name of a file in accelerate_configs, without .yaml
    processes_per_host: int = 0  # processes per instance; 0: one per GPU
    spot: bool = False  # spot instances: cheaper, may be interrupted; saves every 10 minutes
    max_wait_seconds: int = 0  # --spot: maximum run plus waiting time; 0: twice --max_run_seconds
    keep_alive_seconds: int = 0  # seconds to keep the instances after the job ends or fails; billed
    max_retries: int = 0  # maximum number of restarts after an internal error of SageMaker
    remote_debug: bool = False  # allow a shell in the container through AWS Systems Manager


@dataclass
class Train(TrainingJob):
    """Train on SageMaker; --train.KEY VALUE for every option of train_lora.py."""

    train_s3: str = ""  # prepared dataset, as written by preprocess.py
    checkpoint_s3: str = ""  # checkpoints to resume from; empty: OUTPUT_S3/JOB/checkpoints
    tensorboard_s3: str = ""  # copy of the TensorBoard records for SageMaker's TensorBoard
    sweep: str = ""  # a job for each: "train.learning_rate=1e-3,5e-4;train.lora_rank=16,32"


@dataclass
class Eval(TrainingJob):
    """Score on SageMaker; --eval.KEY VALUE for every option of eval_wer.py."""

    test_s3: str = ""  # prepared dataset, as written by preprocess.py
    adapter_job: str = ""  # training job in the same --output_s3 whose adapter is scored
    adapter_s3: str = ""  # folder of the adapter, or a model.tar.gz; instead of --adapter_job


@dataclass
class Export(Eval):
    """Export on SageMaker; --export.KEY VALUE for every option of export.py."""

    instance_type: str = "ml.m5.4xlarge"  # instance type; exports are written and scored on CPUs


@dataclass
class Transcribe(Job):
    """Transcribe on SageMaker; --transcribe.KEY VALUE for every option of transcribe.py."""

    audio_s3: str = ""  # folder of recordings
    audio_file: str = ""  # manifest in --audio_s3; empty: all recordings in the folder
    model_s3: str = ""  # folder of the base model, or a job's model.tar.gz; empty: the Hub
    adapter_job: str = ""  # training job in the same --output_s3 whose adapter is used
    adapter_s3: str = ""  # folder of the adapter, or a model.tar.gz; instead of --adapter_job


@dataclass
class Prepare(Job):
    """Prepare on SageMaker; --prepare.KEY VALUE for every option of preprocess.py."""

    instance_type: str = "ml.m5.4xlarge"  # instance type; needs no GPU
    source_s3: str = ""  # folder with the clips and their table
    source_file: str = ""  # manifest in --source_s3; empty: the folder itself is the source


# ------ what options mean


def shown(value: Any) -> str:
    """A value as an error quotes it: its beginning, in one line."""
    return " ".join(str(value).split())[:60]


def pairs(text: str, option: str) -> dict[str, str]:
    """`NAME=VALUE,NAME=VALUE` as a dictionary."""
    values: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UserError(
                f"{option} {shown(text)}: {part!r} is not NAME=VALUE: write NAME=VALUE,..."
            )
        if name in values:
            raise UserError(f"{option} {shown(text)}: {shown(name)} is given twice: keep one")
        values[name] = value
    return values


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def region_of(job: Job) -> str:
    """The region of --region, or of the image: SageMaker requires both to be the same."""
    match = re.fullmatch(r"\d{12}\.dkr\.ecr\.([\w-]+)\.amazonaws\.com(\.cn)?/.*", job.image_uri)
    return job.region or (match[1] if match else "")


def role_arn(role: str) -> str:
    """The ARN of a role; of one that is given by name an example: only IAM knows its account."""
    return role if not role or role.startswith("arn:") else f"arn:aws:iam::{12 * '0'}:role/{role}"


def processes(job: TrainingJob) -> int | None:
    """Number of processes of the whole job; `None`: unknown instance type."""
    gpus = num_gpus(job.instance_type)
    per_host = job.processes_per_host or (None if gpus is None else max(gpus, 1))
    return None if per_host is None else per_host * job.instance_count


def max_wait(job: TrainingJob) -> int:
    """Seconds that a spot job may run and wait for instances, together."""
    return job.max_wait_seconds or WAIT_FACTOR * job.max_run_seconds


def spelled(value: Any) -> str:
    """An option's value as on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed(options: Any) -> dict[str, str]:
    """The options of a script that differ from their default."""
    default = type(options)()
    return {
        field.name: spelled(value)
        for field in dataclasses.fields(options)
        if (value := getattr(options, field.name)) != getattr(default, field.name)
    }


def sweep(text: str, prefix: str) -> list[dict[str, str]]:
    """All combinations of `train.KEY=A,B;train.KEY=C,D`; of an empty text a single empty one.

    >>> sweep("train.lora_rank=8,16;train.seed=1", "train")
    [{'lora_rank': '8', 'seed': '1'}, {'lora_rank': '16', 'seed': '1'}]
    """
    choices = []
    for part in filter(None, text.split(";")):
        name, equals, values = part.strip().partition("=")
        if not name.startswith(f"{prefix}.") or not equals or not all(values.split(",")):
            raise UserError(
                f"--sweep {shown(text)}: {part!r} is not {prefix}.KEY=VALUE,VALUE: write "
                f'"{prefix}.KEY=A,B;{prefix}.KEY=C,D"'
            )
        choices.append([(name[len(prefix) + 1 :], value) for value in values.split(",")])
    keys = [options[0][0] for options in choices]
    if len(keys) != len(set(keys)):
        raise UserError(f"--sweep {shown(text)}: an option is given twice: keep one")
    return [dict(combination) for combination in itertools.product(*choices)]


def metric_definitions(job: TrainingJob) -> list[dict[str, str]]:
    """Metrics that SageMaker extracts from the log of train_lora.py or eval_wer.py."""
    if isinstance(job, Export):
        return []
    if isinstance(job, Eval):
        return [
            {"Name": f"{system}:{rate}", "Regex": rf"{system}: .*\b{rate}={NUMBER}"}
            for system in SYSTEMS
            for rate in RATES
        ]
    return [{"Name": name, "Regex": rf"step=.*\b{key}={NUMBER}"} for name, key in METRICS.items()]


# ------ requests


def parse_request(text: str) -> dict[str, Any]:
    """The members that `--request` adds."""
    try:
        added = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(
            f"--request {shown(text)}: is not JSON ({error}): write '{{...}}'"
        ) from error
    if not isinstance(added, dict):
        raise UserError(
            f"--request {shown(text)}: is not a JSON object: write '{{\"MEMBER\": ...}}'"
        )
    return added


def merged(request: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """JSON Merge Patch (RFC 7386): objects are merged, null removes, all else replaces.

    >>> merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"b": None, "e": 3}, "d": [2]})
    {'a': {'c': 2, 'e': 3}, 'd': [2]}
    """
    result = dict(request)
    for key, value in added.items():
        if isinstance(value, dict):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, dict) else {}, value)
        elif value is None:
            result.pop(key, None)
        else:
            result[key] = value
    return result


def build_request(job: Train | Eval, options: Any, name: str) -> dict[str, Any]:
    """The CreateTrainingJob request.

    Args:
        options: of train_lora.py or eval_wer.py; those that differ from their default are sent.
        name: of the job.
    """
    resources = _instances(job)
    if job.keep_alive_seconds:
        resources["KeepAlivePeriodInSeconds"] = job.keep_alive_seconds
    stopping = {"MaxRuntimeInSeconds": job.max_run_seconds}
    if job.spot:
        stopping["MaxWaitTimeInSeconds"] = max_wait(job)
    request = {
        "TrainingJobName": name,
        "RoleArn": job.role,
        "AlgorithmSpecification": {
            "TrainingImage": job.image_uri,
            "TrainingInputMode": job.input_mode,
            "MetricDefinitions": metric_definitions(job),
            "EnableSageMakerMetricsTimeSeries": True,
        },
        "HyperParameters": _hyperparameters(job, options),
        "InputDataConfig": [
            _channel(channel, uri, job.input_mode if channel in ("train", "test") else "File")
            for channel, uri in channels(job).items()
        ],
        "OutputDataConfig": {"S3OutputPath": job.output_s3}
        | ({"KmsKeyId": job.kms_key} if job.kms_key else {}),
        "ResourceConfig": resources,
        "StoppingCondition": stopping,
        "EnableManagedSpotTraining": job.spot,
        "EnableNetworkIsolation": job.network_isolation,
        "EnableInterContainerTrafficEncryption": job.encrypt_traffic,
        "Environment": _environment(job) | _launch_variables(job),
        "Tags": _tags(job),
        "ProfilerConfig": {"DisableProfiler": True},
    } | _vpc(job)
    if isinstance(job, Train):
        request |= _checkpoints(job, name)
    if job.max_retries:
        request["RetryStrategy"] = {"MaximumRetryAttempts": job.max_retries}
    if job.remote_debug:
        request["RemoteDebugConfig"] = {"EnableRemoteDebug": True}
    return request


SCRIPTS = {Train: "train_lora.py", Eval: "eval_wer.py", Export: "export.py"}


def _launch_variables(job: Train | Eval) -> dict[str, str]:
    """What the job tells jobs/entry.py."""
    variables = {
        "LAUNCH_SCRIPT": SCRIPTS[type(job)],
        "LAUNCH_CONFIG": "" if job.accelerate_config == "auto" else job.accelerate_config,
        "LAUNCH_PROCESSES_PER_HOST": str(
            1 if isinstance(job, Export) else job.processes_per_host or ""
        ),
        "LAUNCH_STAGE": "true" if job.stage_to_local else "",
        "LAUNCH_SPOT": "true" if job.spot else "",
    }
    return {name: value for name, value in variables.items() if value}


def _checkpoints(job: Train, name: str) -> dict[str, Any]:
    """Where a training job's checkpoints and TensorBoard records are copied to."""
    checkpoint_s3 = job.checkpoint_s3 or f"{job.output_s3.rstrip('/')}/{name}/checkpoints"
    members = {"CheckpointConfig": {"S3Uri": _folder(checkpoint_s3), "LocalPath": str(CHECKPOINTS)}}
    if job.tensorboard_s3:
        members["TensorBoardOutputConfig"] = {
            "LocalPath": str(CHECKPOINTS / "tensorboard"),
            "S3OutputPath": job.tensorboard_s3,
        }
    return members


def _instances(job: Job) -> dict[str, Any]:
    """Instances and their disks."""
    members = {
        "InstanceType": job.instance_type,
        "InstanceCount": job.instance_count,
        "VolumeSizeInGB": job.volume_gb,
    }
    if job.kms_key and not has_local_disk(job.instance_type):
        members["VolumeKmsKeyId"] = job.kms_key
    return members


def build_processing_request(job: Prepare | Transcribe, options: Any, name: str) -> dict[str, Any]:
    """The CreateProcessingJob request; results are written to OUTPUT_S3/JOB.

    preprocess.py copies the dataset there itself, transcripts are copied by SageMaker as they are
    written.
    """
    inputs = {channel: f"{PROCESSING}/input/{channel}" for channel in channels(job)}
    if isinstance(job, Prepare):
        command, file = "prepare", job.source_file
        arguments = {"source": inputs["source"], "s3_uri": results_s3(job, name)}
    else:
        command, file, arguments = "transcribe", job.audio_file, {"audio": inputs["audio"]}
    data = next(iter(arguments))
    if file:
        arguments[data] += f"/{file}"
    arguments |= changed(options)
    network = {
        "EnableInterContainerTrafficEncryption": job.encrypt_traffic,
        "EnableNetworkIsolation": job.network_isolation,
    } | _vpc(job)
    return {
        "ProcessingJobName": name,
        "RoleArn": job.role,
        "AppSpecification": {
            "ImageUri": job.image_uri,
            "ContainerArguments": [
                command,
                *(word for key, value in arguments.items() for word in (f"--{key}", value)),
            ],
        },
        "ProcessingInputs": [
            {
                "InputName": channel,
                "S3Input": {
                    "S3Uri": _folder(uri),
                    "LocalPath": inputs[channel],
                    "S3DataType": "S3Prefix",
                    "S3InputMode": "File",
                    "S3DataDistributionType": "FullyReplicated",
                },
            }
            for channel, uri in channels(job).items()
        ],
        "ProcessingResources": {"ClusterConfig": _instances(job)},
        "StoppingCondition": {"MaxRuntimeInSeconds": job.max_run_seconds},
        "NetworkConfig": network,
        "Environment": _environment(job),
        "Tags": _tags(job),
    } | ({} if isinstance(job, Prepare) else _transcripts(job, name))


def _transcripts(job: Transcribe, name: str) -> dict[str, Any]:
    """Where a processing job's transcripts are copied to."""
    output = {
        "OutputName": "transcripts",
        "S3Output": {
            "S3Uri": results_s3(job, name),
            "LocalPath": str(TRANSCRIPTS),
            "S3UploadMode": "Continuous",
        },
    }
    key = {"KmsKeyId": job.kms_key} if job.kms_key else {}
    return {"ProcessingOutputConfig": {"Outputs": [output]} | key}


def _hyperparameters(job: Train | Eval, options: Any) -> dict[str, str]:
    """Changed options; a spot job also saves every few minutes, to lose no more than that."""
    saves = isinstance(job, Train) and job.spot
    return ({"save_every_minutes": str(SPOT_SAVE_MINUTES)} if saves else {}) | changed(options)


def results_s3(job: Prepare | Transcribe, name: str) -> str:
    """Where the results of a processing job are written."""
    return f"{job.output_s3.rstrip('/')}/{name}"


def channels(job: Job) -> dict[str, str]:
    """Input channels: name -> place in S3."""
    if isinstance(job, Prepare):
        return {"source": job.source_s3}
    if isinstance(job, Train):
        given = {"train": job.train_s3}
    else:
        data = {"audio": job.audio_s3} if isinstance(job, Transcribe) else {"test": job.test_s3}
        given = data | {"adapter": adapter_s3(job)}
    return {name: uri for name, uri in (given | {"model": job.model_s3}).items() if uri}


def adapter_s3(job: Eval | Transcribe) -> str:
    """The place in S3 of the adapter of a job; empty: none."""
    if job.adapter_job:
        return f"{job.output_s3.rstrip('/')}/{job.adapter_job}/output/model.tar.gz"
    return job.adapter_s3


def _folder(s3_uri: str) -> str:
    """A prefix with a final slash; without, `s3://b/prepared` also matches `s3://b/prepared-old`."""
    return s3_uri if s3_uri.endswith(".tar.gz") else f"{s3_uri.rstrip('/')}/"


def _channel(name: str, s3_uri: str, input_mode: str) -> dict[str, Any]:
    """A channel that is copied whole to every node: train_lora.py distributes the clips."""
    source = {
        "S3DataType": "S3Prefix",
        "S3Uri": _folder(s3_uri),
        "S3DataDistributionType": "FullyReplicated",
    }
    return {
        "ChannelName": name,
        "InputMode": input_mode,
        "DataSource": {"S3DataSource": source},
    }


def _environment(job: Job) -> dict[str, str]:
    token = {"HF_TOKEN_FROM": job.hf_token_from} if job.hf_token_from else {}
    return pairs(job.environment, "--environment") | token


def _tags(job: Job) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in pairs(job.tags, "--tags").items()]


def _vpc(job: Job) -> dict[str, Any]:
    if not job.subnets:
        return {}
    groups = words(job.security_groups)
    return {"VpcConfig": {"Subnets": words(job.subnets), "SecurityGroupIds": groups}}


def ceiling_hours(job: Job) -> float:
    """Maximum billable instance hours of a job, including those of kept instances."""
    warm = job.keep_alive_seconds if isinstance(job, TrainingJob) else 0
    return math.fsum((job.max_run_seconds, warm)) / 3600 * job.instance_count
