"""Unpacking what SageMaker packs: model.tar.gz and output.tar.gz."""

import gzip
import tarfile
import zlib
from pathlib import Path

from common.cli import UserError, first_line

MAX_UNPACKED = 64 * 2**30  # bytes; a full fine-tune of large-v3 has 6 GB, twice with its best model
UNREADABLE = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def unpack(archive: Path, folder: Path, name: str = "") -> None:
    """Unpack a `.tar.gz`; nothing is written outside of `folder`.

    Python's `data` filter refuses devices and all names and links that lead out of the folder;
    absolute names lose their first slash.

    Args:
        name: of the archive in errors; empty: its path.

    Raises:
        UserError: it cannot be read to its end, is refused by the filter, or is too large.
    """
    name, num_bytes = name or str(archive), 0
    try:
        with tarfile.open(archive, mode="r:gz") as packed:
            for member in packed:
                num_bytes += member.size
                if num_bytes > MAX_UNPACKED:  # before the rest is decompressed
                    raise UserError(f"{name}: unpacks to over 64 GiB: check what the job wrote")
            packed.extractall(folder, filter="data")
            while packed.fileobj.read(2**20):  # to its end, where gzip compares its checksum
                pass
    except UNREADABLE as error:
        raise UserError(
            f"{name}: cannot be unpacked ({first_line(error)}): copy or write it again"
        ) from error
