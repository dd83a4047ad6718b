"""Repairs audio files that are longer than their header says, so that libsndfile reads all of them.

libsndfile stops where a header, or an estimate from the first frame, says that the audio ends.
Concatenated files, streamed files and mp3 of variable bitrate without a length go on after that.
"""

import io
import mmap
import os
import re
import struct

import numpy as np
import soundfile

from common.audio import AudioError
from prepare.containers import BEGINS, after_tags, end_of_page, is_chunk_name, refuse_rest, tag_end

WAV_FORMATS = ("WAV", "WAVEX", "RF64")
CANNOT_SEEK = 39  # libsndfile's SFE_BAD_SEEK: soundfile seeks to the end of a stream of no length
BLOCK = 1 << 20  # frames that are decoded at once, to count them
ENDLESS = 1 << 40  # bytes, more than any file has
PADDING_FRAMES = 4  # mp3 frames, at the start and the end, that a header does not count
LAST_FRAMES = 2  # of them, at the end
MP3_FRAME_BYTES = 1441  # the longest: 320 kbit/s at 32 kHz
NO_LENGTH = (1 << 63) - 1  # libsndfile's number of frames of a FLAC stream that names none
UNKNOWN_SIZE = 0xFFFFFFFF
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN")  # metadata behind the audio

SYNC = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of an mp3 frame: layer III


class Endless(io.BytesIO):
    """A file that seems endless, so that the decoder reads to its real end."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Seek; the end is at ENDLESS."""
        if whence == os.SEEK_END:
            offset, whence = ENDLESS + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        """Read; near ENDLESS, where mpg123 looks for a tag, there are zeros."""
        if self.tell() < ENDLESS // 2:
            return super().readinto(buffer)
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def container_of(sound_format: str, head: bytes = b"") -> str:
    """The container, from libsndfile's name for it or a file's first 12 bytes; `""` if unknown."""
    if sound_format in WAV_FORMATS or BEGINS["WAV"].match(head):
        return "WAV"
    return sound_format or ("FLAC" if head.startswith(b"fLaC") else "")


def has_more(data: bytes | mmap.mmap, container: str, position: int) -> bool:
    """Whether a file has audio after that which its header announces.

    Args:
        data: the whole file.
        container: as `container_of` names it.
        position: in bytes, where the decoder stopped.

    Raises:
        AudioError: it is cut off, or goes on in another container.
    """
    refuse_rest(data, container, position)
    if container in ("OGG", "FLAC", "AIFF", "CAF", "W64") and _later_starts(data, container):
        return True
    if position >= len(data):
        return False
    if container == "WAV":
        return not _wav_chunks(data)[2] or bool(BEGINS["WAV"].search(data, position))
    if container not in REPAIRS:  # some have titles and pictures behind the audio
        return position < len(data) // 2
    if BEGINS["MP3"].search(data, position):
        return True
    frames = SYNC.match(data, after_tags(data, position))
    if frames and frames.start() > position and not _is_padding(data, frames.start()):
        return True
    is_tag = data[position : position + 16].startswith(TAGS)
    return not is_tag and not _is_padding(data, position)


def _is_padding(data: bytes | mmap.mmap, position: int) -> bool:
    """Whether the rest of an mp3 is padding that its header, which counts frames, leaves out."""
    if len(data) - position > LAST_FRAMES * MP3_FRAME_BYTES:
        return False
    header = BEGINS["MP3"].search(data)
    return bool(header) and data[position:].count(header[0][:2]) <= LAST_FRAMES


def repair(data: bytes, container: str) -> list[tuple[io.BytesIO, int]]:
    """The streams of a file, each as a file that libsndfile reads to its end.

    Args:
        data: the whole file.
        container: as `container_of` names it.

    Returns:
        Pairs of a file and its number of frames (samples per channel).

    Raises:
        soundfile.LibsndfileError: a stream is damaged.
        AudioError: files in this container cannot be repaired.
    """
    if container not in REPAIRS:
        raise AudioError(
            f"there is more in it than its {container} header announces: rewrite it with "
            "ffmpeg -i FILE NEW.flac"
        )
    starts = [0, *_later_starts(data, container)] if container in BEGINS else [0]
    ends = [*starts[1:], len(data)]
    return [REPAIRS[container](data[start:end]) for start, end in zip(starts, ends, strict=True)]


def _later_starts(data: bytes | mmap.mmap, container: str) -> list[int]:
    """Positions where streams after the first begin; Ogg streams that begin together are one."""
    first = tag_end(data)
    starts = [match.start() for match in BEGINS[container].finditer(data) if match.start() > first]
    if container != "OGG":
        return starts
    later, page_end = [], end_of_page(data, 0)
    for start in starts:
        if start != page_end:
            later.append(start)
        page_end = end_of_page(data, start)
    return later


def _unchanged(data: bytes) -> tuple[io.BytesIO, int]:
    """The data as a file, and the number of frames that its header announces."""
    stream = io.BytesIO(data)
    with soundfile.SoundFile(stream) as file:
        frames = file.frames
    stream.seek(0)
    return stream, frames


def _count_frames(stream: io.BytesIO) -> int:
    """Number of frames that the decoder reads, whatever the header says.

    At the end of a stream without a length, or at other bytes behind an mp3, the decoder fails
    after it has filled the block. Any other failure means damage.
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
    """Whether mp3 frames, which all begin with the same bytes, follow where the decoder stopped."""
    data = stream.getvalue()
    sync = SYNC.search(data)
    rest = data[stream.tell() :]
    return bool(sync) and rest.count(sync[0]) > 2 + len(rest) // 4096  # by chance 1 in 65,536 bytes


def _mp3(data: bytes) -> tuple[io.BytesIO, int]:
    """The file with its header, whose length excludes padding, unless that length is too short."""
    header = BEGINS["MP3"].search(data)
    stream = Endless(data)
    frames = _count_frames(stream)
    if not header:
        return stream, frames
    bare = Endless(data[: header.end() - 4] + bytes(4) + data[header.end() :])
    bare_frames = _count_frames(bare)
    per_frame = 1152 if data[header.start() + 1] >= 0xFA else 576  # MPEG-1, or 2 and 2.5
    if bare_frames - frames > PADDING_FRAMES * per_frame:
        return bare, bare_frames
    return stream, frames


def _flac(data: bytes) -> tuple[io.BytesIO, int]:
    """The file with its real number of frames, the last 36 bits of 8 bytes in STREAMINFO."""
    start = data.index(b"fLaC") + 18
    end = start + 8
    fields = int.from_bytes(data[start:end], "big") >> 36 << 36

    def with_total(frames: int) -> io.BytesIO:
        return io.BytesIO(data[:start] + (fields | frames).to_bytes(8, "big") + data[end:])

    frames = _count_frames(with_total(0))
    return with_total(frames), frames


def _wav_chunks(data: bytes | mmap.mmap) -> tuple[bytes, list[tuple[int, int]], bool]:
    """A wav's `fmt ` chunk, the spans of its audio in bytes, and whether its header is right."""
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
        elif not is_chunk_name(name):
            break
        position = end + end % 2
    return form, spans, is_right


def _is_audio(data: bytes | mmap.mmap, position: int, size: int) -> bool:
    """Whether audio, not a chunk, a tag or padding, follows a `data` chunk of `size` bytes."""
    for start in (position, position + 1):  # a chunk of odd size is padded, or should be
        head = data[start : start + 8]
        if len(head) < 8 or head.startswith(TAGS):
            return False
        name, length = struct.unpack("<4sI", head)
        if is_chunk_name(name) and (size or start + 8 + length <= len(data)):
            return False
    blocks = (data[start : start + BLOCK] for start in range(position, len(data), BLOCK))
    return any(block.strip(b"\0") for block in blocks)


def _wav(data: bytes) -> tuple[io.BytesIO, int]:
    """The file with its `fmt ` chunk, and all audio in one `data` chunk."""
    form, spans, _ = _wav_chunks(data)
    content = b"".join(data[start:end] for start, end in spans)
    riff = struct.pack("<4sI4s", b"RIFF", 12 + len(form) + len(content), b"WAVE")
    return _unchanged(riff + form + struct.pack("<4sI", b"data", len(content)) + content)


def _au(data: bytes) -> tuple[io.BytesIO, int]:
    """The file without a size, so that it is read to its end."""
    return _unchanged(data[:8] + b"\xff" * 4 + data[12:])


REPAIRS = {"MP3": _mp3, "OGG": _unchanged, "FLAC": _flac, "WAV": _wav, "AU": _au}
