"""Everything that is wrong with a job's options and its request, offline and all at once."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.aws import uri_problem
from jobs.aws_model import problems
from jobs.contract import PROCESSING
from jobs.fit import unfit
from jobs.instances import has_local_disk, num_gpus
from jobs.request import (
    Eval,
    Export,
    Job,
    Prepare,
    Train,
    TrainingJob,
    Transcribe,
    changed,
    max_wait,
    pairs,
    parse_request,
    processes,
    region_of,
)

CONFIGS = {
    path.stem for path in Path(__file__).parent.parent.joinpath("accelerate_configs").glob("*.yaml")
}
SHARDED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")  # engines that shard weights
MAX_RUN_SECONDS = 28 * 24 * 3600  # of a training job; AWS's model says it in words only
SET_BY_JOB = (  # variables that jobs/entry.py overwrites
    "HF_TOKEN_FROM", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "ACCELERATE_MIXED_PRECISION", "STOPPED_BY_FILE",
)  # fmt: skip
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY", re.IGNORECASE)
INPUTS = {  # what a job needs
    Train: "train_s3", Eval: "test_s3", Export: "test_s3", Prepare: "source_s3",
    Transcribe: "audio_s3",
}  # fmt: skip
PREFIXES = {  # of a script's options
    Train: "train", Eval: "eval", Export: "export", Prepare: "prepare", Transcribe: "transcribe",
}  # fmt: skip
OPTIONS = {  # member of a request -> the option it comes from
    "RoleArn": "--role",
    "TrainingJobName": "--name",
    "ProcessingJobName": "--name",
    "AlgorithmSpecification.TrainingImage": "--image_uri",
    "AppSpecification.ImageUri": "--image_uri",
    "AppSpecification.ContainerArguments": "--prepare, --transcribe",
    "ProcessingOutputConfig.Outputs.S3Output.S3Uri": "--output_s3",
    "ProcessingOutputConfig.KmsKeyId": "--kms_key",
    "OutputDataConfig.S3OutputPath": "--output_s3",
    "OutputDataConfig.KmsKeyId": "--kms_key",
    "Environment": "--environment",
    "Tags": "--tags",
    "Tags.Key": "--tags",
    "Tags.Value": "--tags",
    "VpcConfig.Subnets": "--subnets",
    "VpcConfig.SecurityGroupIds": "--security_groups",
    "NetworkConfig.VpcConfig.Subnets": "--subnets",
    "NetworkConfig.VpcConfig.SecurityGroupIds": "--security_groups",
    "StoppingCondition.MaxRuntimeInSeconds": "--max_run_seconds",
    "StoppingCondition.MaxWaitTimeInSeconds": "--max_wait_seconds",
    "CheckpointConfig.S3Uri": "--checkpoint_s3",
    "TensorBoardOutputConfig.S3OutputPath": "--tensorboard_s3",
    "RetryStrategy.MaximumRetryAttempts": "--max_retries",
    "EnableManagedSpotTraining": "--spot",
    "EnableNetworkIsolation": "--network_isolation",
    "NetworkConfig.EnableNetworkIsolation": "--network_isolation",
    "EnableInterContainerTrafficEncryption": "--encrypt_traffic",
    "NetworkConfig.EnableInterContainerTrafficEncryption": "--encrypt_traffic",
    "RemoteDebugConfig.EnableRemoteDebug": "--remote_debug",
    "HyperParameters": "--train.KEY, --eval.KEY, --export.KEY",
    "InputDataConfig.DataSource.S3DataSource.S3Uri": "--train_s3, --test_s3, --model_s3",
} | {
    f"{place}.{member}": option
    for place in ("ResourceConfig", "ProcessingResources.ClusterConfig")
    for member, option in (
        ("InstanceType", "--instance_type"),
        ("InstanceCount", "--instance_count"),
        ("VolumeSizeInGB", "--volume_gb"),
        ("VolumeKmsKeyId", "--kms_key"),
        ("KeepAlivePeriodInSeconds", "--keep_alive_seconds"),
    )
}


# ------ contradictions between options

Rule = tuple[bool, str]  # whether it is broken, and what to say then


def contradictions(job: Job, options: Any) -> Iterator[Rule]:
    """Rules that SageMaker or the container would apply only after the instances are paid.

    Args:
        options: of the script that the job runs.
    """
    yield from _general(job)
    yield from _names(job)
    for message in _replaced_options(job):
        yield True, message
    if isinstance(job, TrainingJob):
        yield from _spot(job)
        yield from _engine(job, options)
        yield from _script_options(job, options)
        yield from _instance(job, options)
        yield (
            job.network_isolation and not job.model_s3,
            "--network_isolation true: the Hub cannot be reached: give --model_s3",
        )
    if isinstance(job, Eval | Transcribe):
        yield (
            bool(job.adapter_job and job.adapter_s3),
            "--adapter_job and --adapter_s3 name two adapters: keep one",
        )
    if isinstance(job, Export):
        yield (
            job.instance_count > 1,
            f"--instance_count {job.instance_count}: a model is exported on one machine: give 1",
        )
    if isinstance(job, Transcribe):
        yield from _transcription(job, options)
    if isinstance(job, Prepare):
        yield from _preparation(job, options)


def _general(job: Job) -> Iterator[Rule]:
    for option in ("role", "image_uri", "output_s3"):
        yield not getattr(job, option), f"--{option} is empty: give it"
    data, added = INPUTS[type(job)], parse_request(job.request)
    has_input = getattr(job, data) or {"InputDataConfig", "ProcessingInputs"} & added.keys()
    yield not has_input, f"--{data} is empty: give it"
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name.endswith("_s3") and value:
            problem = uri_problem(value)
            yield bool(problem), f"--{field.name} {value}: {problem}"
    yield (
        job.dry_run and bool(job.role) and not job.role.startswith("arn:"),
        f"--role {job.role}: a name needs IAM to find its ARN: give the ARN for a dry run",
    )
    yield (
        bool(job.image_uri) and not region_of(job),
        f"--region is empty and --image_uri {job.image_uri} names none: give one: us-east-1",
    )
    image_region = region_of(dataclasses.replace(job, region=""))
    yield (
        bool(job.region and image_region) and job.region != image_region,
        f"--region {job.region}: the image is in {image_region}, and SageMaker only runs images of "
        f"its own region: push it to {job.region}",
    )
    for option in ("instance_count", "volume_gb", "max_run_seconds"):
        value = getattr(job, option)
        yield value < 1, f"--{option} {value}: give 1 or more"
    yield (
        job.max_run_seconds > MAX_RUN_SECONDS,
        f"--max_run_seconds {job.max_run_seconds}: give at most {MAX_RUN_SECONDS}, 28 days",
    )
    yield (
        bool(job.subnets) != bool(job.security_groups),
        "--subnets and --security_groups go together: give both, or neither",
    )
    yield (
        "alias/" in job.kms_key and not has_local_disk(job.instance_type),
        f"--kms_key {job.kms_key}: the disk of {job.instance_type} takes a key's id or ARN, no "
        f"alias: give what `aws kms describe-key --key-id {job.kms_key}` answers as Arn",
    )


def _names(job: Job) -> Iterator[Rule]:
    """Tags, variables and the token's place."""
    for key in pairs(job.tags, "--tags"):
        yield (
            key.lower().startswith("aws:"),
            f"--tags {key}: AWS reserves names that begin with aws: for itself: take another",
        )
    for name in pairs(job.environment, "--environment"):
        yield (
            name.startswith("LAUNCH_") or name in SET_BY_JOB,
            f"--environment {name}: is set by the job: leave it out",
        )
        yield (
            bool(SECRET_NAMES.search(name)),
            f"--environment {name}: everybody who may look at the job reads it: keep it in "
            "Secrets Manager and give --hf_token_from secretsmanager:NAME",
        )
    kind, _, place = job.hf_token_from.partition(":")
    yield (
        bool(job.hf_token_from) and (kind not in ("secretsmanager", "ssm") or not place),
        # The value is not shown: it may be the token itself.
        "--hf_token_from: write secretsmanager:NAME or ssm:NAME; the token itself stays out",
    )
    yield (
        job.network_isolation and bool(job.hf_token_from),
        f"--hf_token_from {kind}: cannot be read with --network_isolation true: leave one out",
    )


def _spot(job: TrainingJob) -> Iterator[Rule]:
    yield (
        job.spot and job.keep_alive_seconds > 0,
        f"--keep_alive_seconds {job.keep_alive_seconds}: spot instances cannot be kept: "
        "leave it out, or --spot false",
    )
    yield (
        job.spot and max_wait(job) < job.max_run_seconds,
        f"--max_wait_seconds {job.max_wait_seconds}: is less than --max_run_seconds "
        f"{job.max_run_seconds}, which it includes: give {job.max_run_seconds} or more",
    )
    yield (
        job.max_wait_seconds > 0 and not job.spot,
        f"--max_wait_seconds {job.max_wait_seconds}: only spot jobs wait: give --spot true",
    )


def _engine(job: TrainingJob, options: Any) -> Iterator[Rule]:
    config, count, gpus = job.accelerate_config, processes(job), num_gpus(job.instance_type)
    option = f"--accelerate_config {config}"
    yield (
        config not in CONFIGS | {"auto"},
        f"{option}: is not in accelerate_configs: give one of {', '.join(sorted(CONFIGS))}",
    )
    yield (
        config == "single_gpu" and (job.instance_count > 1 or (count or 1) > 1),
        f"{option}: is one process, and {job.instance_count} x {job.instance_type} would start "
        f"{count or 'several'}: give auto",
    )
    yield (
        config == "multi_gpu" and job.instance_count > 1,
        f"{option}: is for one node, --instance_count is {job.instance_count}: give multi_node",
    )
    yield (
        config == "cpu" and bool(gpus),
        f"{option}: would leave the GPUs of {job.instance_type} idle: give auto",
    )
    yield (
        config.startswith(("deepspeed", "fsdp")) and count == 1,
        f"{option}: shards among processes, and 1 x {job.instance_type} starts one: give "
        "auto, or more GPUs",
    )
    quantize = getattr(options, "quantize", "none")
    yield (
        config in SHARDED and quantize != "none",
        f"--train.quantize {quantize}: packed weights cannot be sharded, as {config} does: "
        "give --accelerate_config multi_gpu, multi_node or deepspeed_zero2",
    )
    yield (
        bool(gpus) and job.processes_per_host > (gpus or 0),
        f"--processes_per_host {job.processes_per_host}: {job.instance_type} has {gpus} GPUs: "
        "give at most as many, or leave it out",
    )
    yield (
        job.stage_to_local and job.input_mode == "File",
        "--stage_to_local true: File mode has copied the data already: leave it out",
    )


def _instance(job: TrainingJob, options: Any) -> Iterator[Rule]:
    """Whether the instance type can run the job; of what ZeRO-3 shards the memory is not known."""
    step = None
    if isinstance(job, Train) and "zero3" not in job.accelerate_config:
        step = options.memory_step("cuda")
    model = "" if job.model_s3 or isinstance(job, Export) else options.model
    problem = unfit(job.instance_type, model, step, getattr(options, "lora_rank", 0))
    yield problem is not None, str(problem)


def _script_options(job: TrainingJob, options: Any) -> Iterator[Rule]:
    """Options of the script that the job sets."""
    prefix, data = PREFIXES[type(job)], f"--{INPUTS[type(job)]}"
    instead = {"data_dir": data, "adapter": "--adapter_s3"}
    given = changed(options)
    yield from _set_by_job(
        given, prefix, ("data_dir", "output_dir", "cache_dir", "adapter"), instead
    )
    yield (
        "also" in given,
        f"--{prefix}.also {given.get('also')}: a job has the data of {data} alone: leave it out, "
        "and score the other folders in jobs of their own",
    )
    yield (
        "model" in given and bool(job.model_s3),
        f"--{prefix}.model {given.get('model')}: --model_s3 names another: keep one",
    )


def _set_by_job(
    given: dict[str, str], prefix: str, keys: Sequence[str], instead: dict[str, str]
) -> Iterator[Rule]:
    """Options of a script that only the job may set, and the job's own options for them."""
    for key in keys:
        remedy = f"give {instead[key]} instead" if key in instead else "leave it out"
        yield key in given, f"--{prefix}.{key} {given.get(key)}: is set by the job: {remedy}"


def _preparation(job: Prepare, options: Any) -> Iterator[Rule]:
    yield (
        job.instance_count > 1,
        f"--instance_count {job.instance_count}: a dataset is prepared on one machine: give 1, and "
        "an --instance_type with more cores: 32 prepare about 10,000 hours in about an hour",
    )
    yield (
        job.network_isolation,
        "--network_isolation true: preprocess.py copies the dataset to S3 itself: leave it out",
    )
    given = changed(options)
    yield from _set_by_job(given, "prepare", ("source", "output_dir", "s3_uri"), {})
    inside = f"{PROCESSING}/input/source/"  # all that the job can read
    yield (
        not given.get("exclude", inside).startswith(inside),
        f"--prepare.exclude {given.get('exclude')}: is not on the job's machine: put the file into "
        f"--source_s3, and give {inside}NAME",
    )


def _transcription(job: Transcribe, options: Any) -> Iterator[Rule]:
    yield (
        job.instance_count > 1,
        f"--instance_count {job.instance_count}: transcribe.py is one process: give 1, and start a "
        "job for each part of the recordings",
    )
    yield (
        job.network_isolation and not job.model_s3,
        "--network_isolation true: the Hub cannot be reached: give --model_s3",
    )
    given = changed(options)
    instead = {"audio": "--audio_s3", "adapter": "--adapter_s3"}
    keys = ("audio", "adapter", "output_dir", "manifest")
    yield from _set_by_job(given, "transcribe", keys, instead)
    yield (
        "model" in given and bool(job.model_s3),
        f"--transcribe.model {given.get('model')}: --model_s3 names another: keep one",
    )
    problem = unfit(job.instance_type, "" if job.model_s3 else options.model, None)
    yield problem is not None, str(problem)


def _replaced_options(job: Job) -> Iterator[str]:
    """Members of `--request` that have an option, which is checked and counted in the cost."""
    for path, value in _paths(parse_request(job.request)):
        for member, option in OPTIONS.items():
            if path == member or path.startswith(f"{member}."):
                yield f"--request {path}: has an option: give {option} instead"
            elif member.startswith(f"{path}.") and not isinstance(value, dict | list):
                yield f"--request {path}: would take away {member}, which has an option, {option}"
                break


def _paths(value: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Every path of a nested dictionary, `a.b.c`, and its value."""
    for key, item in value.items():
        yield f"{start}{key}", item
        if isinstance(item, dict):
            yield from _paths(item, f"{start}{key}.")


# ------ all of it


def all_problems(job: Job, options: Any, request: dict[str, Any]) -> list[str]:
    """Broken rules, then what AWS's own model refuses about options that they do not name."""
    broken = [message for is_broken, message in contradictions(job, options) if is_broken]
    is_training = isinstance(job, TrainingJob)
    operation = "CreateTrainingJob" if is_training else "CreateProcessingJob"
    names = OPTIONS | {
        f"HyperParameters.{key}": f"--{PREFIXES[type(job)]}.{key}"
        for key in request.get("HyperParameters", {})
    }
    names["InputDataConfig"] = f"--{INPUTS[type(job)]}"
    names |= {path: f"--request {path}" for path, _ in _paths(parse_request(job.request))}
    names |= {f"Environment.{key}": "--environment" for key in request.get("Environment", {})}
    named = {_option(message) for message in broken}
    refused = problems(operation, request, names)
    return broken + [message for message in refused if _option(message) not in named]


def _option(problem: str) -> str:
    """The option that a problem is about; of --request the member, too."""
    first, second, *_ = [*problem.split(), ""]
    return f"{first} {second.rstrip(':')}" if first == "--request" else first.rstrip(":")
