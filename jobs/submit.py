"""Starting jobs: first what only AWS knows about role, buckets and data is checked."""

from collections.abc import Iterator
from typing import Any

from common import cli
from common.aws import client, explain_errors, split_uri
from common.cli import UserError
from jobs.report import name_of
from jobs.request import Job, Train, TrainingJob, channels, region_of


def start_jobs(job: Job, requests: list[dict[str, Any]], name: str) -> None:
    """Start a job for each request, after checks that would else fail in jobs that are paid for.

    Args:
        name: of the job, or of the sweep that all of them belong to.
    """
    region = region_of(job)
    role = find_role(job.role, region)
    s3 = client("s3", region)
    with explain_errors(f"--output_s3 {job.output_s3}"):
        s3.head_bucket(Bucket=split_uri(job.output_s3)[0])
    for option, uri, file in inputs(job):
        refuse_other_region(s3, option, uri, region)
        refuse_missing(s3, option, uri, file)
    if isinstance(job, Train) and job.checkpoint_s3:
        refuse_other_region(s3, "--checkpoint_s3", job.checkpoint_s3, region)
    sagemaker = client("sagemaker", region)
    create = sagemaker.create_processing_job
    if isinstance(job, TrainingJob):
        create = sagemaker.create_training_job
    started: list[str] = []
    for request in requests:
        try:
            with explain_errors(f"--name {job.name}"):
                create(**request | {"RoleArn": role})
        except UserError as error:
            if not started:
                raise
            raise UserError(
                f"{error}; {len(started)} of {len(requests)} jobs were started before and are "
                f"paid for: {', '.join(started)}: stop them with python sagemaker_launch.py stop "
                f"--job {name} --region {region}"
            ) from error
        started.append(name_of(request))
        print(f"started {started[-1]}", flush=True)


def find_role(role: str, region: str) -> str:
    """The ARN of a role that is given by ARN or name; it must be of the caller's account."""
    arn = role
    with explain_errors(f"--role {role}"):
        account = client("sts", region).get_caller_identity()["Account"]
        if not role.startswith("arn:"):
            arn = client("iam", region).get_role(RoleName=role)["Role"]["Arn"]
    message = (
        f"--role {role}: belongs to another account than your credentials, {account}: "
        "give a role of that account, or set AWS_PROFILE"
    )
    cli.refuse([(arn.split(":")[4] != account, message)])
    return arn


def inputs(job: Job) -> Iterator[tuple[str, str, str]]:
    """Option, place in S3, and a file that the place must hold, for each input of a job."""
    from common.prepared import RECORD_NAME  # imports pandas, which `status` does not need

    files = {"train": RECORD_NAME, "test": RECORD_NAME}
    files |= {"source": getattr(job, "source_file", ""), "audio": getattr(job, "audio_file", "")}
    for name, uri in channels(job).items():
        option = "--adapter_job" if name == "adapter" and job.adapter_job else f"--{name}_s3"
        yield option, uri, files.get(name, "")


def refuse_other_region(s3: Any, option: str, s3_uri: str, region: str) -> None:
    """Refuse a bucket of another region, if S3 names the bucket's region."""
    with explain_errors(f"{option} {s3_uri}"):
        response = s3.head_bucket(Bucket=split_uri(s3_uri)[0])["ResponseMetadata"]
    place = response["HTTPHeaders"].get("x-amz-bucket-region", region)
    message = (
        f"{option} {s3_uri}: the bucket is in {place}, and SageMaker reads only buckets of the "
        f"job's own region, {region}: copy the data, or push the image to {place}"
    )
    cli.refuse([(place != region, message)])


def refuse_missing(s3: Any, option: str, s3_uri: str, file: str) -> None:
    """Refuse a place that is empty or lacks `file`."""
    bucket, prefix = split_uri(s3_uri)
    key = prefix if prefix.endswith(".tar.gz") else f"{prefix}/{file}".lstrip("/")
    with explain_errors(f"{option} {s3_uri}"):
        listed = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    missing = f"has no {file}" if file else "is empty"
    cli.refuse([(not listed, f"{option} {s3_uri}: {missing}: give a complete dataset or model")])
