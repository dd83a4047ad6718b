"""AWS clients, and their errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from common.cli import UserError

NOT_THERE = ("404", "NoSuchKey", "NoSuchBucket", "NotFound")


def client(service: str, region: str) -> Any:
    """A client of `service`; an empty region takes the one AWS's own settings name."""
    import boto3
    from botocore.config import Config

    session = boto3.Session()
    region = region or session.region_name
    if not region:
        raise UserError("--region is empty and AWS's settings name none: give one: us-east-1")
    retries = Config(retries={"mode": "standard", "max_attempts": 5})
    return session.client(service, region_name=region, config=retries)


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


def split_uri(s3_uri: str) -> tuple[str, str]:
    """Bucket and key (without a slash at either end) of `s3://BUCKET/KEY`; empty where it is none.

    >>> split_uri("s3://bucket/a/b/"), split_uri("bucket/a")
    (('bucket', 'a/b'), ('', ''))
    """
    parts = urlsplit(s3_uri)
    if parts.scheme != "s3" or parts.query or parts.fragment:
        return "", ""
    return parts.netloc, parts.path.strip("/")
