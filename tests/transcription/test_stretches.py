"""Which frames form a stretch of speech, and what is cut from the samples."""

import numpy as np
import pytest

from transcription import media, stretches, vad
from transcription.stretches import FRAME_SECONDS, MAX_FRAMES, PAD, Splitter, to_frames
from transcription.vad import FRAME


def split(probabilities, energies=None):
    """All stretches of frames: (first frame, end, starts in a split, ends in a split)."""
    splitter = Splitter()
    energies = np.ones(len(probabilities)) if energies is None else energies
    pairs = zip(probabilities, energies, strict=True)
    made = [splitter.push(probability, energy) for probability, energy in pairs]
    return [stretch for stretch in [*made, splitter.close()] if stretch]


def frames(*parts):
    """(seconds, probability) pairs -> a probability for each frame."""
    return np.concatenate([np.full(to_frames(seconds), value) for seconds, value in parts])


def test_a_short_pause_does_not_end_a_stretch_and_a_long_one_does():
    probabilities = frames((1, 0), (2, 0.9), (0.4, 0), (1, 0.9), (0.6, 0), (1, 0.9), (1, 0))
    limits = [(own[0] * FRAME_SECONDS, own[1] * FRAME_SECONDS) for own in split(probabilities)]
    assert np.allclose(limits, [(1, 4.4), (5, 6)], atol=0.06)


def test_a_probability_between_the_thresholds_neither_starts_nor_ends_speech():
    assert split(frames((2, 0.25))) == []
    [(start, end, *_)] = split(frames((1, 0.9), (2, 0.25), (1, 0.9)))
    assert (start, end) == (0, to_frames(1) * 2 + to_frames(2))


def test_speech_without_a_pause_is_split_at_its_quietest_frame_and_none_is_lost():
    probabilities = frames((70, 0.9))
    energies = np.ones(len(probabilities))
    quiet = [700, 1500]
    for frame in quiet:
        energies[frame - 3 : frame + 4] = 0.1
    energies[200:204] = 0.0  # in the first half: two pieces of 15 s and more, not of 6 s
    made = split(probabilities, energies)
    assert [abs(end - frame) <= 3 for (_, end, *_), frame in zip(made[:-1], quiet, strict=True)]
    assert all(end - start <= MAX_FRAMES for start, end, *_ in made)
    assert [start for start, *_ in made[1:]] == [end for _, end, *_ in made[:-1]]
    assert made[0][0] == 0 and made[-1][1] == len(probabilities)


class Loud(vad.SileroVAD):
    """Takes every loud frame for speech."""

    def forward(self, frames, state):
        return (frames.abs().amax(dim=1) > 0.1).float(), state


def test_stretches_hold_speech_and_a_fifth_of_a_second_around_it():
    """Whatever pieces the samples come in."""
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.01, 0.01, 60 * 16_000).astype(np.float32)
    for start, end in ((1.0, 3.0), (20.0, 25.0), (58.0, 60.0)):
        samples[int(start * 16_000) : int(end * 16_000)] *= 50
    for sizes in ([16_000] * 60, [1_001] * 1_000, [960_000]):
        pieces = np.split(samples, np.cumsum(sizes)[:-1])
        made = list(stretches.find_stretches(pieces, Loud()))
        assert np.allclose([own.speech_start for own in made], [1, 20, 58], atol=0.006)
        for own in made:
            assert own.speech_start - own.start == pytest.approx(PAD * FRAME_SECONDS, abs=0.04)
            first = round(own.start * 16_000)
            expected = samples[first : first + len(own.samples)]
            assert np.abs(own.samples / 32768 - expected).max() < 1e-4
        assert [round(own.seconds, 1) for own in made[:2]] == [2.4, 5.4]
        assert len(made[-1].samples) + round(made[-1].start * 16_000) == 960_000


def test_the_samples_that_are_held_do_not_grow_with_the_recording(monkeypatch):
    sizes = []
    concatenate = np.concatenate
    monkeypatch.setattr(
        stretches.np, "concatenate", lambda parts: sizes.append(len(r := concatenate(parts))) or r
    )
    loud = (np.full(16_000, 0.5, np.float32) for _ in range(1_000))  # no pause in 17 minutes
    made = sum(len(own.samples) for own in stretches.find_stretches(loud, Loud()))
    assert abs(made - 1_000 * 16_000) < FRAME
    assert max(sizes) < 60 * 16_000


def test_a_missing_wheel_is_named_with_its_requirements_file(monkeypatch):
    monkeypatch.setattr(vad.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(vad.UserError, match=r"pip install -r requirements-export\.txt"):
        vad.load_vad()


def test_a_gap_in_the_timestamps_is_silence(tmp_path):
    """A browser's recording that leaves silence out; a player's time starts with the file."""
    av = pytest.importorskip("av")
    file = tmp_path / "gap.mka"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for second in (1, 2, 7):  # nothing before 1 s and from 3 s to 7 s
            tone = np.full((1, 16_000), 8_000, np.int16)
            frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, second * 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    samples = np.concatenate(list(media.read_pieces(file)))
    assert len(samples) == pytest.approx(7 * 16_000, abs=100)
    loud = [bool(abs(samples[second * 16_000 + 8_000]) > 0.1) for second in range(7)]
    assert loud == [True, True, False, False, False, False, True]
