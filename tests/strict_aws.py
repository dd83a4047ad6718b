"""AWS on 127.0.0.1: moto's server, made to refuse what SageMaker refuses.

moto takes any request for a job, calls it completed at once, forgets most of it and cannot stop it.
Here a request is held against botocore's model and SageMaker's rules across members, the role and
the data must be there, a job stays as it was last set, and it answers what it was asked.
"""

import datetime
import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import boto3
import pytest
from botocore.loaders import create_loader
from moto.core.responses import ActionResult
from moto.sagemaker.exceptions import AWSValidationException, SagemakerClientError
from moto.sagemaker.responses import SageMakerResponse
from moto.server import ThreadedMotoServer

from jobs import aws_model

ACCOUNT, REGION, BUCKET, ROLE = "123456789012", "us-east-1", "example-bucket", "whisper-training"
ROLE_ARN = f"arn:aws:iam::{ACCOUNT}:role/{ROLE}"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/whisper-lora:latest"
shared_loader = functools.cache(create_loader)  # else each session reads SageMaker's model anew


class QuotaError(SagemakerClientError):
    """A quota is used up."""

    code = "ResourceLimitExceeded"


@dataclass
class Aws:
    """What a test may look at and change."""

    session: boto3.Session
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)  # as Describe answers them
    quota: int = 100  # instances that may run at once

    def set(self, name: str, **members: Any) -> None:
        """Let time pass: the job is now so."""
        self.jobs[name] |= members

    def end(self, name: str, state: str, **members: Any) -> None:
        """The job ends; instances are kept, and billed, whatever its fate."""
        self.set(name, TrainingJobStatus=state, SecondaryStatus=state, **members)
        if self.jobs[name]["ResourceConfig"].get("KeepAlivePeriodInSeconds"):
            pool = {"Status": "Available", "ResourceRetainedBillableTimeInSeconds": 0}
            self.set(name, WarmPoolStatus=pool)

    def put(self, key: str, text: str | bytes = "x") -> None:
        """An object in the bucket."""
        self.session.client("s3").put_object(Bucket=BUCKET, Key=key, Body=text)

    def say(self, group: str, stream: str, *lines: str, at: int = 1) -> None:
        """Log lines of a node, one a millisecond from `at` seconds ago."""
        client = self.session.client("logs")
        for make, names in (
            (client.create_log_group, {"logGroupName": group}),
            (client.create_log_stream, {"logGroupName": group, "logStreamName": stream}),
        ):
            try:
                make(**names)
            except client.exceptions.ResourceAlreadyExistsException:
                continue
        now = int(datetime.datetime.now(datetime.UTC).timestamp() * 1000) - 1000 * at
        client.put_log_events(
            logGroupName=group,
            logStreamName=stream,
            logEvents=[{"timestamp": now + i, "message": line} for i, line in enumerate(lines)],
        )


def refusals(aws: Aws, operation: str, request: dict[str, Any]) -> list[str]:
    """Why SageMaker would not take a request: its model, and the rules its documentation names."""
    found = aws_model.problems(operation, request)
    if found:
        return found
    name = request.get("TrainingJobName") or request["ProcessingJobName"]
    if name in aws.jobs:
        found.append(f"Job name must be unique: {name}")
    client = aws.session.client("iam")
    try:
        client.get_role(RoleName=request["RoleArn"].split("/")[-1])
    except client.exceptions.NoSuchEntityException:
        found.append(f"Could not assume role {request['RoleArn']}")
    places = [
        one["DataSource"]["S3DataSource"]["S3Uri"] for one in request.get("InputDataConfig", [])
    ]
    places += [one["S3Input"]["S3Uri"] for one in request.get("ProcessingInputs", [])]
    for place in places:
        parts = urlsplit(place)
        s3 = aws.session.client("s3")
        if "//" in parts.path:
            found.append(f"{place!r} has an illegal char sub-sequence '//'")
        listed = s3.list_objects_v2(Bucket=parts.netloc, Prefix=parts.path[1:])
        if not listed["KeyCount"]:
            found.append(f"No S3 objects found under S3 URL {place!r}")
        headers = s3.head_bucket(Bucket=parts.netloc)["ResponseMetadata"]["HTTPHeaders"]
        if headers["x-amz-bucket-region"] != REGION:
            found.append(f"The bucket of {place!r} is not in {REGION}")
    cluster = request.get("ResourceConfig") or request["ProcessingResources"]["ClusterConfig"]
    if "alias/" in cluster.get("VolumeKmsKeyId", ""):
        found.append("VolumeKmsKeyId must be the id or the ARN of a key")
    if operation == "CreateTrainingJob":
        spot, stopping = request.get("EnableManagedSpotTraining"), request["StoppingCondition"]
        if spot and request["ResourceConfig"].get("KeepAlivePeriodInSeconds"):
            found.append("KeepAlivePeriodInSeconds is not supported with managed spot training")
        if spot and stopping.get("MaxWaitTimeInSeconds", 0) < stopping["MaxRuntimeInSeconds"]:
            found.append("MaxWaitTimeInSeconds must be at least MaxRuntimeInSeconds")
        if not spot and "MaxWaitTimeInSeconds" in stopping:
            found.append("MaxWaitTimeInSeconds is for managed spot training only")
    return found


def _patches(aws: Aws) -> dict[str, Any]:
    """Methods of moto's SageMaker that are replaced or added."""

    def create(operation: str, kind: str) -> Any:
        def answer(self: SageMakerResponse) -> ActionResult:
            request = json.loads(self.body)
            found = refusals(aws, operation, request)
            if found:
                raise AWSValidationException("; ".join(found))
            states = [job.get(f"{kind}JobStatus") for job in aws.jobs.values()]
            if states.count("InProgress") >= aws.quota:
                raise QuotaError(f"The account-level service limit is {aws.quota}")
            name = request[f"{kind}JobName"]
            now = datetime.datetime.now(datetime.UTC)
            arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{kind.lower()}-job/{name}"
            aws.jobs[name] = request | {
                f"{kind}JobArn": arn,
                f"{kind}JobStatus": "InProgress",
                "CreationTime": now,
                "LastModifiedTime": now,
            }
            if kind == "Training":
                aws.jobs[name] |= {
                    "SecondaryStatus": "Starting",
                    "ModelArtifacts": {
                        "S3ModelArtifacts": f"{request['OutputDataConfig']['S3OutputPath']}/{name}"
                        "/output/model.tar.gz"
                    },
                }
            return ActionResult({f"{kind}JobArn": arn})

        return answer

    def known(self: SageMakerResponse, kind: str) -> dict[str, Any]:
        name = json.loads(self.body)[f"{kind}JobName"]
        if f"{kind}JobStatus" not in aws.jobs.get(name, {}):
            raise AWSValidationException("Requested resource not found.")
        return aws.jobs[name]

    def stop(self: SageMakerResponse, kind: str) -> ActionResult:
        job = known(self, kind)
        if job[f"{kind}JobStatus"] != "InProgress":
            raise AWSValidationException("The request was rejected: the job has ended")
        job[f"{kind}JobStatus"] = "Stopping"
        return ActionResult({})

    def update_training(self: SageMakerResponse) -> ActionResult:
        asked, job = json.loads(self.body), known(self, "Training")
        found = aws_model.problems("UpdateTrainingJob", asked)
        if job.get("WarmPoolStatus", {}).get("Status") not in ("Available", "InUse"):
            found.append("The request was rejected: no instances are kept")
        if found:
            raise AWSValidationException("; ".join(found))
        if asked["ResourceConfig"]["KeepAlivePeriodInSeconds"] == 0:
            job["WarmPoolStatus"]["Status"] = "Terminated"
        return ActionResult({"TrainingJobArn": job["TrainingJobArn"]})

    def list_training(self: SageMakerResponse) -> ActionResult:
        asked = json.loads(self.body)
        kept = [one for name, one in aws.jobs.items() if asked.get("NameContains", "") in name]
        first = int(asked.get("NextToken", 0))
        page = {"TrainingJobSummaries": kept[first : first + 2]}  # two a page
        return ActionResult(page | ({"NextToken": str(first + 2)} if kept[first + 2 :] else {}))

    return {
        "create_training_job": create("CreateTrainingJob", "Training"),
        "create_processing_job": create("CreateProcessingJob", "Processing"),
        "describe_training_job": lambda self: ActionResult(known(self, "Training")),
        "describe_processing_job": lambda self: ActionResult(known(self, "Processing")),
        "stop_training_job": lambda self: stop(self, "Training"),
        "stop_processing_job": lambda self: stop(self, "Processing"),
        "list_training_jobs": list_training,
        "update_training_job": update_training,
    }


@contextmanager
def strict_aws() -> Iterator[Aws]:
    """Start the server, point this process at it, and make a bucket and a role."""
    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setattr("botocore.session.create_loader", shared_loader)
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        aws = Aws(boto3.Session(region_name=REGION))
        for name, method in _patches(aws).items():
            patch.setattr(SageMakerResponse, name, method, raising=False)
        aws.session.client("s3").create_bucket(Bucket=BUCKET)
        aws.session.client("iam").create_role(RoleName=ROLE, AssumeRolePolicyDocument="{}")
        try:
            yield aws
        finally:
            server.stop()
