"""AWS clients, and their errors in one line."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from common.cli import UserError

NOT_THERE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")
# A bucket's name; S3 has more rules, which it tells itself.
BUCKET_NAME = re.compile(r"(?!\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def session() -> Any:
    """AWS's own settings; raises UserError where they name a profile that is not there."""
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        return boto3.Session()
    except BotoCoreError as error:
        raise UserError(
            f"AWS_PROFILE {os.environ.get('AWS_PROFILE', '')}: {error}: give one that "
            "`aws configure list-profiles` lists, or unset AWS_PROFILE"
        ) from error


def client(service: str, region: str) -> Any:
    """A client of `service`; an empty region takes the one AWS's own settings name."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    settings = session()
    region = region or settings.region_name
    if not region:
        raise UserError("--region is empty and AWS's settings name none: give one: us-east-1")
    retries = Config(retries={"mode": "standard", "max_attempts": 5})
    try:
        return settings.client(service, region_name=region, config=retries)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"--region {region}: {error}: give one, as us-east-1") from error


def bucket_region(s3: Any, bucket: str) -> str:
    """Where a bucket lies; empty where S3 does not say so. Raises as boto3 does."""
    headers = s3.head_bucket(Bucket=bucket)["ResponseMetadata"]["HTTPHeaders"]
    return headers.get("x-amz-bucket-region", "")


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turn a refusal of AWS into a UserError about `what`: an option and its value."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except NoCredentialsError as error:
        raise UserError(
            f"{what}: no AWS credentials found: set AWS_PROFILE or run `aws configure`"
        ) from error
    except (BotoCoreError, Boto3Error, ClientError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what}: AWS answers: {reason}") from error


def uri_problem(s3_uri: str) -> str:
    """What is wrong with an S3 URI, and the remedy; empty where nothing is.

    >>> uri_problem("s3://bucket//a")
    "has an empty name between two slashes, which SageMaker refuses: write s3://bucket/a"
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
    """Bucket and key (without a slash at either end) of `s3://BUCKET/KEY`; empty where it is none.

    >>> split_uri("s3://bucket/a/b/"), split_uri("bucket/a")
    (('bucket', 'a/b'), ('', ''))
    """
    parts = urlsplit(s3_uri)
    if parts.scheme != "s3" or parts.query or parts.fragment:
        return "", ""
    return parts.netloc, parts.path.strip("/")
