"""Audio files that are longer than their header says, mended so that libsndfile reads all of them.

libsndfile ends where a header, or an estimate from the first frame, says that the audio ends. Files
joined end to end, streamed files and mp3 of variable bitrate without a length go on after that.
"""

import io
import mmap
import os
import re
import struct

import numpy as np
import soundfile

WAV_FORMATS = ("WAV", "WAVEX", "RF64")
CANNOT_SEEK = 39  # libsndfile's SFE_BAD_SEEK: soundfile seeks to the end of a stream of no length
BLOCK = 1 << 20  # frames decoded at once to count them
ENDLESS = 1 << 40  # bytes, more than any file has
LONGER_FRAMES = 4  # of mp3: a header leaves out one at the start, and padding at the end
NO_LENGTH = (1 << 63) - 1  # libsndfile's number of frames of a FLAC stream that names none
UNKNOWN_SIZE = 0xFFFFFFFF
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # title and the like, behind the audio

SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of an mp3 frame: layer III
# Where another stream begins. An mp3's header is a frame of zeros with its number of frames; an
# Ogg page that begins a stream has number 0 and granule position 0.
BEGINS = {
    "MP3": re.compile(
        rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]..(?:..)?(?:\0{32}|\0{17}|\0{9})(?:Xing|Info)", re.DOTALL
    ),
    "OGG": re.compile(rb"OggS\0\x02\0{8}.{4}\0{4}", re.DOTALL),
    "FLAC": re.compile(rb"fLaC[\0\x80]\0\0\x22"),
    "WAV": re.compile(rb"(?:RIFF|RF64).{4}WAVE", re.DOTALL),
}


class AudioError(ValueError):
    """Audio that cannot be read; the message says why, for `dropped.jsonl`."""


class Endless(io.BytesIO):
    """A file that seems to go on for ever, so that the decoder reads to where it really ends."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek; the end is far away."""
        if whence == os.SEEK_END:
            offset, whence = ENDLESS + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        """Read; there are zeros at that end, where mpg123 looks for a tag."""
        if self.tell() < ENDLESS // 2:
            return super().readinto(buffer)
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def kind(form: str, head: bytes = b"") -> str:
    """What a file is by libsndfile's name of its container, or by its first 12 bytes, or `""`."""
    if form in WAV_FORMATS or BEGINS["WAV"].match(head):
        return "WAV"
    return form or ("FLAC" if head.startswith(b"fLaC") else "")


def has_more(data: bytes | mmap.mmap, container: str, position: int) -> bool:
    """Whether there is audio behind that which the header announces.

    Args:
        data: the whole file.
        container: of `kind`.
        position: in bytes, where the decoder has come to at what it takes for the end.
    """
    if container in ("OGG", "FLAC") and _later_starts(data, container):
        return True
    if position >= len(data):
        return False
    if container == "WAV":
        return not _wav_chunks(data)[2] or bool(BEGINS["WAV"].search(data, position))
    if container not in MENDERS:  # some keep titles and pictures behind the audio
        return position < len(data) // 2
    is_tag = data[position : position + 16].startswith(TAGS)
    return not is_tag or bool(BEGINS["MP3"].search(data, position))


def mend(data: bytes, container: str) -> list[tuple[io.BytesIO, int]]:
    """The streams in a file of this `kind`, each as a file that libsndfile reads to its end.

    Returns:
        Pairs of a file and its number of frames (samples of each channel).

    Raises:
        soundfile.LibsndfileError: one of them is damaged.
        AudioError: a container that is not mended.
    """
    if container not in MENDERS:
        raise AudioError(
            f"there is more in it than its {container} header announces: rewrite it with "
            "ffmpeg -i FILE NEW.flac"
        )
    starts = [0, *_later_starts(data, container)] if container in BEGINS else [0]
    ends = [*starts[1:], len(data)]
    return [MENDERS[container](data[start:end]) for start, end in zip(starts, ends, strict=True)]


def _later_starts(data: bytes | mmap.mmap, container: str) -> list[int]:
    """Where streams begin after the first one. Ogg streams that begin together are one."""
    first = 0
    if data[:3] == b"ID3":  # a tag of 10 bytes and as many as 28 bits say, 7 a byte
        first = 10 + sum(byte << 7 * at for at, byte in enumerate(reversed(data[6:10])))
    found = [match.start() for match in BEGINS[container].finditer(data) if match.start() > first]
    if container != "OGG":
        return found
    first_page = _page_end(data, 0)
    later, page_end = [], first_page
    for start in found:
        if start != page_end:
            later.append(start)
        page_end = _page_end(data, start)
    return later


def _page_end(data: bytes | mmap.mmap, start: int) -> int:
    """Where an Ogg page ends: 27 bytes, a table of lengths, and what they add up to."""
    num_segments = data[start + 26]
    first = start + 27
    return first + num_segments + sum(data[first : first + num_segments])


def _as_it_is(data: bytes) -> tuple[io.BytesIO, int]:
    stream = io.BytesIO(data)
    with soundfile.SoundFile(stream) as file:
        frames = file.frames
    stream.seek(0)
    return stream, frames


def _decoded(stream: io.BytesIO) -> int:
    """Frames that the decoder finds, whatever the header says.

    It fills a block before it fails: to seek to the end of a stream of no length, or to find more
    mp3 in other bytes behind it. Any other failure is damage.
    """
    total = 0
    with soundfile.SoundFile(stream) as file:
        block = np.empty((BLOCK, file.channels), np.float32)
        while True:
            block[:] = np.nan
            try:
                frames, is_end = len(file.read(out=block)), False
            except soundfile.LibsndfileError as error:
                is_end = file.format == "MP3" and not _goes_on(stream)
                if error.code != CANNOT_SEEK and not is_end:
                    raise
                frames = int((~np.isnan(block[:, 0])).sum())
            total += frames
            if is_end or frames < BLOCK:
                break
    stream.seek(0)
    return total


def _goes_on(stream: io.BytesIO) -> bool:
    """Whether mp3 frames, which all begin alike, follow where the decoder has stopped."""
    data = stream.getvalue()
    sync = SYNC.search(data)
    rest = data[stream.tell() :]
    return bool(sync) and rest.count(sync[0]) > 2 + len(rest) // 4096  # by chance one in 65,536


def _mp3(data: bytes) -> tuple[io.BytesIO, int]:
    """With its header's length, which leaves out padding, unless that is too short."""
    header = BEGINS["MP3"].search(data)
    stream = Endless(data)
    frames = _decoded(stream)
    if not header:
        return stream, frames
    bare = Endless(data[: header.end() - 4] + bytes(4) + data[header.end() :])
    bare_frames = _decoded(bare)
    per_frame = 1152 if data[header.start() + 1] >= 0xFA else 576  # MPEG-1, or 2 and 2.5
    if bare_frames - frames > LONGER_FRAMES * per_frame:
        return bare, bare_frames
    return stream, frames


def _flac(data: bytes) -> tuple[io.BytesIO, int]:
    """With the number of samples that are there, the last 36 bits of 8 bytes of STREAMINFO."""
    at = data.index(b"fLaC") + 18
    fields = int.from_bytes(data[at : at + 8], "big") >> 36 << 36

    def with_total(frames: int) -> io.BytesIO:
        return io.BytesIO(data[:at] + (fields | frames).to_bytes(8, "big") + data[at + 8 :])

    frames = _decoded(with_total(0))
    return with_total(frames), frames


def _wav_chunks(data: bytes | mmap.mmap) -> tuple[bytes, list[tuple[int, int]], bool]:
    """A wav's `fmt ` chunk, from where to where its audio lies, and whether its header says so."""
    position, form, spans, is_right, long_size = 12, b"", [], True, 0
    while position + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[position : position + 8])
        start = position + 8
        if name == b"ds64":  # of RF64: the sizes of the file and of its audio, 8 bytes each
            long_size = int.from_bytes(data[start + 8 : start + 16], "little")
        if name == b"data" and size == UNKNOWN_SIZE and long_size:
            size = long_size
        end = start + size
        if name == b"fmt ":
            form = data[position:end]
        elif name == b"data":
            is_right &= not spans
            if end > len(data) or _is_audio(data, end, size):
                end, is_right = len(data), False
            spans.append((start, end))
        elif not _is_name(name):
            break
        position = end + end % 2
    return form, spans, is_right


def _is_name(name: bytes) -> bool:
    """Whether these four bytes may name a chunk."""
    return all(32 <= byte < 127 for byte in name)


def _is_audio(data: bytes | mmap.mmap, position: int, size: int) -> bool:
    """Whether sound goes on behind a `data` chunk of `size` bytes: no chunk, no tag, no padding."""
    for at in (position, position + 1):  # a chunk of odd size is padded, or should be
        head = data[at : at + 8]
        if len(head) < 8 or head.startswith(TAGS):
            return False
        name, length = struct.unpack("<4sI", head)
        if _is_name(name) and (size or at + 8 + length <= len(data)):
            return False
    return any(data[at : at + BLOCK].strip(b"\0") for at in range(position, len(data), BLOCK))


def _wav(data: bytes) -> tuple[io.BytesIO, int]:
    """With one `data` chunk of all that is audio, behind the `fmt ` chunk."""
    form, spans, _ = _wav_chunks(data)
    content = b"".join(data[start:end] for start, end in spans)
    riff = struct.pack("<4sI4s", b"RIFF", 12 + len(form) + len(content), b"WAVE")
    return _as_it_is(riff + form + struct.pack("<4sI", b"data", len(content)) + content)


def _au(data: bytes) -> tuple[io.BytesIO, int]:
    """With no size: to the end."""
    return _as_it_is(data[:8] + b"\xff" * 4 + data[12:])


MENDERS = {"MP3": _mp3, "OGG": _as_it_is, "FLAC": _flac, "WAV": _wav, "AU": _au}
