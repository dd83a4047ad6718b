"""Speech from espeak-ng, Marathi by default, by ctypes: the library is in package espeakng-loader.

espeak-ng carries noise and flutter over from one sentence to the next and cannot be reset, so equal
samples need a new process and the same sentences in the same order.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import espeakng_loader
import numpy as np
import soxr

# From espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2  # espeak_Synth returns when the callback has had every sample
CHARS_UTF8 = 1
POS_CHARACTER = 1
PARAMETER_RATE = 1  # words a minute
PARAMETER_PITCH = 3  # 0 to 100
OK = 0
WORD, END_OF_LIST = 1, 0  # types of events

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


class Event(ctypes.Structure):
    """espeak_EVENT."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


def speak(
    text: str, *, variant: str, words_per_minute: int, pitch: int, language: str = LANGUAGE
) -> tuple[np.ndarray, int]:
    """Speak one sentence.

    Args:
        text: in the script of the language.
        variant: name of a file in espeak-ng's `voices/!v`, for example "f2".
        words_per_minute: 80 to 450.
        pitch: 0 to 100; 50 is the variant's own.
        language: code of the voice.

    Returns:
        int16 (N,), and the sampling rate.
    """
    library, rate, pieces, _ = load()
    _set_voice(library, language.encode(), variant)
    assert library.espeak_SetParameter(PARAMETER_RATE, words_per_minute, 0) == OK
    assert library.espeak_SetParameter(PARAMETER_PITCH, pitch, 0) == OK
    pieces.clear()
    data = text.encode()
    status = library.espeak_Synth(data, len(data) + 1, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None)
    assert status == OK and library.espeak_Synchronize() == OK, f"espeak_Synth failed on {text!r}"
    return np.frombuffer(b"".join(pieces), dtype=np.int16), rate


def speak_words(
    sentence: str, *, variant: str, language: str = LANGUAGE, words_per_minute: int = 150
) -> tuple[np.ndarray, list[float]]:
    """A sentence after half a second of noise, before a second of it, and when its words begin.

    Returns:
        float32 (N,) at 16 kHz, and seconds.
    """
    library, rate, _, keep = load()
    starts: list[float] = []

    def hear(wave: Any, num_samples: int, events: Any) -> int:
        keep(wave, num_samples, None)
        starts.extend(event.sample / rate for event in _events(events) if event.type == WORD)
        return 0  # go on

    callback = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
    )(hear)
    library.espeak_SetSynthCallback(ctypes.cast(callback, SynthCallback))
    try:
        samples, _ = speak(
            sentence, variant=variant, words_per_minute=words_per_minute, pitch=50,
            language=language,
        )  # fmt: skip
    finally:
        library.espeak_SetSynthCallback(keep)
    speech = soxr.resample(samples / 32768, rate, 16_000)
    noise = 0.0005 * np.random.default_rng(0).standard_normal(24_000)
    whole = np.concatenate([noise[:8_000], speech, noise[8_000:]]).astype(np.float32)
    return whole, [start + 0.5 for start in starts]


def _events(events: Any) -> Iterator[Event]:
    index = 0
    while events and events[index].type != END_OF_LIST:
        yield events[index]
        index += 1


def _set_voice(library: ctypes.CDLL, language: bytes, variant: str) -> None:
    """Choose a voice in one variant; espeak-ng passes over an unknown one in silence."""
    name = language + b"+" + variant.encode()
    assert library.espeak_SetVoiceByName(name) == OK, f"no voice {name!r}"
    voice = library.espeak_GetCurrentVoice().contents
    assert voice.languages[1:] == language, f"{name!r} speaks {voice.languages!r}"
    assert voice.identifier.endswith(b"+" + variant.encode()), f"no variant {variant!r}"
