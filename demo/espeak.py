"""Speech from espeak-ng, through ctypes: the library sits in the package espeakng-loader.

espeak-ng carries noise and flutter over from one sentence to the next and cannot be reset, so equal
samples need a new process and the same sentences in the same order.
"""

import ctypes
import functools
from collections.abc import Callable

import espeakng_loader
import numpy as np

# From espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2  # espeak_Synth returns when the callback has had every sample
CHARS_UTF8 = 1
POS_CHARACTER = 1
PARAMETER_RATE = 1  # words a minute
PARAMETER_PITCH = 3  # 0 to 100
OK = 0

LANGUAGE = "mr"
RANDOM_SEED = 0  # of the breath noise; espeak-ng takes the time of day if nobody sets it

SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Voice(ctypes.Structure):
    """The beginning of espeak_VOICE."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),  # one byte of priority, then the language's code
        ("identifier", ctypes.c_char_p),
    )


@functools.cache
def load() -> tuple[ctypes.CDLL, int, list[bytes], Callable[..., int]]:
    """Load and initialise the library, once a process.

    Returns:
        the library, its sampling rate, the list that the callback appends samples to, and the
        callback itself, which must outlive every call.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(Voice)
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    library.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    rate = library.espeak_Initialize(
        AUDIO_OUTPUT_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0
    )
    assert rate > 0, "espeak_Initialize failed"
    pieces: list[bytes] = []

    def keep(wave: "ctypes._Pointer[ctypes.c_short]", num_samples: int, _: int) -> int:
        if num_samples > 0:
            pieces.append(ctypes.string_at(wave, 2 * num_samples))
        return 0  # go on

    callback = SynthCallback(keep)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(RANDOM_SEED)
    return library, rate, pieces, callback


def speak(
    text: str, *, variant: str, words_per_minute: int, pitch: int, language: str = LANGUAGE
) -> tuple[np.ndarray, int]:
    """Speak one sentence.

    Args:
        text: in the language's own script.
        variant: name of a file in espeak-ng's `voices/!v`, for example "f2".
        words_per_minute: 80 to 450.
        pitch: 0 to 100; 50 is the variant's own.
        language: of espeak-ng's voice.

    Returns:
        int16 (N,), and the sampling rate.
    """
    library, rate, pieces, _ = load()
    _set_voice(library, language, variant)
    assert library.espeak_SetParameter(PARAMETER_RATE, words_per_minute, 0) == OK
    assert library.espeak_SetParameter(PARAMETER_PITCH, pitch, 0) == OK
    pieces.clear()
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    assert status == OK and library.espeak_Synchronize() == OK, f"espeak_Synth failed on {text!r}"
    return np.frombuffer(b"".join(pieces), dtype=np.int16), rate


def _set_voice(library: ctypes.CDLL, language: str, variant: str) -> None:
    """Choose a voice in one variant; espeak-ng passes over an unknown one in silence."""
    name = f"{language}+{variant}".encode()
    assert library.espeak_SetVoiceByName(name) == OK, f"no voice {name!r}"
    voice = library.espeak_GetCurrentVoice().contents
    assert voice.languages[1:] == language.encode(), f"{name!r} speaks {voice.languages!r}"
    assert voice.identifier.endswith(f"+{variant}".encode()), f"no variant {variant!r}"
