"""Copying a job's results from S3 into a folder, and nowhere else."""

import tempfile
from pathlib import Path
from typing import Any

from common.aws import NOT_FOUND, split_uri
from common.cli import UserError
from common.files import MARKERS
from jobs.archive import unpack

FETCHED = ("metrics.jsonl", "train.json", "tensorboard/", "adapter_best/", "model_best/")


def fetch_job(s3: Any, job: dict[str, Any], folder: Path) -> set[str]:
    """Download and unpack what a job has written so far; returns the names in `folder`."""
    if "TrainingJobName" not in job:
        for output in job["ProcessingOutputConfig"]["Outputs"]:
            download(s3, *split_uri(output["S3Output"]["S3Uri"]), folder)
        return {path.name for path in folder.iterdir()}
    checkpoints = job.get("CheckpointConfig", {}).get("S3Uri", "")
    if checkpoints:
        download(s3, *split_uri(checkpoints), folder, FETCHED)
    bucket, prefix = split_uri(job["OutputDataConfig"]["S3OutputPath"])
    output = "/".join(filter(None, [prefix, job["TrainingJobName"], "output"]))
    for name in ("model", "output"):
        download_archive(s3, bucket, f"{output}/{name}.tar.gz", folder)
        if job["OutputDataConfig"].get("CompressionType") == "NONE":
            download(s3, bucket, f"{output}/{name}", folder)
    return {path.name for path in folder.iterdir()}


def download(
    s3: Any, bucket: str, prefix: str, folder: Path, wanted: tuple[str, ...] = ("",)
) -> None:
    """Copy the objects below `prefix` whose relative name begins with one of `wanted`.

    Raises:
        UserError: an object's name leads out of `folder`.
    """
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    for key in [item["Key"] for page in pages for item in page.get("Contents", [])]:
        relative = key[len(prefix) + 1 :]
        if relative.endswith(("/", *MARKERS)) or not relative.startswith(wanted):
            continue
        target = (folder / relative).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"s3://{bucket}/{key}: leads out of the folder: remove or rename it")
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(target))


def download_archive(s3: Any, bucket: str, key: str, folder: Path) -> None:
    """Download and unpack an archive if it exists; raises UserError as `unpack`."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # is removed with a failed `folder`
        archive = Path(scratch, "archive.tar.gz")
        try:
            s3.download_file(bucket, key, str(archive))
        except s3.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in NOT_FOUND:
                return
            raise
        unpack(archive, folder, f"s3://{bucket}/{key}")
