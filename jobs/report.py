"""What is known about a job: phase, curves, hours, cost; as data and as text."""

import datetime
from dataclasses import dataclass
from typing import Any

from jobs.instances import price
from jobs.request import Job, ceiling_hours, region_of

RUNNING = ("InProgress", "Stopping")
KEPT = ("Available", "InUse")  # states of instances that are kept now, or will be
SHOWN_ROWS = 12  # of a curve, evaluations not counted
CURVE = ("step", "loss", "eval_loss", "wer_raw", "cer_raw", "clips_per_second")


@dataclass(frozen=True)
class Report:
    """One job."""

    name: str
    state: str  # InProgress, Completed, Failed, Stopping or Stopped
    phase: str  # of a running job: Starting, Downloading, Training, Uploading ...
    failure: str  # why it failed
    instances: str  # 2 x ml.g5.12xlarge
    options: dict[str, str]  # of the script, as sent
    records: list[dict[str, Any]]  # metrics.jsonl
    metrics: dict[str, float]  # newest values that SageMaker read in the log
    seconds: float | None  # running time
    billable_seconds: float | None  # of each instance; of a running job, its running time
    cost: float | None  # USD, all instances; None: unknown price
    saving: float | None  # share of the on-demand price that spot saved
    is_spot: bool
    interruptions: int  # times that a spot instance was taken away
    finished: bool | None  # of a completed training: whether it reached its last step
    pool: str  # state of instances kept after the job: Available, Terminated, Reused, InUse
    pool_seconds: float  # billed for each of them
    pool_cost: float | None  # USD, all instances


def name_of(job: dict[str, Any]) -> str:
    return job.get("TrainingJobName") or job["ProcessingJobName"]


def state_of(job: dict[str, Any]) -> str:
    return job.get("TrainingJobStatus") or job["ProcessingJobStatus"]


def summarize(
    job: dict[str, Any],
    records: list[dict[str, Any]],
    region: str,
    *,
    finished: bool | None = None,
) -> Report:
    """Report on a job from its description and the records of its metrics.jsonl."""
    cluster = job.get("ResourceConfig") or job.get("ProcessingResources", {}).get(
        "ClusterConfig", {}
    )
    instance_type, count = cluster.get("InstanceType", ""), cluster.get("InstanceCount", 1)
    is_spot, seconds = job.get("EnableManagedSpotTraining", False), running_seconds(job)
    billable = job.get("BillableTimeInSeconds")
    saving = 1 - billable / seconds if is_spot and billable is not None and seconds else None
    billable = seconds if billable is None else billable
    pool = job.get("WarmPoolStatus", {})
    kept = pool.get("ResourceRetainedBillableTimeInSeconds", 0)
    usd, _ = price(instance_type, region) or (None, "")
    return Report(
        name=name_of(job),
        state=state_of(job),
        phase=job.get("SecondaryStatus", ""),
        failure=job.get("FailureReason", ""),
        instances=f"{count} x {instance_type}",
        options=job.get("HyperParameters", {}),
        records=records,
        metrics={item["MetricName"]: item["Value"] for item in job.get("FinalMetricDataList", [])},
        seconds=seconds,
        billable_seconds=billable,
        cost=None if usd is None or billable is None else billable / 3600 * count * usd,
        saving=saving,
        is_spot=is_spot,
        interruptions=sum(
            change["Status"] == "Interrupted"
            for change in job.get("SecondaryStatusTransitions", [])
        ),
        finished=finished,
        pool=pool.get("Status", ""),
        pool_seconds=kept,
        pool_cost=None if usd is None else kept / 3600 * count * usd,
    )


def running_seconds(job: dict[str, Any]) -> float | None:
    """How long a job has run; `None` before it starts."""
    start = job.get("TrainingStartTime") or job.get("ProcessingStartTime")
    if "TrainingTimeInSeconds" in job or not start:
        return job.get("TrainingTimeInSeconds")
    end = job.get("TrainingEndTime") or job.get("ProcessingEndTime")
    return ((end or datetime.datetime.now(datetime.UTC)) - start).total_seconds()


def fate(report: Report) -> str:
    """State in words; SageMaker's Completed means only that the container ended with code 0."""
    if report.state == "Completed" and report.finished is False:
        return "Completed, not finished: run it again with --checkpoint_s3 of this job to resume"
    return report.state


def newest(report: Report) -> dict[str, float]:
    """The newest value of each metric."""
    values: dict[str, float] = {}
    for record in report.records:
        values |= record
    return values


def show(report: Report) -> str:
    """A job as text of several lines."""
    phase = f", {report.phase}" if report.phase not in ("", report.state) else ""
    lines = [f"{report.name}: {fate(report)}{phase}", f"instances  {report.instances}"]
    if report.failure:
        lines.append(f"failure    {report.failure}")
    if report.billable_seconds is not None:
        so_far = " so far" if report.state in RUNNING else ""
        spot = " at most (spot)" if report.is_spot and report.saving is None else ""
        billable = f"billable {report.billable_seconds:,.0f} s an instance"
        lines.append(f"time       {report.seconds:,.0f} s, {billable}")
        lines.append(f"cost       {_usd(report.cost)}{so_far}{spot}")
    if report.interruptions:
        lines.append(f"spot       interrupted {report.interruptions} times")
    if report.saving is not None:
        lines.append(f"spot       saved {100 * report.saving:.0f} %")
    if report.pool and report.pool != "InUse":
        lines.append(
            f"kept       {report.pool}, billable {report.pool_seconds:,.0f} s an instance, "
            f"{_usd(report.pool_cost)} more"
        )
    if report.pool == "Available":
        lines.append("           python sagemaker_launch.py release ends it")
    if report.records:
        lines += ["", *curve(report.records)]
    elif report.metrics:
        lines += [f"{name:<26} {value:.5g}" for name, value in sorted(report.metrics.items())]
    return "\n".join(lines)


def curve(records: list[dict[str, Any]]) -> list[str]:
    """Losses and rates by step: all evaluations, and about SHOWN_ROWS of the other steps."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    steps = sorted(by_step)
    every = max(1, len(steps) // SHOWN_ROWS)
    shown = [
        step
        for index, step in enumerate(steps)
        if index % every == 0 or step == steps[-1] or "eval_loss" in by_step[step]
    ]
    lines = ["".join(f"{name:>18}" for name in CURVE)]
    for step in shown:
        values = (by_step[step].get(name) for name in CURVE)
        lines.append("".join(f"{_number(value):>18}" for value in values))
    return lines


def compare(reports: list[Report]) -> str:
    """The jobs of a sweep as a table, with the options in which they differ."""
    keys = sorted({key for report in reports for key in report.options})
    differing = [key for key in keys if len({report.options.get(key) for report in reports}) > 1]
    head = ["job", "state", *differing, "step", "loss", "eval_loss", "wer_raw", "cost"]
    rows = []
    for report in reports:
        values, cost = newest(report), report.cost
        numbers = (values.get(name) for name in ("step", "loss", "eval_loss", "wer_raw"))
        rows.append(
            [
                report.name,
                fate(report).partition(":")[0],
                *(report.options.get(key, "default") for key in differing),
                *map(_number, numbers),
                _usd(None if cost is None else cost + (report.pool_cost or 0.0)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    )


def cost_ceiling(job: Job, num_jobs: int) -> str:
    """What jobs cost at most, in a line."""
    hours = num_jobs * ceiling_hours(job)
    size = f"{num_jobs} x {job.instance_count} x {job.instance_type}, {hours:.1f} instance hours"
    priced = price(job.instance_type, region_of(job))
    if priced is None:
        return (
            f"cost ceiling: unknown ({size}; no price of {job.instance_type} in {region_of(job)})"
        )
    usd, date = priced
    spot = ", on demand; spot is cheaper" if getattr(job, "spot", False) else ""
    return (
        f"cost ceiling: {hours * usd:.2f} USD ({size} at {usd:g} USD of {date}{spot}), "
        "without disks, S3, data transfer and taxes"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def _usd(cost: float | None) -> str:
    return "unknown" if cost is None else f"{cost:.2f} USD"
