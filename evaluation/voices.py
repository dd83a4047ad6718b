"""Clips as Opus in `data:` URIs, for the players of report.html."""

import base64
import io
import zlib

import numpy as np
import soundfile

from common.audio import SAMPLE_RATE

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
SERIAL = slice(14, 18)  # of an Ogg page's header, RFC 3533
CHECKSUM = slice(22, 26)
HEADER_BYTES = 27


def data_uri(pcm: np.ndarray) -> str:
    """Encode samples at 16 kHz, int16 (N,), as Opus in Ogg, about 22 kbit/s."""
    buffer = io.BytesIO()
    soundfile.write(buffer, pcm, SAMPLE_RATE, format="OGG", subtype="OPUS")
    encoded = base64.b64encode(without_serial(buffer.getvalue())).decode("ascii")
    return f"data:audio/ogg;base64,{encoded}"


def without_serial(ogg: bytes) -> bytes:
    """Set the random serial number of a stream to 0, so that equal samples give equal bytes."""
    pages, start = [], 0
    while start < len(ogg):
        segments = ogg[start + HEADER_BYTES - 1]
        lacing = ogg[start + HEADER_BYTES : start + HEADER_BYTES + segments]
        end = start + HEADER_BYTES + segments + sum(lacing)
        page = bytearray(ogg[start:end])
        page[SERIAL] = page[CHECKSUM] = bytes(4)
        page[CHECKSUM] = checksum(bytes(page)).to_bytes(4, "little")
        pages.append(bytes(page))
        start = end
    return b"".join(pages)


def checksum(page: bytes) -> int:
    """Ogg's CRC: zlib's polynomial with the most significant bit first, no inversion (RFC 3533)."""
    reflected = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
