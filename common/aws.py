"""AWS clients, and their errors in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from common.cli import UserError, first_line

NOT_FOUND = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
# A bucket's name; S3 itself reports what breaks its other rules.
BUCKET_NAME = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def session() -> Any:
    """A session of AWS's own settings; raises UserError if they name an unknown profile."""
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        return boto3.Session()
    except BotoCoreError as error:
        raise UserError(
            f"AWS_PROFILE {os.environ.get('AWS_PROFILE', '')}: {error}: give a profile "
            "of `aws configure list-profiles`, or unset AWS_PROFILE"
        ) from error


def client(service: str, region: str) -> Any:
    """A client of `service`; an empty region: the one of AWS's own settings.

    All clients are made here: each request is tried up to five times.
    """
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings = session()
    region = region or settings.region_name
    if not region:
        raise UserError("no region configured: pass --region, as us-east-1")
    retries = Config(retries={"mode": "standard", "max_attempts": 5})
    try:
        return settings.client(service, region_name=region, config=retries)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"--region {region}: {error}: give a region, as us-east-1") from error


@contextmanager
def explain_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn errors of AWS's libraries into a UserError.

    Args:
        what: an option and its value, with which the message begins.
        remedy: with which it ends.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise UserError(
            f"{what}: no AWS credentials found: set AWS_PROFILE or run `aws configure`"
        ) from error
    except (BotoCoreError, Boto3Error, ClientError) as error:
        ending = f": {remedy}" if remedy else ""
        raise UserError(f"{what}: AWS answers: {first_line(error)}{ending}") from error


def uri_problem(s3_uri: str) -> str:
    """What is wrong with an S3 URI, and the remedy; empty if nothing is.

    >>> uri_problem("s3://bucket//a")
    'has an empty name between two slashes, which SageMaker refuses: write s3://bucket/a'
    """
    bucket, key = split_uri(s3_uri)
    if not bucket:
        return "is not an S3 URI: write s3://BUCKET/PREFIX"
    if not BUCKET_NAME.fullmatch(bucket):
        return (
            f"{bucket} is no bucket's name: 3 to 63 of a-z, 0-9, '-' and '.': "
            "write s3://BUCKET/PREFIX"
        )
    if "//" in urlsplit(s3_uri).path:
        plain = re.sub("/+", "/", key)
        return (
            "has an empty name between two slashes, which SageMaker refuses: "
            f"write s3://{bucket}/{plain}"
        )
    return ""


def split_uri(s3_uri: str) -> tuple[str, str]:
    """Bucket and key (without a slash at either end) of `s3://BUCKET/KEY`; else both empty.

    >>> split_uri("s3://bucket/a/b/"), split_uri("bucket/a")
    (('bucket', 'a/b'), ('', ''))
    """
    parts = urlsplit(s3_uri)
    if parts.scheme != "s3" or parts.query or parts.fragment:
        return "", ""
    return parts.netloc, parts.path.strip("/")
