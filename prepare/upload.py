"""Copies a folder to S3; an interrupted copy can be continued."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import aws
from common.aws import split_uri, uri_problem
from common.cli import UserError, first_line


def check(s3_uri: str) -> None:
    """Check, before hours of work, that an upload can succeed.

    Raises:
        UserError: not an S3 URI, no credentials, no such bucket, or no connection.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _ = _bucket_and_prefix(s3_uri)
    try:
        _client(s3_uri).head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("403", "AccessDenied"):  # may still allow puts
            raise _s3_error(s3_uri, error) from error
    except BotoCoreError as error:
        raise _s3_error(s3_uri, error) from error


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
    with _opened(s3_uri) as (client, bucket, prefix):
        keys = {path: prefix + path.relative_to(folder).as_posix() for path in files}
        _refuse_other_dataset(client, bucket, keys[files[-1]], files[-1], s3_uri)
        sent = sum(_upload_file(client, bucket, keys[path], path) for path in files)
    return sent, len(files) - sent


@contextmanager
def _opened(s3_uri: str) -> Iterator[tuple[Any, str, str]]:
    """Yield a client, the bucket and the prefix; an error of S3 becomes a UserError."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _bucket_and_prefix(s3_uri)
    try:
        yield _client(s3_uri), bucket, prefix
    except (BotoCoreError, ClientError, S3UploadFailedError) as error:
        raise _s3_error(s3_uri, error) from error


def _bucket_and_prefix(s3_uri: str) -> tuple[str, str]:
    problem = uri_problem(s3_uri)
    if problem:
        raise UserError(f"--s3_uri {s3_uri} {problem}")
    bucket, prefix = split_uri(s3_uri)
    return bucket, f"{prefix}/" if prefix else ""


def _client(s3_uri: str) -> Any:
    settings = aws.session()
    if settings.get_credentials() is None:
        raise UserError(
            f"--s3_uri {s3_uri}: no AWS credentials found: set AWS_PROFILE or run `aws configure`"
        )
    return settings.client("s3", region_name=settings.region_name or "us-east-1")


def _refuse_other_dataset(client: Any, bucket: str, key: str, record: Path, s3_uri: str) -> None:
    stored = _stored(client, bucket, key)
    if stored is None or stored == _size_and_sha256(record):
        return
    raise UserError(
        f"--s3_uri {s3_uri} holds another dataset ({record.name} differs): "
        "give another prefix or remove that one"
    )


def _upload_file(client: Any, bucket: str, key: str, path: Path) -> bool:
    """Upload a file unless S3 has it already; returns whether it was sent."""
    from boto3.s3.transfer import TransferConfig

    size, sha256 = _size_and_sha256(path)
    if _stored(client, bucket, key) == (size, sha256):
        return False
    extra = {"Metadata": {"sha256": sha256}, "ChecksumAlgorithm": "SHA256"}
    client.upload_file(str(path), bucket, key, ExtraArgs=extra, Config=TransferConfig())
    return True


def _stored(client: Any, bucket: str, key: str) -> tuple[int, str] | None:
    """Size of an object, and the sha256 that `_upload_file` stored with it; `None` without one."""
    from botocore.exceptions import ClientError

    try:
        head = client.head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "403", "NoSuchKey"):  # 403: may not list
            return None
        raise
    return head["ContentLength"], head["Metadata"].get("sha256", "")


def _size_and_sha256(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _s3_error(s3_uri: str, error: Exception) -> UserError:
    return UserError(
        f"--s3_uri {s3_uri} cannot be written ({first_line(error)}): check the bucket, credentials "
        "and network, then run again"
    )
