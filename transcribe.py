"""Transcripts of recordings of any length: txt, srt, vtt, tsv and json, with a time for every word.

    python transcribe.py --audio interview.mp4 --model openai/whisper-small --adapter run/adapter

Speech is found by Silero VAD, cut at pauses, and decoded in batches at the window that the model
was trained for, by the decoder of eval_wer.py. A folder is resumed where a run was killed.
"""

import gc
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until cli.run: collecting takes a quarter of the imports, which leave no garbage

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from common import cli, ct2, labels, precision, whisper
from common.accelerator import close, open_accelerator, say
from common.languages import language_code
from common.precision import DTYPES, Precision
from common.systems import check_languages, load_system
from common.windows import DecodeWindowMode
from transcription.formats import FORMATS
from transcription.media import announced_seconds, check_installed
from transcription.pipeline import Work, groups, read_stretches, transcribe_group
from transcription.progress import Meter
from transcription.pseudo_labels import check_place, write_manifest
from transcription.record import describe, open_folder, unfinished, write_failed
from transcription.recordings import find_recordings
from transcription.runtimes import Runtime, RuntimeKind, TorchRuntime, load_ct2
from transcription.scoring import score
from transcription.segments import Options, find_heads
from transcription.texts import read_texts
from transcription.training_clips import write_clips
from transcription.vad import load_vad


@dataclass
class Config:
    """Transcripts and subtitles of recordings."""

    audio: str = os.environ.get("SM_CHANNEL_AUDIO", "")  # audio or video file, folder, or manifest
    model: str = "openai/whisper-small"  # folder or Hub id; or the folder of an export
    adapter: str = ""  # folder of an adapter; empty: --model alone
    runtime: RuntimeKind = "auto"  # torch, or ct2 for an export to CTranslate2; auto: by --model
    language: str = ""  # code or name; empty: detected for each file
    language_by_segment: bool = False  # detect the language of every segment instead
    task: str = "transcribe"  # transcribe, or translate into English
    formats: str = "txt,srt,json"  # of txt, srt, vtt, tsv and json
    word_times: bool = True  # time every word
    min_pause: float = 0.5  # seconds without speech that end a segment
    no_speech: float = 0.7  # drop a segment if the model is this sure that nobody speaks
    context: DecodeWindowMode = "auto"  # natural follows the speech, full is 30 s, auto: as trained
    batch_seconds: float = 240.0  # seconds of audio window per batch
    num_beams: int = 1  # beams of the search; 1: greedy decoding
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    manifest: str = ""  # JSON lines of clips for preprocess.py; empty: none
    min_confidence: float = 0.5  # probability of a token, on average, of a row of the manifest
    min_language: float = 0.5  # probability of the language of a row of the manifest
    align: str = ""  # transcripts that the manifest's texts come from: a .txt, or a folder of them
    min_match: float = 0.5  # share of letters that are recognized in a row of --align
    reference: str = ""  # transcripts to score against, in wer.json: a .txt, or a folder of them
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "transcripts")  # for the transcripts


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    formats, is_export = config.formats.split(","), ct2.is_ct2(config.model)
    unknown = [name for name in formats if name not in FORMATS]
    cli.refuse(
        [
            (
                config.runtime == "torch" and is_export,
                f"--runtime torch: --model {config.model} is a CTranslate2 export: leave out "
                "--runtime, or give the checkpoint that it was made from",
            ),
            (
                config.runtime == "ct2" and not is_export,
                f"--runtime ct2: --model {config.model} has no {ct2.WEIGHTS}: give a folder that "
                "export.py wrote with --formats ct2",
            ),
            (
                is_export and bool(config.adapter),
                f"--adapter {config.adapter}: cannot be added to the CTranslate2 export --model "
                f"{config.model}: run export.py with the adapter, and leave it out here",
            ),
            (
                is_export and config.precision != "auto",
                f"--precision {config.precision}: the CTranslate2 export --model {config.model} "
                "is computed as it is stored: leave it out, or export it in that type",
            ),
            (not config.audio, "--audio is empty: give a file, a folder or a manifest"),
            (
                bool(unknown),
                f"--formats {config.formats}: {', '.join(unknown) or 'nothing'} is not a format: "
                f"give some of {','.join(FORMATS)}",
            ),
            (
                len(set(formats)) < len(formats),
                f"--formats {config.formats}: names one twice: keep one",
            ),
            (
                bool(config.language) and config.language_by_segment,
                f"--language {config.language}: is not detected: leave out "
                "--language_by_segment true, or --language",
            ),
            (
                bool(config.manifest) and "json" not in formats,
                f"--manifest {config.manifest}: is made from json transcripts: add json to "
                "--formats",
            ),
            (
                bool(config.reference) and "json" not in formats,
                f"--reference {config.reference}: json transcripts are scored: add json to "
                "--formats",
            ),
            (
                bool(config.align) and not config.manifest,
                f"--align {config.align}: clips are written to --manifest: give it a file",
            ),
            (
                bool(config.align) and config.task == "translate",
                f"--align {config.align}: a translation matches no transcript: leave out --task",
            ),
            (config.num_beams < 1, f"--num_beams {config.num_beams}: give 1 or more"),
            (
                bool(config.manifest)
                and not config.align
                and config.num_beams > 1
                and not is_export,
                f"--num_beams {config.num_beams}: PyTorch gives no probability of such a text, by "
                "which --manifest is filtered: leave it out, or export with --formats ct2",
            ),
            *cli.out_of_range(
                config,
                positive=["batch_seconds", "min_pause", "no_speech"],
                shares=["min_confidence", "min_language", "min_match"],
            ),
        ]
    )


def load_runtime(
    config: Config, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Runtime:
    """The model, ready to decode in PyTorch or, if it is an export for it, in CTranslate2."""
    if ct2.is_ct2(config.model):
        return load_ct2(
            config.model,
            tokenizer,
            window_mode=config.context,
            device=accelerator.device,
            num_beams=config.num_beams,
        )
    system = load_system(
        config.model,
        config.adapter,
        tokenizer,
        accelerator,
        window_mode=config.context,
        dtype=DTYPES[config.precision],
    )
    return TorchRuntime(system, config.precision, config.num_beams)


def main(config: Config) -> None:
    check(config)
    check_installed()
    if ct2.is_ct2(config.model):
        ct2.check_installed()
    whisper.quiet_libraries()
    if not ct2.is_ct2(config.model):
        config = replace(config, precision=precision.choose(config.precision))
    recordings, passed_over = find_recordings(config.audio)
    if passed_over:
        print(f"not read: {passed_over}")

    if config.manifest:
        check_place(Path(config.manifest), recordings)
    transcripts = read_texts("--align", config.align, recordings) if config.align else {}
    references = read_texts("--reference", config.reference, recordings) if config.reference else {}

    # ------ model
    vad = load_vad()
    is_export = ct2.is_ct2(config.model)
    accelerator = open_accelerator(
        precision="fp32" if is_export else config.precision, timeout_minutes=120.0
    )
    if accelerator.num_processes > 1:
        raise cli.UserError(
            f"transcribe.py was started as {accelerator.num_processes} processes: start it with "
            "python, and give each GPU a part of the recordings"
        )
    tokenizer = labels.load_tokenizer(config.model, config.language, config.task)
    codes = [own.language for own in recordings if own.language]
    check_languages(config.model, tokenizer, codes, f"rows of --audio {config.audio}")
    runtime = load_runtime(config, tokenizer, accelerator)
    folder, formats = Path(config.output_dir), config.formats.split(",")
    open_folder(folder, config, runtime)

    # ------ recordings
    left = unfinished(groups(recordings), folder, formats)
    num_left = sum(map(len, left))
    say(
        accelerator,
        f"{len(recordings)} recordings, {len(recordings) - num_left} transcribed before; "
        f"{runtime.name}, {runtime.window_mode} window, {runtime.precision}",
    )
    meter = Meter(sum(announced_seconds(recording.path) for group in left for recording in group))
    language = language_code(config.language, "--language") if config.language else ""
    options = Options(config.task, config.batch_seconds, no_speech_at=config.no_speech)
    if config.word_times and left:
        stretches = read_stretches(recordings, vad, config.min_pause)
        options = replace(options, heads=find_heads(runtime, stretches, language, options))
        if not options.heads:
            say(accelerator, "warning: no heads of alignment found: words get no times")
    work = Work(
        runtime=runtime,
        vad=vad,
        options=options,
        formats=formats,
        folder=folder,
        header=describe(config, runtime),
        language=language,
        by_segment=config.language_by_segment,
        min_pause=config.min_pause,
        progress=meter.add,
    )
    failed = {}
    for group in left:
        written, reasons = transcribe_group(group, work)
        failed |= reasons
        meter.report(written)

    # ------ results
    meter.summarise()
    close(accelerator)
    write_failed(folder, failed)
    if config.align:
        file, limits = Path(config.manifest), {"min_match": config.min_match}
        print(write_clips(file, folder, recordings, transcripts, **limits))
    elif config.manifest:
        limits = {"min_confidence": config.min_confidence, "min_language": config.min_language}
        print(write_manifest(Path(config.manifest), folder, recordings, **limits))
    if references:
        print(score(folder, recordings, references, tokenizer))
    for recording, reason in failed.items():
        print(f"failed: {recording.path}: {reason}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Config)
