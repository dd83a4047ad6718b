"""Existing jobs: found by name, their records and logs, and waiting for their end."""

import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from common import cli
from common.aws import NOT_FOUND, client, explain_errors, split_uri
from common.cli import UserError
from jobs.report import RUNNING, fate, name_of, state_of, summarize

POLL_SECONDS = 5.0  # between two requests for log events
LATE_SECONDS = 30.0  # that a log event may take to appear after the end of its job
UNKNOWN_JOB = ("ValidationException", "ResourceNotFound", "ResourceNotFoundException")


def find_jobs(name: str, region: str) -> tuple[Any, list[dict[str, Any]]]:
    """A SageMaker client, and the descriptions of the job or of all jobs of the sweep `name`."""
    cli.refuse([(not name, "--job is empty: give the name that `train` printed")])
    sagemaker = client("sagemaker", region)
    with explain_errors(f"--job {name}"):
        job = describe(sagemaker, name)
        if job:
            return sagemaker, [job]
        pages = sagemaker.get_paginator("list_training_jobs").paginate(NameContains=name)
        names = [item["TrainingJobName"] for page in pages for item in page["TrainingJobSummaries"]]
        of_sweep = sorted(item for item in names if re.fullmatch(rf"{re.escape(name)}-\d+", item))
        jobs = [describe(sagemaker, item) for item in of_sweep]
    if not jobs:
        region = sagemaker.meta.region_name
        raise UserError(f"--job {name}: no such job in {region}: give the name, or --region")
    return sagemaker, jobs


def describe(sagemaker: Any, name: str) -> dict[str, Any] | None:
    """The training job or, if there is none of that name, the processing job; else `None`."""
    for kind in ("training", "processing"):
        call = getattr(sagemaker, f"describe_{kind}_job")
        try:
            return call(**{f"{kind.title()}JobName": name})
        except sagemaker.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in UNKNOWN_JOB:
                raise
    return None


# ------ what a training job has written


def _read_checkpoint_file(s3: Any, job: dict[str, Any], name: str) -> tuple[bytes, datetime] | None:
    """A file of a job's checkpoints in S3 and when it was written; `None` if there is none."""
    place = job.get("CheckpointConfig", {}).get("S3Uri", "")
    if not place:
        return None
    bucket, prefix = split_uri(place)
    with explain_errors(f"--job {name_of(job)}: {place}"):
        try:
            item = s3.get_object(Bucket=bucket, Key=f"{prefix}/{name}")
            return item["Body"].read(), item["LastModified"]
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in NOT_FOUND:
                return None
            raise


def is_finished(s3: Any, job: dict[str, Any]) -> bool | None:
    """Whether a completed training has written train.json; `None` for any other job.

    To SageMaker a run that stopped at its own time limit is as complete as a finished one.
    """
    if not job.get("CheckpointConfig") or state_of(job) != "Completed":
        return None
    file = _read_checkpoint_file(s3, job, "train.json")
    if file is None:
        return False
    started = job.get("CreationTime")  # an older file came with another job's --checkpoint_s3
    return started is None or file[1] >= started.replace(microsecond=0)


def read_records(s3: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, which SageMaker copies to S3 while the job writes it."""
    file = _read_checkpoint_file(s3, job, "metrics.jsonl")
    if file is None:
        return []
    lines = file[0].decode().split("\n")[:-1]  # an incomplete last line has no end
    return [json.loads(line) for line in lines]


# ------ logs


def show_logs(sagemaker: Any, job: dict[str, Any], *, follow: bool) -> None:
    """Print the log of all nodes of a job; with `follow`, until it ends."""
    name, tokens = name_of(job), {}
    group = f"/aws/sagemaker/{'Training' if 'TrainingJobName' in job else 'Processing'}Jobs"
    logs = client("logs", sagemaker.meta.region_name)
    end = None
    while True:
        with explain_errors(f"--job {name}"):
            events = sorted(new_events(logs, group, name, tokens))
            state = state_of(describe(sagemaker, name))
        for _, host, line in events:
            print(f"{host}: {line}", flush=True)
        if state not in RUNNING and end is None:
            end = time.monotonic()
        is_late = end is not None and time.monotonic() - end > LATE_SECONDS
        if not follow or (end is not None and (is_late or not events)):
            break
        time.sleep(POLL_SECONDS)
    if not tokens:
        print(f"{name} has printed nothing yet", file=sys.stderr)
    elif follow:
        print(f"{name}: {state}", file=sys.stderr)


def new_events(
    logs: Any, group: str, name: str, tokens: dict[str, str]
) -> Iterator[tuple[int, str, str]]:
    """Yield time, host and text of each log event of a job since the last call.

    Args:
        tokens: by log stream, where the next call continues; updated in place.
    """
    try:
        pages = logs.get_paginator("describe_log_streams").paginate(
            logGroupName=group, logStreamNamePrefix=f"{name}/"
        )
        streams = [item["logStreamName"] for page in pages for item in page["logStreams"]]
    except logs.exceptions.ResourceNotFoundException:
        return  # no job of this account has printed anything so far
    for stream in streams:
        host = stream.split("/")[-1].rsplit("-", 1)[0]  # JOB/algo-1-1700000000
        while True:
            start = {"nextToken": tokens[stream]} if stream in tokens else {}
            page = logs.get_log_events(
                logGroupName=group, logStreamName=stream, startFromHead=True, **start
            )
            for event in page["events"]:
                yield event["timestamp"], host, event["message"].rstrip("\n")
            if page["nextForwardToken"] == tokens.get(stream):
                break
            tokens[stream] = page["nextForwardToken"]


# ------ waiting


def wait(names: list[str], region: str) -> bool:
    """Follow jobs to their end, a single one with its log; returns whether all have finished."""
    sagemaker, s3, ended = client("sagemaker", region), client("s3", region), []
    if len(names) == 1:
        show_logs(sagemaker, _describe_existing(sagemaker, names[0]), follow=True)
    for name in names:
        while state_of(job := _describe_existing(sagemaker, name)) in RUNNING:
            time.sleep(POLL_SECONDS)
        report = summarize(job, [], region, finished=is_finished(s3, job))
        print(f"{name}: {fate(report)}", flush=True)
        ended.append(report)
    return all(report.state == "Completed" and report.finished is not False for report in ended)


def _describe_existing(sagemaker: Any, name: str) -> dict[str, Any]:
    with explain_errors(f"--job {name}"):
        job = describe(sagemaker, name)
    if job is None:
        raise UserError(f"--job {name}: does not exist any more")
    return job
