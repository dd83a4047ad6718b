"""A small Marathi speech corpus in the layout of Common Voice, spoken by espeak-ng.

    python -m demo.speak_corpus --output_dir DIR

No sentence and no voice of the dev and test splits is in train. The same options, with the same
versions of espeak-ng and libsndfile, give the same bytes.
"""

import concurrent.futures
import csv
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import random
from pathlib import Path

import numpy as np
import soundfile

from common import cli, files
from demo import espeak

SENTENCES_FILE = Path(__file__).with_name("sentences_mr.txt")
RECIPE_FILE = "recipe.json"

# Variants with formants of a human voice whose peaks stay inside 16 bits, low (m) and high (f).
VOICES = {
    "train": ("m1", "m2", "m3", "m4", "m7", "Diogo", "f1", "f2", "f4", "linda"),
    "dev": ("m5", "f5"),
    "test": ("m6", "f3"),
}
MIN_WORDS_PER_MINUTE, MAX_WORDS_PER_MINUTE = 130, 190  # unhurried to brisk
MIN_PITCH, MAX_PITCH = 35, 65  # a variant's own pitch is 50

MIN_SECONDS, MAX_SECONDS = 0.5, 15.0  # three to nine words lie far inside
MIN_PEAK = 1000  # of 32,767; the quietest clip of the default corpus peaks at 12,800

COLUMNS = (
    "client_id",
    "path",
    "sentence",
    "up_votes",
    "down_votes",
    "age",
    "gender",
    "accents",
    "variant",
    "locale",
    "segment",
)


@dataclasses.dataclass
class Config:
    output_dir: Path  # folder to write, Common Voice's layout
    seed: int = 0  # of the split, the voices, the speeds and the pitches
    train_sentences: int = 240  # sentences in train
    dev_sentences: int = 20  # sentences in dev, spoken once each
    test_sentences: int = 40  # sentences in test, spoken once each
    voices_per_sentence: int = 2  # how many training voices speak each training sentence


@dataclasses.dataclass(frozen=True)
class Clip:
    split: str
    number: int
    sentence: str
    variant: str
    words_per_minute: int
    pitch: int

    @property
    def file_name(self) -> str:
        return f"common_voice_mr_{self.number:08d}.mp3"


def main(config: Config) -> None:
    sentences = SENTENCES_FILE.read_text(encoding="utf-8").splitlines()
    check(config, num_sentences=len(sentences))
    recipe = describe(config)
    if files.has_content(config.output_dir):
        check_same_recipe(config.output_dir, recipe)
        print(f"{config.output_dir} holds this corpus already: nothing to do")
        return
    clips = plan(config, sentences)
    print(f"speaking {len(clips)} clips with espeak-ng")
    with files.new_folder(config.output_dir) as folder:
        seconds = speak_all(clips, folder / "clips")
        for split in VOICES:
            write_tsv(folder / f"{split}.tsv", [clip for clip in clips if clip.split == split])
        files.write_json(folder / RECIPE_FILE, recipe)
    for split in VOICES:
        lengths = [s for clip, s in zip(clips, seconds, strict=True) if clip.split == split]
        print(f"{split}: {len(lengths)} clips, {sum(lengths) / 60:.1f} minutes")
    print(f"corpus: {config.output_dir}")


# ------ options


def check(config: Config, *, num_sentences: int) -> None:
    """Raise UserError with every problem of the options."""
    problems = []
    counts = {
        name: getattr(config, name)
        for name in ("train_sentences", "dev_sentences", "test_sentences")
    }
    for name, count in counts.items():
        if count < 1:
            problems.append(f"--{name} {count} is not positive: give 1 or more")
    wanted = sum(counts.values())
    if wanted > num_sentences:
        options = " + ".join(f"--{name} {count}" for name, count in counts.items())
        problems.append(
            f"{options} is {wanted}, but {SENTENCES_FILE.name} has {num_sentences} sentences: "
            "ask for fewer"
        )
    num_voices = len(VOICES["train"])
    if not 1 <= config.voices_per_sentence <= num_voices:
        problems.append(
            f"--voices_per_sentence {config.voices_per_sentence} is not possible: "
            f"give 1 to {num_voices}, the number of training voices"
        )
    if problems:
        raise cli.UserError("; ".join(problems))


def describe(config: Config) -> dict[str, int | str]:
    """Everything that the corpus depends on, besides this file."""
    options = {k: v for k, v in dataclasses.asdict(config).items() if k != "output_dir"}
    return {
        **options,
        "sentences_sha256": hashlib.sha256(SENTENCES_FILE.read_bytes()).hexdigest(),
        "voices": " ".join(f"{split}={','.join(names)}" for split, names in VOICES.items()),
        "espeakng_loader": importlib.metadata.version("espeakng-loader"),
        "libsndfile": soundfile.__libsndfile_version__,
    }


def check_same_recipe(output_dir: Path, recipe: dict[str, int | str]) -> None:
    """Raise UserError unless `output_dir` is a corpus made by `recipe`."""
    remedy = "delete it or give another folder"
    try:
        found = json.loads((output_dir / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise cli.UserError(
            f"--output_dir {output_dir} exists and is not a corpus of this script: {remedy}"
        ) from None
    differences = [
        f"{key} {found.get(key)!r} instead of {value!r}"
        for key, value in recipe.items()
        if found.get(key) != value
    ]
    if differences:
        raise cli.UserError(
            f"--output_dir {output_dir} holds a corpus made with {', '.join(differences)}: {remedy}"
        )


# ------ clips


def plan(config: Config, sentences: list[str]) -> list[Clip]:
    """Give every sentence its split, its voices, its speeds and its pitches."""
    rng = random.Random(config.seed)
    shuffled = iter(rng.sample(sentences, len(sentences)))
    spoken = []  # (split, sentence, variant)
    for _ in range(config.train_sentences):
        sentence = next(shuffled)
        for variant in rng.sample(VOICES["train"], config.voices_per_sentence):
            spoken.append(("train", sentence, variant))
    for split, count in (("dev", config.dev_sentences), ("test", config.test_sentences)):
        for index in range(count):
            spoken.append((split, next(shuffled), VOICES[split][index % len(VOICES[split])]))
    return [
        Clip(
            split,
            number,
            sentence,
            variant,
            words_per_minute=rng.randint(MIN_WORDS_PER_MINUTE, MAX_WORDS_PER_MINUTE),
            pitch=rng.randint(MIN_PITCH, MAX_PITCH),
        )
        for number, (split, sentence, variant) in enumerate(spoken)
    ]


def speak_all(clips: list[Clip], clips_dir: Path) -> list[float]:
    """Write every clip, in order, in one new process (see `espeak`); return their seconds."""
    clips_dir.mkdir()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as worker:
        return list(worker.map(speak_clip, clips, [clips_dir] * len(clips), chunksize=16))


def speak_clip(clip: Clip, clips_dir: Path) -> float:
    """Speak and write one clip as MP3 at espeak-ng's own rate; return its seconds."""
    samples, rate = espeak.speak(
        clip.sentence,
        variant=clip.variant,
        words_per_minute=clip.words_per_minute,
        pitch=clip.pitch,
    )
    seconds = len(samples) / rate
    assert MIN_SECONDS < seconds < MAX_SECONDS, f"{clip} lasts {seconds:.2f} s"
    peak = int(np.abs(samples.astype(np.int32)).max())
    assert peak > MIN_PEAK, f"{clip} is silent: its peak is {peak}"
    soundfile.write(clips_dir / clip.file_name, samples, rate, format="MP3")
    return seconds


def write_tsv(path: Path, clips: list[Clip]) -> None:
    """Write one split's table: tab separated, unquoted, as Common Voice does."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(
            file,
            COLUMNS,
            restval="",
            delimiter="\t",
            lineterminator="\n",
            quoting=csv.QUOTE_NONE,
            quotechar=None,
        )
        table.writeheader()
        for clip in clips:
            table.writerow(
                {
                    "client_id": hashlib.sha512(f"mr+{clip.variant}".encode()).hexdigest(),
                    "path": clip.file_name,
                    "sentence": clip.sentence,
                    "up_votes": 2,
                    "down_votes": 0,
                    "locale": "mr",
                }
            )


if __name__ == "__main__":
    cli.run(main, Config)
