"""Prepare, train and score as Amazon SageMaker jobs, watch them and copy the results back.

    python sagemaker_launch.py train --role ARN --image_uri URI --train_s3 s3://BUCKET/prepared \\
        --output_s3 s3://BUCKET/whisper --instance_type ml.g5.2xlarge --train.model \\
        openai/whisper-large-v2 --train.num_epochs 3 --dry_run true

    train    train_lora.py on one node or many; --train.KEY VALUE for each of its options
    eval     eval_wer.py; --eval.KEY VALUE for each of its options
    prepare  preprocess.py on one node; --prepare.KEY VALUE for each of its options
    export   export.py on one node; --export.KEY VALUE for each of its options
    transcribe
             transcribe.py on one node; --transcribe.KEY VALUE for each of its options
    status   phase, losses and word error rates so far, time, cost
    logs     the log of all nodes; --follow true goes on until the job ends
    stop     have the job save and end
    release  give back the instances that --keep_alive_seconds keeps
    fetch    copy adapter, scores and curves into a folder
    prices   renew the price table of a region

`COMMAND --help` shows a command's options. --job is the name that `train` printed; the name of
a sweep stands for all its jobs.
"""

import importlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import cli
from common.aws import client, explain_errors
from common.cli import UserError
from common.files import new_folder
from jobs import follow, instances, report
from jobs.check import all_problems
from jobs.fetch import fetch_job
from jobs.report import name_of, state_of
from jobs.request import (
    Eval,
    Export,
    Job,
    Prepare,
    Train,
    TrainingJob,
    Transcribe,
    build_processing_request,
    build_request,
    channels,
    merged,
    parse_request,
    region_of,
    results_s3,
    role_arn,
    sweep,
)
from jobs.submit import start_jobs

SCRIPTS = {
    "train": "train_lora", "eval": "eval_wer", "export": "export", "prepare": "preprocess",
    "transcribe": "transcribe",
}  # fmt: skip


@dataclass
class Watch:
    """Which job."""

    job: str = ""  # name of the job or sweep
    region: str = ""  # AWS region; empty: the one of AWS's own settings


@dataclass
class Logs(Watch):
    """Print the log of a job's nodes."""

    follow: bool = False  # continue until the job ends


@dataclass
class Fetch(Watch):
    """Copy a job's results into a folder."""

    output_dir: str = "fetched"  # results are written to OUTPUT_DIR/JOB


@dataclass
class Prices:
    """Renew the price table of a region from AWS's price list."""

    region: str = "us-east-1"  # AWS region whose prices are renewed


# ------ train, eval, export, prepare, transcribe


def script_options(args: list[str], command: str, values: dict[str, str], job: Job) -> Any:
    """The options of the script that a job runs, checked as the script itself does.

    Args:
        args: `--key value` without prefix.
        values: one combination of a sweep; an option may not be in both.
    """
    keys = {word.partition("=")[0] for word in args}
    cli.refuse(
        (f"--{key}" in keys, f"--{command}.{key} is in --sweep too: keep one") for key in values
    )
    script = importlib.import_module(SCRIPTS[command])  # takes seconds, which `status` spares
    with cli.naming(command):
        words = [word for key, value in values.items() for word in (f"--{key}", value)]
        options = cli.parse(script.Config, [*args, *words])
        checked = options
        if isinstance(job, Eval | Transcribe) and "adapter" in channels(job):
            checked = replace(checked, adapter=".")  # any folder: the job has it as a channel
        if isinstance(job, Transcribe):
            checked = replace(checked, audio=".")
        script.check(checked)
    return options


def submit(args: list[str], command: str, job_class: type[Job]) -> None:
    """Check everything, then print the requests or send them."""
    own, nested = cli.take_prefixed(args, command)
    job = cli.parse(job_class, own)
    combinations = sweep(getattr(job, "sweep", ""), command)
    name = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    names = [f"{name}-{number:02d}" for number in range(1, len(combinations) + 1)]
    names = [name] if len(names) == 1 else names
    build = build_request if isinstance(job, TrainingJob) else build_processing_request
    requests, problems = [], []
    for values, job_name in zip(combinations, names, strict=True):
        options = script_options(nested, command, values, job)
        request = build(replace(job, role=role_arn(job.role)), options, job_name)
        requests.append(merged(request, parse_request(job.request)))
        problems += all_problems(job, options, requests[-1])
    cli.refuse((True, problem) for problem in dict.fromkeys(problems))
    print(report.cost_ceiling(job, len(requests)), file=sys.stderr)
    if job.dry_run:
        print(json.dumps(requests if len(requests) > 1 else requests[0], indent=2))
        return
    start_jobs(job, requests, name)
    print(f"{len(requests)} jobs" if len(requests) > 1 else "1 job", f"started: {name}")
    print(f"python sagemaker_launch.py status --job {name} --region {region_of(job)}", flush=True)
    if isinstance(job, Prepare | Transcribe):
        what = "prepared data" if isinstance(job, Prepare) else "transcripts"
        print(f"the {what} will be {results_s3(job, name)}", flush=True)
    if job.wait and not follow.wait(names, region_of(job)):
        sys.exit(1)


def train(args: list[str]) -> None:
    submit(args, "train", Train)


def evaluate(args: list[str]) -> None:
    submit(args, "eval", Eval)


def prepare(args: list[str]) -> None:
    submit(args, "prepare", Prepare)


def export(args: list[str]) -> None:
    submit(args, "export", Export)


def transcribe(args: list[str]) -> None:
    submit(args, "transcribe", Transcribe)


# ------ status, logs, stop, release


def status(args: list[str]) -> None:
    config = cli.parse(Watch, args)
    sagemaker, jobs = follow.find_jobs(config.job, config.region)
    region = sagemaker.meta.region_name
    s3 = client("s3", region)
    reports = [
        report.summarize(
            job, follow.read_records(s3, job), region, finished=follow.is_finished(s3, job)
        )
        for job in jobs
    ]
    print(report.show(reports[0]) if len(reports) == 1 else report.compare(reports))


def logs(args: list[str]) -> None:
    config = cli.parse(Logs, args)
    sagemaker, jobs = follow.find_jobs(config.job, config.region)
    message = f"--job {config.job}: is a sweep of {len(jobs)} jobs: give one of them"
    cli.refuse([(len(jobs) > 1, message)])
    follow.show_logs(sagemaker, jobs[0], follow=config.follow)


def stop(args: list[str]) -> None:
    config = cli.parse(Watch, args)
    sagemaker, jobs = follow.find_jobs(config.job, config.region)
    for job in jobs:
        name, state = name_of(job), state_of(job)
        if state not in report.RUNNING:
            print(f"{name}: {state} already")
            continue
        with explain_errors(f"--job {name}"):
            if "TrainingJobName" in job:
                sagemaker.stop_training_job(TrainingJobName=name)
            else:
                sagemaker.stop_processing_job(ProcessingJobName=name)
        print(f"{name}: stopping; it has two minutes to save")


def release(args: list[str]) -> None:
    """End the billing of instances that are kept after a job."""
    config = cli.parse(Watch, args)
    sagemaker, jobs = follow.find_jobs(config.job, config.region)
    for job in jobs:
        name, pool = name_of(job), job.get("WarmPoolStatus", {}).get("Status", "")
        if pool not in report.KEPT:
            print(f"{name}: no instances are kept{f' ({pool})' if pool else ''}")
            continue
        with explain_errors(f"--job {name}"):
            sagemaker.update_training_job(
                TrainingJobName=name, ResourceConfig={"KeepAlivePeriodInSeconds": 0}
            )
        print(f"{name}: its instances are kept no longer")


# ------ fetch, prices


def fetch(args: list[str]) -> None:
    config = cli.parse(Fetch, args)
    sagemaker, jobs = follow.find_jobs(config.job, config.region)
    s3 = client("s3", sagemaker.meta.region_name)
    for job in jobs:
        name = name_of(job)
        if "TrainingJobName" not in job and "ProcessingOutputConfig" not in job:
            raise UserError(f"--job {name}: prepared data stays in S3: give it as --train_s3")
        folder = Path(config.output_dir, name)
        with explain_errors(f"--job {name}"), new_folder(folder) as partial:
            names = fetch_job(s3, job, partial)
            if not names:
                raise UserError(f"--job {name}: has written nothing yet: try again later")
        print(f"{folder}: {', '.join(sorted(names))}")


def prices(args: list[str]) -> None:
    config = cli.parse(Prices, args)
    with explain_errors(f"--region {config.region}"):
        count = instances.refresh(client("pricing", "us-east-1"), config.region)
    message = f"--region {config.region}: has no training in AWS's price list: give another region"
    cli.refuse([(count == 0, message)])
    print(f"{count} instance types of {config.region} in {instances.TABLE}")


COMMANDS = {
    "train": train, "eval": evaluate, "prepare": prepare, "export": export,
    "transcribe": transcribe, "status": status, "logs": logs, "stop": stop, "release": release,
    "fetch": fetch, "prices": prices,
}  # fmt: skip

if __name__ == "__main__":
    cli.run_commands(COMMANDS, __doc__)
