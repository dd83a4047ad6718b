"""How files of each container begin and end: what is behind the first of several in one file."""

import mmap
import re
import struct
from collections.abc import Iterator

from common.audio import AudioError

Bytes = bytes | mmap.mmap

# How a file begins. The header of an mp3 is a frame of zeros with the number of frames; an Ogg page
# that begins a stream has number 0 and granule position 0.
BEGINS = {
    "MP3": re.compile(
        rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]..(?:..)?(?:\0{32}|\0{17}|\0{9})(?:Xing|Info)", re.DOTALL
    ),
    "OGG": re.compile(rb"OggS\0\x02\0{8}.{4}\0{4}", re.DOTALL),
    "FLAC": re.compile(rb"fLaC(?<!\x7fFLAC.{4}fLaC)[\0\x80]\0\0\x22", re.DOTALL),  # not in Ogg
    "WAV": re.compile(rb"R(?:IFF|F64).{4}WAVE", re.DOTALL),
    "AIFF": re.compile(rb"FORM.{4}AIF[FC]", re.DOTALL),
    "CAF": re.compile(rb"caff\0\x01\0\0desc"),
    "AU": re.compile(rb"\.snd\0\0.{6}\0\0\0[\x01-\x1b]", re.DOTALL),
    "MP4": re.compile(rb"\0\0\0[\x10-\x80]ftyp[ -~]{4}"),
    "WEBM": re.compile(rb"\x1a\x45\xdf\xa3.{1,8}\x42\x86", re.DOTALL),
    "AMR": re.compile(rb"#!AMR(?:-WB)?\n"),
    "TTA": re.compile(rb"TTA1[\1-\3]\0"),
    "W64": re.compile(rb"riff\x2e\x91\xcf\x11\xa5\xd6"),
    "WMA": re.compile(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c"),
}
CODECS = {"WEBM": ("MP3", "FLAC"), "MP4": ("MP3",)}  # whose headers begin like files of their own
CODEC_HEADER = 4096  # bytes of the first cluster of a webm in which such a header may be
MPEG = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb\xf1\xf9]")  # a frame of mp3 or aac
AAC = re.compile(rb"\xff[\xf1\xf9]")
AAC_HEADER = 7  # bytes, which a frame's length counts
AAC_FRAMES = 4  # that follow each other: by chance never
COMPRESSED = ("MP3", "FLAC", "WEBM", "AMR", "WMA")  # whose bytes are as random ones
TAG = re.compile(rb"ID3[\x02-\x04]\0[\0\x40\x80][\0-\x7f]{4}")
WAVE_MP3 = 0x55  # the codec of a wav of mp3 frames
SEGMENT, CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"  # of a webm: all but its header; audio


def name_of(data: Bytes) -> str:
    """The container that a file begins with, a key of BEGINS, or `""`."""
    return next((name for name, pattern in BEGINS.items() if pattern.match(data)), "")


def refuse_rest(data: Bytes, container: str, position: int) -> None:
    """Raise AudioError if a file is cut off, or one of another container begins behind it.

    Args:
        data: the whole file.
        container: of the first one, a key of BEGINS or another name.
        position: in bytes, where the decoder stopped.
    """
    if container == "OGG":
        _refuse_unknown_length(data)
    end = end_of(data, container)
    if end > len(data):
        raise AudioError(
            f"the file is cut off: {len(data)} of {end} bytes are there: copy it again"
        )
    for name, start in _other_files(data, container, end, position):
        raise AudioError(
            f"a second file ({name}) begins at byte {start}: cut it off there, and join both with "
            "ffmpeg -i FIRST -i SECOND -filter_complex concat=n=2:v=0:a=1 NEW.flac"
        )


def _other_files(data: Bytes, container: str, end: int, position: int) -> Iterator[tuple[str, int]]:
    """Yield name and position of files of other containers behind the first."""
    codecs = () if end else CODECS.get(container, ())
    behind_tag = end or tag_end(data) + 1
    behind_header = data.find(CLUSTER) + CODEC_HEADER
    for name, pattern in BEGINS.items():
        first = behind_header if name in codecs else behind_tag
        if name == container:
            continue
        if name == "MP3" and data.find(b"Xing", first) < 0 and data.find(b"Info", first) < 0:
            continue  # its pattern is slow, because it begins with a common byte
        match = pattern.search(data, first)
        if match:
            yield name, match.start()
    aac = _find_aac(data, behind_tag) if not end and container in COMPRESSED else -1
    if aac >= 0:
        yield "AAC", aac
    if container == "MP3":
        return
    tag = TAG.search(data, behind_tag)
    for start in (end or position, tag.start() if tag else len(data)):
        frames = MPEG.match(data, after_tags(data, start))
        if frames and _go_on(data, frames):
            yield "MP3 or AAC", frames.start()


def _find_aac(data: Bytes, start: int) -> int:
    """Where frames of aac begin, each of which names its length in 13 bits; -1 if nowhere."""
    for match in AAC.finditer(data, start):
        position = match.start()
        head = data[position : position + 3]  # codec, rate and channels are those of all frames
        for _ in range(AAC_FRAMES - 1):
            length = int.from_bytes(data[position + 3 : position + 6], "big") >> 5 & 0x1FFF
            position += length
            if length < AAC_HEADER or data[position : position + 3] != head:
                break
        else:
            return match.start()
    return -1


def _go_on(data: Bytes, sync: re.Match[bytes]) -> bool:
    """Whether frames of mp3 or aac, which all begin with the same bytes, follow the first."""
    rest = data[sync.start() :]
    return rest.count(sync[0]) > 2 + len(rest) // 4096  # by chance 1 in 65,536 bytes


def after_tags(data: Bytes, position: int) -> int:
    """Where the tags of an mp3 (ID3 in front, ID3v1 and APE behind it) end."""
    while True:
        head = data[position : position + 16]
        if head.startswith(b"ID3"):
            position += tag_end(head)
        elif head.startswith(b"TAG"):
            position += 128
        elif head.startswith(b"APETAGEX"):
            position += 32 + int.from_bytes(head[12:16], "little")
        else:
            return position


# ------ where a file ends


def end_of(data: Bytes, container: str) -> int:
    """Where the first file ends, if its structure says so, else 0."""
    if container == "WAV":
        return _wav_end(data)
    if container == "OGG":
        return _ogg_end(data)
    if container == "MP4":
        return mp4_files(data)[-1][1]
    if container == "AIFF":
        return min(8 + int.from_bytes(data[4:8], "big"), len(data))
    return _webm_end(data) if container == "WEBM" else 0


def tag_end(data: Bytes) -> int:
    """Where an ID3 tag at the start ends: 10 bytes and its size, which is 28 bits in 4 bytes."""
    if data[:3] != b"ID3":
        return 0
    return 10 + sum(byte << 7 * index for index, byte in enumerate(reversed(data[6:10])))


def is_chunk_name(name: bytes) -> bool:
    """Whether four bytes may be the name of a chunk."""
    return all(32 <= byte < 127 for byte in name)


def _wav_end(data: Bytes) -> int:
    """Where a wav's first `data` chunk ends; where it begins, if its size is wrong."""
    position, is_mp3 = 12, False
    while position + 8 <= len(data):
        name, size = struct.unpack("<4sI", data[position : position + 8])
        start, end = position + 8, position + 8 + size
        is_mp3 |= name == b"fmt " and data[start : start + 1] == bytes([WAVE_MP3])
        if name == b"data" and end > len(data):
            return len(data) if is_mp3 else start
        if name == b"data":
            return end
        position = end + size % 2
    return len(data)


def _ogg_end(data: Bytes) -> int:
    """Where the pages end: behind the data if the last one is cut off."""
    return max((end for _, end in _ogg_pages(data)), default=0)


def _ogg_pages(data: Bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the pages of an Ogg file; the end of one that is cut off is too far."""
    start = tag_end(data)
    while data[start : start + 4] == b"OggS":
        is_whole = start + 27 <= len(data)
        end = end_of_page(data, start) if is_whole else start + 27
        yield start, end
        start = end


def _refuse_unknown_length(data: Bytes) -> None:
    """Raise AudioError if a stream of an Ogg file does not say where it ends.

    Decoders take the length from the position on the last page on which a packet ends: 8 bytes, -1
    for none. Such a page is invalid without one, and before those of earlier pages.
    """
    positions: list[list[int]] = []  # of each stream
    by_serial: dict[bytes, list[int]] = {}
    for start, _ in _ogg_pages(data):
        head = data[start : start + 27]
        serial, num_lengths = head[14:18], head[-1]
        if head[5] & 2:  # a stream begins
            by_serial[serial] = []
            positions.append(by_serial[serial])
        lengths = data[start + 27 : start + 27 + num_lengths]
        if lengths.strip(b"\xff") and serial in by_serial:
            by_serial[serial].append(int.from_bytes(head[6:14], "little", signed=True))
    if any(own and own[-1] < max(0, *own) for own in positions):
        raise AudioError(
            "its last Ogg page does not say where the audio ends: rewrite it with "
            "ffmpeg -i FILE NEW.flac"
        )


def end_of_page(data: Bytes, start: int) -> int:
    """Where an Ogg page ends: 27 bytes, a table of lengths, and as many bytes as they sum to."""
    num_segments = data[start + 26]
    first = start + 27
    return first + num_segments + sum(data[first : first + num_segments])


def files_in(data: Bytes) -> list[tuple[int, int]]:
    """Start and end of the files of one container, neither Ogg nor mp3, that are joined."""
    container = name_of(data)
    if container == "MP4":
        return mp4_files(data)
    if container in ("", "OGG", "MP3"):
        return [(0, len(data))]
    starts = [match.start() for match in BEGINS[container].finditer(data)]
    return list(zip(starts, [*starts[1:], len(data)], strict=True))


def mp4_files(data: Bytes) -> list[tuple[int, int]]:
    """Start and end of each file in an mp4, m4a or mov, which begin with a box `ftyp`.

    The last ends behind the data if it is cut off.
    """
    starts, position = [0], 0
    while position + 8 <= len(data):
        size, name = struct.unpack(">I4s", data[position : position + 8])
        if size == 1:
            size = int.from_bytes(data[position + 8 : position + 16], "big")
        end = position + size if size else len(data)
        if not is_chunk_name(name) or 0 < size < 8:
            break
        if end > len(data) and name not in (b"mdat", b"moov", b"moof"):
            break
        if name == b"ftyp" and position:
            starts.append(position)
        position = end
    return list(zip(starts, [*starts[1:], position], strict=True))


def _webm_end(data: Bytes) -> int:
    """Where the segment of a webm or mka ends; 0 if it does not say, as in a live recording."""
    size, start = _webm_size(data, 4)
    segment = start + size
    if data[segment : segment + 4] != SEGMENT:
        return 0
    size, start = _webm_size(data, segment + 4)
    return start + size if size else 0


def _webm_size(data: Bytes, position: int) -> tuple[int, int]:
    """An element's size, 0 if unknown, and where its content starts.

    The zeros before the first bit that is set are the number of further bytes.
    """
    length = 9 - data[position : position + 1].ljust(1, b"\xff")[0].bit_length()
    most = (1 << 7 * length) - 1
    size = int.from_bytes(data[position : position + length], "big") & most
    return (0 if size == most else size), position + length
