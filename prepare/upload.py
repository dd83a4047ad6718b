"""Copies a folder to S3; an interrupted copy can be continued."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.aws import client, explain_errors, session, split_uri, uri_problem
from common.cli import UserError


def check(s3_uri: str) -> None:
    """Check, before hours of work, that an upload can succeed.

    Raises:
        UserError: not an S3 URI, no credentials, no such bucket, or no connection.
    """
    from botocore.exceptions import ClientError

    with _opened(s3_uri) as (s3, bucket, _):
        try:
            s3.head_bucket(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("403", "AccessDenied"):  # may allow puts
                raise


def send_folder(folder: Path, s3_uri: str, *, last: str) -> tuple[int, int]:
    """Copy a folder below `s3_uri`.

    Large files are sent in parts, several at a time. A file is not sent if an object with its size
    and sha256 exists, so an interrupted upload continues where it stopped.

    Args:
        folder: to copy.
        s3_uri: `s3://BUCKET/PREFIX`.
        last: name of the file that is sent last. Its presence means that the copy is complete, and
            its content identifies the dataset.

    Returns:
        Number of files sent, and of files that S3 had already.

    Raises:
        UserError: as `check`; or `s3_uri` holds another dataset.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files.sort(key=lambda path: path == folder / last)
    with _opened(s3_uri) as (s3, bucket, prefix):
        keys = {path: prefix + path.relative_to(folder).as_posix() for path in files}
        _refuse_other_dataset(s3, bucket, keys[files[-1]], files[-1], s3_uri)
        sent = sum(_upload_file(s3, bucket, keys[path], path) for path in files)
    return sent, len(files) - sent


@contextmanager
def _opened(s3_uri: str) -> Iterator[tuple[Any, str, str]]:
    """Yield a client, the bucket and the prefix; an error of S3 becomes a UserError."""
    problem = uri_problem(s3_uri)
    if problem:
        raise UserError(f"--s3_uri {s3_uri} {problem}")
    bucket, prefix = split_uri(s3_uri)
    remedy = "check the bucket, credentials and network, then run again"
    with explain_errors(f"--s3_uri {s3_uri}", remedy):
        s3 = client("s3", session().region_name or "us-east-1")  # any region finds a bucket
        yield s3, bucket, f"{prefix}/" if prefix else ""


def _refuse_other_dataset(s3: Any, bucket: str, key: str, record: Path, s3_uri: str) -> None:
    stored = _stored(s3, bucket, key)
    if stored is None or stored == _size_and_sha256(record):
        return
    raise UserError(
        f"--s3_uri {s3_uri} holds another dataset ({record.name} differs): "
        "give another prefix or remove that one"
    )


def _upload_file(s3: Any, bucket: str, key: str, path: Path) -> bool:
    """Upload a file unless S3 has it already; returns whether it was sent."""
    from boto3.s3.transfer import TransferConfig

    size, sha256 = _size_and_sha256(path)
    if _stored(s3, bucket, key) == (size, sha256):
        return False
    extra = {"Metadata": {"sha256": sha256}, "ChecksumAlgorithm": "SHA256"}
    s3.upload_file(str(path), bucket, key, ExtraArgs=extra, Config=TransferConfig())
    return True


def _stored(s3: Any, bucket: str, key: str) -> tuple[int, str] | None:
    """Size of an object, and the sha256 that `_upload_file` stored with it; `None` without one."""
    from botocore.exceptions import ClientError

    try:
        head = s3.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "403", "NoSuchKey"):  # 403: may not list
            return None
        raise
    return head["ContentLength"], head["Metadata"].get("sha256", "")


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
