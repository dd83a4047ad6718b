"""What is known about a job: phase, curves, hours, cost, log lines; as data and as text."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jobs.instances import price

RUNNING = ("InProgress", "Stopping")
KEPT = ("Available", "InUse")  # instances that stay, or will, until their time is up
SHOWN_ROWS = 12  # of a curve
CURVE = ("step", "loss", "eval_loss", "wer_raw", "cer_raw", "clips_per_second")


@dataclass(frozen=True)
class Report:
    """One job."""

    name: str
    state: str  # InProgress, Completed, Failed, Stopping or Stopped
    phase: str  # of a job that runs: Starting, Downloading, Training, Uploading ...
    failure: str  # why it failed
    instances: str  # 2 x ml.g5.12xlarge
    options: dict[str, str]  # of the script, as sent
    records: list[dict[str, Any]]  # metrics.jsonl
    metrics: dict[str, float]  # newest values that SageMaker read out of the log
    seconds: float | None  # running time
    billable_seconds: float | None  # of each instance; of a job that runs, its running time
    cost: float | None  # USD, all instances; None where the price is not known
    saving: float | None  # share that spot saved
    is_spot: bool
    interruptions: int  # times that a spot instance was taken away
    finished: bool | None  # of a completed training, whether it was through; None: not known
    pool: str  # instances kept after the job: Available, Terminated, Reused, InUse
    pool_seconds: float  # of each that are billed
    pool_cost: float | None  # USD, all instances


def name_of(job: dict[str, Any]) -> str:
    return job.get("TrainingJobName") or job["ProcessingJobName"]


def state_of(job: dict[str, Any]) -> str:
    return job.get("TrainingJobStatus") or job["ProcessingJobStatus"]


def report(
    job: dict[str, Any],
    records: list[dict[str, Any]],
    region: str,
    *,
    finished: bool | None = None,
) -> Report:
    """Gather what the description of a job and its metrics.jsonl say."""
    cluster = job.get("ResourceConfig") or job.get("ProcessingResources", {}).get(
        "ClusterConfig", {}
    )
    kind, count = cluster.get("InstanceType", ""), cluster.get("InstanceCount", 1)
    seconds = job.get("TrainingTimeInSeconds")
    billable = job.get("BillableTimeInSeconds")
    started = job.get("TrainingStartTime") or job.get("ProcessingStartTime")
    if seconds is None and started:
        ended = job.get("TrainingEndTime") or job.get("ProcessingEndTime")
        ended = ended or datetime.datetime.now(datetime.UTC)
        seconds = (ended - started).total_seconds()
    is_spot = job.get("EnableManagedSpotTraining", False)
    saving = 1 - billable / seconds if is_spot and billable is not None and seconds else None
    billable = seconds if billable is None else billable
    found = price(kind, region)
    pool = job.get("WarmPoolStatus", {})
    kept = pool.get("ResourceRetainedBillableTimeInSeconds", 0)
    return Report(
        name=name_of(job),
        state=state_of(job),
        phase=job.get("SecondaryStatus", ""),
        failure=job.get("FailureReason", ""),
        instances=f"{count} x {kind}",
        options=job.get("HyperParameters", {}),
        records=records,
        metrics={one["MetricName"]: one["Value"] for one in job.get("FinalMetricDataList", [])},
        seconds=seconds,
        billable_seconds=billable,
        cost=None if found is None or billable is None else billable / 3600 * count * found[0],
        saving=saving,
        is_spot=is_spot,
        interruptions=sum(
            one["Status"] == "Interrupted" for one in job.get("SecondaryStatusTransitions", [])
        ),
        finished=finished,
        pool=pool.get("Status", ""),
        pool_seconds=kept,
        pool_cost=None if found is None else kept / 3600 * count * found[0],
    )


def fate(told: Report) -> str:
    """State in words; SageMaker's Completed says that the container ended well, no more."""
    if told.state == "Completed" and told.finished is False:
        return "Completed, not finished: start it again with --checkpoint_s3 of this job"
    return told.state


def newest(told: Report) -> dict[str, float]:
    """The newest value under every name."""
    values: dict[str, float] = {}
    for record in told.records:
        values |= record
    return values


def one(told: Report) -> str:
    """A job for people."""
    phase = f", {told.phase}" if told.phase not in ("", told.state) else ""
    lines = [f"{told.name}: {fate(told)}{phase}", f"instances  {told.instances}"]
    if told.failure:
        lines.append(f"failure    {told.failure}")
    if told.billable_seconds is not None:
        is_final = told.state not in RUNNING
        spot = " at most (spot)" if told.is_spot and told.saving is None else ""
        lines.append(
            f"time       {told.seconds:,.0f} s, billable {told.billable_seconds:,.0f} s an instance"
        )
        lines.append(f"cost       {_usd(told.cost)}{'' if is_final else ' so far'}{spot}")
    if told.interruptions:
        lines.append(f"spot       interrupted {told.interruptions} times")
    if told.saving is not None:
        lines.append(f"spot       saved {100 * told.saving:.0f} %")
    if told.pool and told.pool != "InUse":
        lines.append(
            f"kept       {told.pool}, billable {told.pool_seconds:,.0f} s an instance, "
            f"{_usd(told.pool_cost)} more"
        )
    if told.pool == "Available":
        lines.append("           python sagemaker_launch.py release ends it")
    if told.records:
        lines += ["", *curve(told.records)]
    elif told.metrics:
        lines += [f"{name:<26} {value:.5g}" for name, value in sorted(told.metrics.items())]
    return "\n".join(lines)


def curve(records: list[dict[str, Any]]) -> list[str]:
    """Losses and rates by step: evaluations all, log lines thinned out to SHOWN_ROWS."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    steps = sorted(by_step)
    every = max(1, len(steps) // SHOWN_ROWS)
    shown = [
        step
        for at, step in enumerate(steps)
        if at % every == 0 or step == steps[-1] or by_step[step].keys() - {"step"} >= {"eval_loss"}
    ]
    lines = ["".join(f"{name:>18}" for name in CURVE)]
    for step in shown:
        values = (by_step[step].get(name) for name in CURVE)
        lines.append("".join(f"{'' if one is None else f'{one:.5g}':>18}" for one in values))
    return lines


def several(reports: list[Report]) -> str:
    """Jobs of a sweep beside each other; of their options those that differ."""
    keys = sorted({key for told in reports for key in told.options})
    differing = [key for key in keys if len({told.options.get(key) for told in reports}) > 1]
    head = ["job", "state", *differing, "step", "loss", "eval_loss", "wer_raw", "cost"]
    rows = []
    for told in reports:
        values = newest(told)
        numbers = (values.get(name) for name in ("step", "loss", "eval_loss", "wer_raw"))
        rows.append(
            [
                told.name,
                fate(told).partition(":")[0],
                *(told.options.get(key, "default") for key in differing),
                *("" if one is None else f"{one:.5g}" for one in numbers),
                _usd(told.cost if told.cost is None else told.cost + (told.pool_cost or 0.0)),
            ]
        )
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"{cost:.2f} USD"


def new_events(
    client: Any, group: str, name: str, tokens: dict[str, str]
) -> Iterator[tuple[int, str, str]]:
    """Yield time, host and text of what a job's nodes have printed since the last call.

    Args:
        tokens: by log stream, where to go on; kept up to date here.
    """
    streams: list[str] = []
    try:
        pages = client.get_paginator("describe_log_streams").paginate(
            logGroupName=group, logStreamNamePrefix=f"{name}/"
        )
        streams = [one["logStreamName"] for page in pages for one in page["logStreams"]]
    except client.exceptions.ResourceNotFoundException:
        return  # no job of this account has printed anything so far
    for stream in streams:
        host = stream.split("/")[-1].rsplit("-", 1)[0]  # JOB/algo-1-1700000000
        while True:
            start = {"nextToken": tokens[stream]} if stream in tokens else {}
            page = client.get_log_events(
                logGroupName=group, logStreamName=stream, startFromHead=True, **start
            )
            for event in page["events"]:
                yield event["timestamp"], host, event["message"].rstrip("\n")
            if page["nextForwardToken"] == tokens.get(stream):
                break
            tokens[stream] = page["nextForwardToken"]
