"""Prepare, train and score as Amazon SageMaker jobs, watch them and bring the results home.

    python sagemaker_launch.py train --role ARN --image_uri URI --train_s3 s3://BUCKET/prepared \\
        --output_s3 s3://BUCKET/whisper --instance_type ml.g5.2xlarge --train.model \\
        openai/whisper-large-v2 --train.num_epochs 3 --dry_run true

    train    train_lora.py on one node or many; --train.KEY VALUE for each of its options
    eval     eval_wer.py; --eval.KEY VALUE for each of its options
    prepare  preprocess.py on one node; --prepare.KEY VALUE for each of its options
    status   phase, losses and word error rates so far, time, cost
    logs     what the nodes print; --follow true goes on until the job ends
    stop     let the job save and end
    release  give back the instances that --keep_alive_seconds keeps
    fetch    adapter, scores and curves into a folder
    prices   renew the price table of a region

`COMMAND --help` shows a command's options. A job is named by what `train` printed; the name of a
sweep stands for all its jobs.
"""

import importlib
import json
import re
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import cli
from common.aws import NOT_THERE, bucket_region, client, split_uri, told_in_one_line
from common.cli import UserError
from common.files import MARKERS, new_folder
from jobs import instances
from jobs import report as job_report
from jobs.check import all_problems
from jobs.request import (
    Eval,
    Job,
    Prepare,
    Train,
    build_processing_request,
    build_request,
    ceiling_hours,
    channels,
    merged,
    parse_request,
    prepared_s3,
    region_of,
    sweep,
)

SCRIPTS = {"train": "train_lora", "eval": "eval_wer", "prepare": "preprocess"}
POLL_SECONDS = 5.0  # between two looks at the logs
LATE_SECONDS = 30.0  # that a log line may come after the end of its job
MAX_UNPACKED = 64 * 2**30  # bytes; a full fine-tune of large-v3 has 6 GB, twice with its best
FETCHED = ("metrics.jsonl", "train.json", "tensorboard/", "adapter_best/", "model_best/")


@dataclass
class Watch:
    """Which job."""

    job: str = ""  # its name, or that of a sweep
    region: str = ""  # empty: the one of AWS's own settings


@dataclass
class Logs(Watch):
    """What the nodes print."""

    follow: bool = False  # go on until the job ends


@dataclass
class Fetch(Watch):
    """Bring a job's results home."""

    output_dir: str = "fetched"  # OUTPUT_DIR/JOB is written


@dataclass
class Prices:
    """Renew the price table of a region from AWS's price list."""

    region: str = "us-east-1"  # whose prices are wanted


# ------ starting jobs


def script_options(args: list[str], command: str, given: dict[str, str], job: Job) -> Any:
    """The options of the script that a job runs, checked as the script itself does.

    Args:
        args: `--key value` without prefix.
        given: of a sweep, instead of what stands in `args`.
    """
    script = importlib.import_module(SCRIPTS[command])  # takes seconds: not for `status`
    for key in given:
        if any(word.partition("=")[0] == f"--{key}" for word in args):
            raise UserError(f"--{command}.{key} stands in --sweep too: keep one")
    with cli.naming(command):
        words = [word for pair in given.items() for word in (f"--{pair[0]}", pair[1])]
        options = cli.parse(script.Config, [*args, *words])
        checked = options
        if isinstance(job, Eval) and "adapter" in channels(job):
            checked = replace(options, adapter=".")  # a folder, which the job's channel will be
        script.check(checked)
    return options


def submit(args: list[str], command: str, job_class: type[Job]) -> None:
    """Check everything, then print the requests or send them."""
    own, nested = cli.take_prefixed(args, command)
    job = cli.parse(job_class, own)
    combinations = sweep(getattr(job, "sweep", ""), command)
    name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    names = [name] if len(combinations) == 1 else [
        f"{name}-{number:02d}" for number in range(1, len(combinations) + 1)
    ]  # fmt: skip
    build = build_processing_request if isinstance(job, Prepare) else build_request
    requests, problems = [], []
    for combination, one in zip(combinations, names, strict=True):
        options = script_options(nested, command, combination, job)
        request = build(replace(job, role=role_arn(job.role)), options, one)
        requests.append(merged(request, parse_request(job.request)))
        problems += all_problems(job, options, requests[-1])
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    print(ceiling(job, len(requests)), file=sys.stderr)
    if job.dry_run:
        print(json.dumps(requests if len(requests) > 1 else requests[0], indent=2))
        return
    send(job, requests, name)
    print(f"{len(requests)} jobs" if len(requests) > 1 else "1 job", f"started: {name}")
    print(f"python sagemaker_launch.py status --job {name} --region {region_of(job)}", flush=True)
    if isinstance(job, Prepare):
        print(f"the prepared data will be {prepared_s3(job, name)}", flush=True)
    if job.wait:
        wait(names, region_of(job))


def role_arn(role: str) -> str:
    """A role's ARN as it looks; the account of one that is named is IAM's to say."""
    return role if not role or role.startswith("arn:") else f"arn:aws:iam::{12 * '0'}:role/{role}"


def ceiling(job: Job, num_jobs: int) -> str:
    """What jobs cost at most, in a line."""
    hours = num_jobs * ceiling_hours(job)
    found = instances.price(job.instance_type, region_of(job))
    told = f"{num_jobs} x {job.instance_count} x {job.instance_type}, {hours:.1f} instance hours"
    if found is None:
        return (
            f"cost ceiling: unknown ({told}; no price of {job.instance_type} in {region_of(job)})"
        )
    price, date = found
    spot = ", on demand; spot is cheaper" if getattr(job, "spot", False) else ""
    return (
        f"cost ceiling: {hours * price:.2f} USD ({told} at {price:g} USD of {date}{spot}), "
        "without disks, S3, data transfer and taxes"
    )


def send(job: Job, requests: list[dict[str, Any]], name: str) -> None:
    """Look whether role and data are there, then start the jobs, which `name` stands for."""
    region, role = region_of(job), job.role
    with told_in_one_line(f"--role {job.role}"):
        account = client("sts", region).get_caller_identity()["Account"]
        if not role.startswith("arn:"):
            role = client("iam", region).get_role(RoleName=role)["Role"]["Arn"]
    if role.split(":")[4] != account:
        raise UserError(
            f"--role {job.role}: is of another account than your credentials, {account}: "
            "give one of that account, or set AWS_PROFILE"
        )
    requests = [request | {"RoleArn": role} for request in requests]
    s3 = client("s3", region)
    bucket, _ = split_uri(job.output_s3)
    with told_in_one_line(f"--output_s3 {job.output_s3}"):
        s3.head_bucket(Bucket=bucket)
    for option, uri, file in inputs(job):
        require_region(s3, option, uri, region)
        require(s3, option, uri, file)
    if isinstance(job, Train) and job.checkpoint_s3:
        require_region(s3, "--checkpoint_s3", job.checkpoint_s3, region)
    sagemaker = client("sagemaker", region)
    create = sagemaker.create_training_job
    if isinstance(job, Prepare):
        create = sagemaker.create_processing_job
    started: list[str] = []
    for request in requests:
        try:
            with told_in_one_line(f"--name {job.name}"):
                create(**request)
        except UserError as error:
            if not started:
                raise
            raise UserError(
                f"{error}; {len(started)} of {len(requests)} jobs were started before it and are "
                f"paid for: {', '.join(started)}: end them with python sagemaker_launch.py stop "
                f"--job {name} --region {region}"
            ) from error
        started.append(job_report.name_of(request))
        print(f"started {started[-1]}", flush=True)


def inputs(job: Job) -> Iterator[tuple[str, str, str]]:
    """Option, place and a file that must be in it, for everything that a job reads."""
    from common.prepared import RECORD_NAME  # brings pandas: not for `status`

    if isinstance(job, Prepare):
        yield "--source_s3", job.source_s3, job.source_file
        return
    for name, uri in channels(job).items():
        option = "--adapter_job" if name == "adapter" and job.adapter_job else f"--{name}_s3"
        yield option, uri, RECORD_NAME if name in ("train", "test") else ""


def require_region(s3: Any, option: str, s3_uri: str, region: str) -> None:
    """Refuse a bucket of another region before any instance is paid."""
    with told_in_one_line(f"{option} {s3_uri}"):
        place = bucket_region(s3, split_uri(s3_uri)[0])
    if place and place != region:
        raise UserError(
            f"{option} {s3_uri}: the bucket is in {place}, and SageMaker reads buckets of the "
            f"job's own region only, {region}: copy it, or push the image to {place}"
        )


def require(s3: Any, option: str, s3_uri: str, file: str) -> None:
    """Refuse a place that is empty, or lacks a file, before any instance is paid."""
    bucket, prefix = split_uri(s3_uri)
    key = prefix if prefix.endswith(".tar.gz") else f"{prefix}/{file}".lstrip("/")
    with told_in_one_line(f"{option} {s3_uri}"):
        found = s3.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1).get("Contents", [])
    if not found:
        missing = f"has no {file}" if file else "is empty"
        raise UserError(f"{option} {s3_uri}: {missing}: give what was written whole")


def train(args: list[str]) -> None:
    submit(args, "train", Train)


def evaluate(args: list[str]) -> None:
    submit(args, "eval", Eval)


def prepare(args: list[str]) -> None:
    submit(args, "prepare", Prepare)


# ------ watching them


def find_jobs(watch: Watch) -> tuple[Any, list[dict[str, Any]]]:
    """A SageMaker client and descriptions of the job, or of all jobs of the sweep, of that name."""
    if not watch.job:
        raise UserError("--job is empty: give the name that `train` printed")
    sagemaker = client("sagemaker", watch.region)
    with told_in_one_line(f"--job {watch.job}"):
        found = describe(sagemaker, watch.job)
        if found:
            return sagemaker, [found]
        pages = sagemaker.get_paginator("list_training_jobs").paginate(NameContains=watch.job)
        listed = (one["TrainingJobName"] for page in pages for one in page["TrainingJobSummaries"])
        of_sweep = sorted(
            name for name in listed if re.fullmatch(rf"{re.escape(watch.job)}-\d+", name)
        )
        jobs = [describe(sagemaker, name) for name in of_sweep]
    if not jobs:
        region = sagemaker.meta.region_name
        raise UserError(f"--job {watch.job}: no such job in {region}: give the name, or --region")
    return sagemaker, jobs


def describe(sagemaker: Any, name: str) -> dict[str, Any] | None:
    """A training job or, where there is none of the name, a processing job."""
    for look in ("training", "processing"):
        call = getattr(sagemaker, f"describe_{look}_job")
        try:
            return call(**{f"{look.title()}JobName": name})
        except sagemaker.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if code not in ("ValidationException", "ResourceNotFound", "ResourceNotFoundException"):
                raise
    return None


def status(args: list[str]) -> None:
    watch = cli.parse(Watch, args)
    sagemaker, jobs = find_jobs(watch)
    region = sagemaker.meta.region_name
    s3 = client("s3", region)
    reports = [
        job_report.report(job, records(s3, job), region, finished=is_finished(s3, job))
        for job in jobs
    ]
    print(job_report.one(reports[0]) if len(reports) == 1 else job_report.several(reports))


def is_finished(s3: Any, job: dict[str, Any]) -> bool | None:
    """Whether a completed training has written train.json; `None` where that says nothing.

    A run that stopped at its own time limit ends as well as one that is through.
    """
    place = job.get("CheckpointConfig", {}).get("S3Uri", "")
    if not place or job_report.state_of(job) != "Completed":
        return None
    bucket, prefix = split_uri(place)
    with told_in_one_line(f"--job {job['TrainingJobName']}: {place}"):
        try:
            told = s3.head_object(Bucket=bucket, Key=f"{prefix}/train.json")
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in NOT_THERE:
                return False
            raise
    started = job.get("CreationTime")  # an older one came with another job's --checkpoint_s3
    return started is None or told["LastModified"] >= started.replace(microsecond=0)


def records(s3: Any, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a training job has logged so far: metrics.jsonl, which SageMaker copies as it grows."""
    place = job.get("CheckpointConfig", {}).get("S3Uri", "")
    if not place:
        return []
    bucket, prefix = split_uri(place)
    with told_in_one_line(f"--job {job['TrainingJobName']}: {place}"):
        try:
            body = s3.get_object(Bucket=bucket, Key=f"{prefix}/metrics.jsonl")["Body"].read()
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in NOT_THERE:
                return []
            raise
    lines = body.decode().split("\n")[:-1]  # a torn last line has no end
    return [json.loads(line) for line in lines]


def logs(args: list[str]) -> None:
    config = cli.parse(Logs, args)
    sagemaker, jobs = find_jobs(config)
    if len(jobs) > 1:
        raise UserError(f"--job {config.job}: is a sweep of {len(jobs)} jobs: give one of them")
    show_logs(sagemaker, jobs[0], follow=config.follow)


def show_logs(sagemaker: Any, job: dict[str, Any], *, follow: bool) -> None:
    """Print what the nodes of a job have printed, with `follow` until it ends."""
    name, tokens = job_report.name_of(job), {}
    group = f"/aws/sagemaker/{'Training' if 'TrainingJobName' in job else 'Processing'}Jobs"
    events = client("logs", sagemaker.meta.region_name)
    ended_at = None
    while True:
        with told_in_one_line(f"--job {name}"):
            new = sorted(job_report.new_events(events, group, name, tokens))
            state = job_report.state_of(describe(sagemaker, name))
        for _, host, line in new:
            print(f"{host}: {line}", flush=True)
        if state not in job_report.RUNNING and ended_at is None:
            ended_at = time.monotonic()
        late = ended_at is not None and time.monotonic() - ended_at > LATE_SECONDS
        if not follow or (ended_at is not None and (late or not new)):
            break
        time.sleep(POLL_SECONDS)
    if not tokens:
        print(f"{name} has printed nothing yet", file=sys.stderr)
    elif follow:
        print(f"{name}: {state}", file=sys.stderr)


def wait(names: list[str], region: str) -> None:
    """Follow jobs to their end: the log of a single one, the states of several.

    Raises:
        SystemExit: with 1, unless all have finished.
    """
    sagemaker, s3, fates = client("sagemaker", region), client("s3", region), []
    if len(names) == 1:
        show_logs(sagemaker, _described(sagemaker, names[0]), follow=True)
    for name in names:
        while job_report.state_of(job := _described(sagemaker, name)) in job_report.RUNNING:
            time.sleep(POLL_SECONDS)
        fate = job_report.report(job, [], region, finished=is_finished(s3, job))
        print(f"{name}: {job_report.fate(fate)}", flush=True)
        fates.append(fate)
    if any(fate.state != "Completed" or fate.finished is False for fate in fates):
        sys.exit(1)


def _described(sagemaker: Any, name: str) -> dict[str, Any]:
    with told_in_one_line(f"--job {name}"):
        job = describe(sagemaker, name)
    if job is None:
        raise UserError(f"--job {name}: is not there any more")
    return job


def stop(args: list[str]) -> None:
    sagemaker, jobs = find_jobs(cli.parse(Watch, args))
    for job in jobs:
        name, state = job_report.name_of(job), job_report.state_of(job)
        if state not in job_report.RUNNING:
            print(f"{name}: {state} already")
            continue
        with told_in_one_line(f"--job {name}"):
            if "TrainingJobName" in job:
                sagemaker.stop_training_job(TrainingJobName=name)
            else:
                sagemaker.stop_processing_job(ProcessingJobName=name)
        print(f"{name}: stopping; it has two minutes to save")


def release(args: list[str]) -> None:
    """End the billing of instances that are kept after a job."""
    sagemaker, jobs = find_jobs(cli.parse(Watch, args))
    for job in jobs:
        name, pool = job_report.name_of(job), job.get("WarmPoolStatus", {}).get("Status", "")
        if pool not in job_report.KEPT:
            print(f"{name}: no instances are kept{f' ({pool})' if pool else ''}")
            continue
        with told_in_one_line(f"--job {name}"):
            sagemaker.update_training_job(
                TrainingJobName=name, ResourceConfig={"KeepAlivePeriodInSeconds": 0}
            )
        print(f"{name}: its instances are kept no longer")


# ------ bringing results home


def fetch(args: list[str]) -> None:
    config = cli.parse(Fetch, args)
    sagemaker, jobs = find_jobs(config)
    s3 = client("s3", sagemaker.meta.region_name)
    for job in jobs:
        name = job_report.name_of(job)
        if "TrainingJobName" not in job:
            raise UserError(f"--job {name}: prepared data stays in S3: give it as --train_s3")
        folder = Path(config.output_dir, name)
        with told_in_one_line(f"--job {name}"), new_folder(folder) as partial:
            fetched = fetch_job(s3, job, partial)
            if not fetched:
                raise UserError(f"--job {name}: has written nothing yet: try again later")
        print(f"{folder}: {', '.join(sorted(fetched))}")


def fetch_job(s3: Any, job: dict[str, Any], folder: Path) -> set[str]:
    """Download and unpack what a job has written; the names of what lies in `folder` then."""
    place = job.get("CheckpointConfig", {}).get("S3Uri", "")
    if place:
        download(s3, *split_uri(place), folder, FETCHED)
    bucket, prefix = split_uri(job["OutputDataConfig"]["S3OutputPath"])
    output = "/".join(filter(None, [prefix, job["TrainingJobName"], "output"]))
    for name in ("model", "output"):
        unpack(s3, bucket, f"{output}/{name}.tar.gz", folder)
        if job["OutputDataConfig"].get("CompressionType") == "NONE":
            download(s3, bucket, f"{output}/{name}", folder, "")
    return {path.name for path in folder.iterdir()}


def download(
    s3: Any, bucket: str, prefix: str, folder: Path, wanted: str | tuple[str, ...]
) -> None:
    """Copy objects below a prefix whose name begins as `wanted`; none lands outside of `folder`."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    for key in [one["Key"] for page in pages for one in page.get("Contents", [])]:
        relative = key[len(prefix) + 1 :]
        target = (folder / relative).resolve()
        if relative.endswith(("/", *MARKERS)) or not relative.startswith(wanted):
            continue
        if target.is_relative_to(folder.resolve()):
            target.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, key, str(target))


def unpack(s3: Any, bucket: str, key: str, folder: Path) -> None:
    """Unpack an archive of SageMaker, if it is there; nothing lands outside of `folder`."""
    with tempfile.NamedTemporaryFile(dir=folder.parent, suffix=".tar.gz") as file:
        try:
            s3.download_fileobj(bucket, key, file)
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in NOT_THERE:
                return
            raise
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:gz") as archive:
                if sum(member.size for member in archive) > MAX_UNPACKED:
                    raise UserError(f"s3://{bucket}/{key}: unpacks to over 64 GiB: look at it")
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            raise UserError(f"s3://{bucket}/{key}: cannot be unpacked ({error})") from error


def prices(args: list[str]) -> None:
    config = cli.parse(Prices, args)
    with told_in_one_line(f"--region {config.region}"):
        found = instances.refresh(client("pricing", "us-east-1"), config.region)
    if not found:
        raise UserError(f"--region {config.region}: the price list has no training in it")
    print(f"{found} instance types of {config.region} in {instances.TABLE}")


COMMANDS = {
    "train": train, "eval": evaluate, "prepare": prepare, "status": status, "logs": logs,
    "stop": stop, "release": release, "fetch": fetch, "prices": prices,
}  # fmt: skip

if __name__ == "__main__":
    cli.run_commands(COMMANDS, __doc__)
