"""Archives of SageMaker: whole, within limits, and never outside of their folder."""

import io
import tarfile

import pytest

from common import cli
from jobs.archive import unpack

CONTENT = bytes(range(256)) * 9


def entry(name, content=b"", **members):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in members.items():
        setattr(info, key, value)
    return info, io.BytesIO(content)


def pack(file, *entries):
    with tarfile.open(file, "w:gz") as archive:
        for info, content in entries:
            archive.addfile(info, content)
    return file


def test_an_archive_is_unpacked_and_absolute_names_land_in_the_folder(tmp_path):
    file = pack(tmp_path / "a.tar.gz", entry("adapter/x", b"1"), entry("/adapter/y", b"2"))
    unpack(file, tmp_path / "out")
    assert (tmp_path / "out" / "adapter" / "x").read_bytes() == b"1"
    assert (tmp_path / "out" / "adapter" / "y").read_bytes() == b"2"


@pytest.mark.parametrize(
    "evil",
    [
        entry("../evil"),
        entry("a/../../evil"),
        entry("evil", type=tarfile.SYMTYPE, linkname="../outside"),
        entry("evil", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        entry("evil", type=tarfile.LNKTYPE, linkname="../outside"),
        entry("evil", type=tarfile.CHRTYPE),
    ],
    ids=["parent", "hidden parent", "link", "absolute link", "hard link", "device"],
)
def test_names_links_and_devices_that_lead_out_are_refused(evil, tmp_path):
    (tmp_path / "outside").touch()
    file = pack(tmp_path / "model.tar.gz", evil)
    with pytest.raises(cli.UserError, match=r"model\.tar\.gz: cannot be unpacked \("):
        unpack(file, tmp_path / "out")
    assert not list(tmp_path.rglob("evil"))


def test_an_archive_that_is_too_large_is_refused_by_its_first_header(tmp_path):
    info, _ = entry("bomb")
    info.size = 65 * 2**30
    file = tmp_path / "model.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.fileobj.write(info.tobuf())
    with pytest.raises(cli.UserError, match=r"model\.tar\.gz: unpacks to over 64 GiB"):
        unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_an_archive_that_was_cut_off_is_refused_in_one_line(kept, tmp_path):
    file = pack(tmp_path / "model.tar.gz", *(entry(f"{n}", CONTENT) for n in range(9)))
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(cli.UserError, match=r"cannot be unpacked \(.+\): copy or write it again"):
        unpack(file, tmp_path / "out", "s3://b/model.tar.gz")


def test_a_damaged_archive_is_refused_in_one_line(tmp_path):
    file = pack(tmp_path / "model.tar.gz", *(entry(f"{n}", CONTENT) for n in range(9)))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(cli.UserError, match="cannot be unpacked"):
        unpack(file, tmp_path / "out")
