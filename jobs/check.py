"""Everything that is wrong with a job's options and its request, found offline and told at once.

Options may contradict each other. A request is held against botocore's own description of it:
botocore itself checks types and required members only; names, enumerations, patterns and limits are
in its model all the same, and SageMaker refuses what breaks them minutes later.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import regex  # the patterns use Java's \p{L}, which `re` lacks

from common.aws import uri_problem
from jobs.fit import unfit
from jobs.instances import has_local_disk, num_gpus
from jobs.request import (
    Eval,
    Job,
    Prepare,
    Train,
    TrainingJob,
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
SHARDED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")  # cut weights
MAX_RUN_SECONDS = 28 * 24 * 3600  # of a training job; AWS's model says it in words only
SET_BY_JOB = (  # variables that jobs/entry.py sets over what it finds
    "HF_TOKEN_FROM", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME",
    "ACCELERATE_MIXED_PRECISION", "STOPPED_BY_FILE",
)  # fmt: skip
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY", re.IGNORECASE)
TYPES = {
    "string": str, "boolean": bool, "integer": int, "long": int, "float": float, "double": float,
    "list": list, "map": dict, "structure": dict,
}  # fmt: skip
INPUTS = {Train: "train_s3", Eval: "test_s3", Prepare: "source_s3"}  # what a job cannot go without
OF_REQUEST = {  # member of a request -> the option it comes from
    "RoleArn": "--role",
    "TrainingJobName": "--name",
    "ProcessingJobName": "--name",
    "AlgorithmSpecification.TrainingImage": "--image_uri",
    "AppSpecification.ImageUri": "--image_uri",
    "AppSpecification.ContainerArguments": "--prepare",
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
    "HyperParameters": "--train.KEY, --eval.KEY",
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


# ------ what cannot be meant


def contradictions(job: Job, options: Any) -> list[str]:
    """Options that SageMaker, or the container, would refuse only after the instances are paid."""
    found = [*_general(job), *_added(job)]
    if isinstance(job, TrainingJob):
        found += [*_spot(job), *_engine(job, options), *_own_options(job, options)]
        found += filter(None, [unfit(job, options)])
        if job.network_isolation and not job.model_s3:
            found.append("--network_isolation true: the Hub cannot be reached: give --model_s3")
    if isinstance(job, Eval) and job.adapter_job and job.adapter_s3:
        found.append("--adapter_job and --adapter_s3 name two adapters: keep one")
    if isinstance(job, Prepare):
        if job.instance_count > 1:
            found.append(
                f"--instance_count {job.instance_count}: a dataset is prepared on one machine: "
                "give 1, and an --instance_type with more cores: 32 prepare about 10,000 hours in "
                "about an hour"
            )
        if job.network_isolation:
            found.append(
                "--network_isolation true: preprocess.py copies the dataset to S3 itself: "
                "leave it out"
            )
        given = changed(options)
        for key in ("source", "output_dir", "s3_uri"):
            if key in given:
                found.append(f"--prepare.{key} {given[key]}: is set by the job: leave it out")
    return found


def _added(job: Job) -> Iterator[str]:
    """What `--request` may not hold: what has an option, which is checked, priced and obeyed."""
    for path, value in _paths(parse_request(job.request)):
        for member, option in OF_REQUEST.items():
            if path == member or path.startswith(f"{member}."):
                yield f"--request {path}: has an option: give {option} instead"
            elif member.startswith(f"{path}.") and not isinstance(value, dict | list):
                yield f"--request {path}: would take away {member}, which has an option, {option}"
                break


def _paths(value: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Every path of a nested dictionary, `a.b.c`, and what it leads to."""
    for key, one in value.items():
        yield f"{start}{key}", one
        if isinstance(one, dict):
            yield from _paths(one, f"{start}{key}.")


def _general(job: Job) -> Iterator[str]:
    for option in ("role", "image_uri", "output_s3"):
        if not getattr(job, option):
            yield f"--{option} is empty: give it"
    own_input = {"InputDataConfig", "ProcessingInputs"} & parse_request(job.request).keys()
    if not getattr(job, INPUTS[type(job)]) and not own_input:
        yield f"--{INPUTS[type(job)]} is empty: give it"
    for field in dataclasses.fields(job):
        value = getattr(job, field.name)
        if field.name.endswith("_s3") and value and (problem := uri_problem(value)):
            yield f"--{field.name} {value}: {problem}"
    if job.dry_run and job.role and not job.role.startswith("arn:"):
        yield f"--role {job.role}: a name needs IAM to find its ARN: give the ARN for a dry run"
    if job.image_uri and not region_of(job):
        yield f"--region is empty and --image_uri {job.image_uri} names none: give one: us-east-1"
    image_region = region_of(dataclasses.replace(job, region=""))
    if job.region and image_region and job.region != image_region:
        yield (
            f"--region {job.region}: the image lies in {image_region}, and SageMaker takes images "
            f"of its own region only: push it to {job.region}"
        )
    for option in ("instance_count", "volume_gb", "max_run_seconds"):
        if getattr(job, option) < 1:
            yield f"--{option} {getattr(job, option)}: give 1 or more"
    if bool(job.subnets) != bool(job.security_groups):
        yield "--subnets and --security_groups go together: give both, or neither"
    if job.max_run_seconds > MAX_RUN_SECONDS:
        yield f"--max_run_seconds {job.max_run_seconds}: give at most {MAX_RUN_SECONDS}, 28 days"
    for key in pairs(job.tags, "--tags"):
        if key.lower().startswith("aws:"):
            yield f"--tags {key}: AWS keeps names that begin with aws: for itself: take another"
    if "alias/" in job.kms_key and not has_local_disk(job.instance_type):
        yield (
            f"--kms_key {job.kms_key}: the disk of {job.instance_type} takes a key's id or ARN, no "
            f"alias: give what `aws kms describe-key --key-id {job.kms_key}` answers as Arn"
        )
    if job.network_isolation and job.hf_token_from:
        yield (
            f"--hf_token_from {job.hf_token_from.partition(':')[0]}: cannot be read with "
            "--network_isolation true: leave one out"
        )
    for name in pairs(job.environment, "--environment"):
        if name.startswith("LAUNCH_") or name in SET_BY_JOB:
            yield f"--environment {name}: is set by the job: leave it out"
        if SECRET_NAMES.search(name):
            yield (
                f"--environment {name}: everybody who may look at the job reads it: keep it in "
                "Secrets Manager and give --hf_token_from secretsmanager:NAME"
            )
    kind, _, where = job.hf_token_from.partition(":")
    if job.hf_token_from and (kind not in ("secretsmanager", "ssm") or not where):
        yield (  # whatever stands there may be a token: it is not shown
            "--hf_token_from: write secretsmanager:NAME or ssm:NAME; the token itself stays out"
        )


def _spot(job: TrainingJob) -> Iterator[str]:
    if job.spot and job.keep_alive_seconds:
        yield (
            f"--keep_alive_seconds {job.keep_alive_seconds}: spot instances cannot be kept: "
            "leave it out, or --spot false"
        )
    if job.spot and max_wait(job) < job.max_run_seconds:
        yield (
            f"--max_wait_seconds {job.max_wait_seconds}: is less than --max_run_seconds "
            f"{job.max_run_seconds}, which it includes: give {job.max_run_seconds} or more"
        )
    if job.max_wait_seconds and not job.spot:
        yield f"--max_wait_seconds {job.max_wait_seconds}: only spot jobs wait: give --spot true"


def _engine(job: TrainingJob, options: Any) -> Iterator[str]:
    config, count, gpus = job.accelerate_config, processes(job), num_gpus(job.instance_type)
    told = f"--accelerate_config {config}"
    if config not in CONFIGS | {"auto"}:
        yield f"{told}: is not in accelerate_configs: give one of {', '.join(sorted(CONFIGS))}"
    if config == "single_gpu" and (job.instance_count > 1 or (count or 1) > 1):
        yield (
            f"{told}: is one process, and {job.instance_count} x {job.instance_type} would start "
            f"{count or 'several'}: give auto"
        )
    if config == "multi_gpu" and job.instance_count > 1:
        yield f"{told}: is for one node, --instance_count is {job.instance_count}: give multi_node"
    if config == "cpu" and gpus:
        yield f"{told}: would leave the GPUs of {job.instance_type} idle: give auto"
    if config.startswith(("deepspeed", "fsdp")) and count == 1:
        yield (
            f"{told}: shares out among processes, and 1 x {job.instance_type} starts one: give "
            "auto, or more GPUs"
        )
    if config in SHARDED and getattr(options, "quantize", "none") != "none":
        yield (
            f"--train.quantize {options.quantize}: packed weights cannot be cut, as {config} does: "
            "give --accelerate_config multi_gpu, multi_node or deepspeed_zero2"
        )
    if gpus and job.processes_per_host > gpus:
        yield (
            f"--processes_per_host {job.processes_per_host}: {job.instance_type} has {gpus} GPUs: "
            "give at most as many, or leave it out"
        )
    if job.stage_to_local and job.input_mode == "File":
        yield "--stage_to_local true: File mode has copied the data already: leave it out"


def _own_options(job: TrainingJob, options: Any) -> Iterator[str]:
    """Options of the script that the job sets."""
    prefix = "train" if isinstance(job, Train) else "eval"
    given = changed(options)
    for key in ("data_dir", "output_dir", "cache_dir", "adapter"):
        if key in given:
            channel = {"data_dir": f"--{'train' if prefix == 'train' else 'test'}_s3"}
            instead = channel.get(key, "--adapter_s3" if key == "adapter" else "nothing")
            yield f"--{prefix}.{key} {given[key]}: is set by the job: give {instead} instead"
    if "model" in given and job.model_s3:
        yield f"--{prefix}.model {given['model']}: --model_s3 names another: keep one"


def all_problems(job: Job, options: Any, request: dict[str, Any]) -> list[str]:
    """Contradictions, then what AWS's own model refuses and they have not named."""
    operation = "CreateProcessingJob" if isinstance(job, Prepare) else "CreateTrainingJob"
    found = contradictions(job, options)
    named = {_option(problem) for problem in found}
    prefix = {Train: "train", Eval: "eval"}.get(type(job), "")
    options_of = OF_REQUEST | {
        f"HyperParameters.{key}": f"--{prefix}.{key}" for key in request.get("HyperParameters", {})
    }
    options_of["InputDataConfig"] = f"--{INPUTS[type(job)]}"
    options_of |= {path: f"--request {path}" for path, _ in _paths(parse_request(job.request))}
    options_of |= {f"Environment.{key}": "--environment" for key in request.get("Environment", {})}
    found += [
        problem
        for problem in problems(operation, request, options_of)
        if _option(problem) not in named
    ]
    return found


def _option(problem: str) -> str:
    """The option that a problem is about; of --request the member, too."""
    first, second, *_ = [*problem.split(), ""]
    return f"{first} {second.rstrip(':')}" if first == "--request" else first.rstrip(":")


# ------ AWS's own model


@functools.cache
def _input_shape(operation: str) -> Any:
    import botocore.session

    model = botocore.session.get_session().get_service_model("sagemaker")
    return model.operation_model(operation).input_shape


def problems(
    operation: str, request: dict[str, Any], options: Mapping[str, str] | None = None
) -> list[str]:
    """Everything that breaks the model of `operation`; empty where nothing does.

    Args:
        options: path in the request (`ResourceConfig.InstanceType`) -> the option it comes from,
            which a problem is then named after.
    """
    return list(_walk(_input_shape(operation), request, "", options or {}))


def _walk(shape: Any, value: Any, path: str, options: Mapping[str, str]) -> Iterator[str]:
    name = options.get(path, path)
    expected = TYPES[shape.type_name]
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield f"{name}: a {type(value).__name__}, where AWS wants a {shape.type_name}"
        return
    yield from (f"{name} {problem}" for problem in _broken_limits(shape, value))
    below = f"{path}." if path else ""
    if shape.type_name == "structure":
        for missing in sorted(set(shape.required_members) - value.keys()):
            yield f"{options.get(below + missing, below + missing)}: is missing: give it"
        for key, one in value.items():
            if key not in shape.members:
                unknown = options.get(below + key, below + key)
                yield f"{unknown}: AWS knows no such member{_closest(key, shape.members)}"
            else:
                yield from _walk(shape.members[key], one, below + key, options)
    elif shape.type_name == "map":
        for key, one in value.items():
            yield from _walk(shape.key, key, f"{below}{key}", options)
            yield from _walk(shape.value, one, f"{below}{key}", options)
    elif shape.type_name == "list":
        for one in value:
            yield from _walk(shape.member, one, path, options)


def _broken_limits(shape: Any, value: Any) -> Iterator[str]:
    limits, shown = shape.metadata, str(value)[:60]
    if "enum" in limits and value not in limits["enum"]:
        yield f"{shown}: AWS knows no such value{_closest(value, limits['enum'])}"
    if "pattern" in limits and not regex.fullmatch(limits["pattern"], value):
        yield f"{shown!r}: does not match {limits['pattern']}"
    if shape.type_name in ("structure", "boolean"):
        return
    is_number = shape.type_name in ("integer", "long", "float", "double")
    size, unit = (value, "") if is_number else (len(value), _unit(shape.type_name))
    if "min" in limits and size < limits["min"]:
        yield f"{shown}: {size}{unit}, AWS wants at least {limits['min']}"
    if "max" in limits and size > limits["max"]:
        yield f"{shown}: {size}{unit}, AWS takes at most {limits['max']}"


def _unit(type_name: str) -> str:
    return " characters" if type_name == "string" else " entries"


def _closest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""
