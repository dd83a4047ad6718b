"""Word error rate of a Whisper, of LoRA adapters on it, or of all of them on the same clips.

    python eval_wer.py --model openai/whisper-large-v2 --adapter run/adapter --data_dir prepared \\
        --compare_base true --output_dir run/wer

Any number of processes (`accelerate launch eval_wer.py ...`) gives one corpus score, the same to
the last bit in fp32: a clip's window and token cap depend on the clip alone, predictions are
gathered by clip id, and errors are counted over the corpus once.
"""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import cli, labels, precision, predictions, whisper
from common.accelerator import close, explain_lost_contact, open_accelerator, say
from common.memory import peak_memory_gib
from common.metrics import ClipCounts
from common.precision import DTYPES, Precision
from common.predictions import DecodeOptions, Prediction
from common.prepared import column, load_prepared
from common.provenance import describe_run
from common.windows import POSITIONS_PER_SECOND, DecodeWindowMode
from evaluation.breakdown import breakdown, words_of
from evaluation.confusions import confusions
from evaluation.html_report import write_report
from evaluation.report import worst_clips, write_results
from evaluation.statistics import confidence_correlation, significance
from evaluation.systems import System, load_system


@dataclass
class Config:
    """Word and character error rate of a Whisper, with or without a LoRA adapter."""

    model: str = "openai/whisper-small"  # base or full fine-tune: a folder or a Hub id
    adapter: str = ""  # folder of an adapter, or A,B,C to compare several; empty: --model alone
    compare_base: bool = False  # also score --model without an adapter, on the same clips
    data_dir: str = os.environ.get("SM_CHANNEL_TEST", "prepared")  # output of preprocess.py
    split: str = "test"  # train, validation or test
    max_clips: int = 0  # number of clips to score, from the first on; 0: all
    context: DecodeWindowMode = "auto"  # natural follows the clip, full is 30 s, auto: as trained
    batch_seconds: float = 0.0  # seconds of audio window per batch; 0: what fits memory
    num_beams: int = 1  # beams of the search; 1: greedy decoding
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    num_workers: int = 1  # processes that read audio ahead; 0: the main process
    collective_timeout: float = 120.0  # minutes a process waits for the other processes
    report_audio_mb: float = 10.0  # megabytes of voices in report.html at most; 0: none
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "wer")  # for scores, texts, report


# ------ options and data


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    folders = list(name_adapters(config.adapter).values())
    repeated = sorted({folder for folder in folders if folders.count(folder) > 1})
    cli.refuse(
        [
            (
                config.compare_base and not config.adapter,
                "--compare_base true needs an adapter to compare: give --adapter",
            ),
            *(
                (
                    not folder or not Path(folder).is_dir(),
                    f"--adapter {folder or config.adapter}: no such folder: give a trained "
                    "adapter's, or several as A,B,C",
                )
                for folder in dict.fromkeys(folders)
            ),
            (
                bool(repeated),
                f"--adapter {config.adapter}: {', '.join(repeated)} is given twice: keep one",
            ),
            (
                config.batch_seconds < 0,
                f"--batch_seconds {config.batch_seconds}: give a positive number, or 0",
            ),
            (config.num_beams < 1, f"--num_beams {config.num_beams}: give 1 or more"),
            (
                not 0 <= config.report_audio_mb < math.inf,
                f"--report_audio_mb {config.report_audio_mb}: give a number of megabytes, or 0",
            ),
        ]
    )


def name_adapters(adapter: str) -> dict[str, str]:
    """The folders of --adapter by the names of their systems.

    >>> name_adapters("run/adapter"), name_adapters("a,b"), name_adapters("")
    ({'adapter': 'run/adapter'}, {'adapter_1': 'a', 'adapter_2': 'b'}, {})
    """
    if "," not in adapter:
        return {"adapter": adapter} if adapter else {}
    return {f"adapter_{index}": folder for index, folder in enumerate(adapter.split(","), 1)}


def load_split(config: Config) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """The clips to score, the training clips if they are there, and preprocess.json."""
    splits, report = load_prepared(config.data_dir)
    if config.split not in splits:
        raise cli.UserError(
            f"--split {config.split}: {config.data_dir} has only {', '.join(splits)}: give one"
        )
    dataset = splits[config.split]
    if config.max_clips:
        dataset = dataset.select(range(min(config.max_clips, len(dataset))))
    return dataset, splits.get("train"), report


def check_languages(config: Config, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """Refuse a model that has no token for a language of the clips."""
    codes = {str(code) for code in column(dataset, "language")}
    unknown = sorted(code for code in codes if not labels.has_language(tokenizer, code))
    if unknown:
        raise cli.UserError(
            f"--model {config.model}: cannot write {', '.join(unknown)}, the language of clips in "
            f"--data_dir {config.data_dir}: give a multilingual model that has it"
        )


# ------ one system


def transcribe(
    config: Config,
    accelerator: Accelerator,
    system: System,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    options: DecodeOptions,
) -> tuple[dict[str, Prediction], dict[str, Any]]:
    """Decode all clips with a system: predictions by clip id, and how they were decoded."""
    seconds = column(dataset, "seconds")
    batches, batch_seconds = predictions.plan_batches(
        accelerator,
        system.model.config,
        seconds,
        bytes_per_value=system.model.dtype.itemsize,
        window_mode=system.window_mode,
        margin=system.margin,
        batch_seconds=config.batch_seconds,
        num_beams=config.num_beams,
    )
    margin = system.margin.margin / POSITIONS_PER_SECOND
    silence = f" ({margin:.2f} s after the speech)" if system.window_mode == "natural" else ""
    say(
        accelerator,
        f"decoding with {system.name}, {system.window_mode} window{silence}, "
        f"{len(batches)} batches",
    )
    start = time.perf_counter()
    own = predictions.transcribe(
        system.model,
        tokenizer,
        dataset,
        batches[accelerator.process_index :: accelerator.num_processes],
        options,
    )
    texts = predictions.gather(own)
    wall_seconds, audio_seconds = time.perf_counter() - start, float(np.sum(seconds))
    return texts, {
        "window": system.window_mode,
        "audio_seconds": audio_seconds,
        "batch_seconds": batch_seconds,
        "wall_seconds": wall_seconds,
        "real_time_factor": wall_seconds / audio_seconds,
        "peak_memory_gib": peak_memory_gib(),  # of rank 0 so far
    }


# ------ main


def main(config: Config) -> None:
    check(config)
    with explain_lost_contact(config.collective_timeout):
        evaluate(config)


def evaluate(config: Config) -> None:
    """Score each system on the same clips."""
    whisper.quiet_libraries()
    config = replace(config, precision=precision.choose(config.precision))
    accelerator = open_accelerator(
        precision=config.precision, timeout_minutes=config.collective_timeout
    )

    # ------ data
    dataset, train, report = load_split(config)
    tokenizer = labels.load_tokenizer(config.model)
    check_languages(config, tokenizer, dataset)
    say(
        accelerator,
        f"{config.split}: {len(dataset)} clips, {column(dataset, 'seconds').sum() / 60:.1f} "
        f"minutes, {accelerator.num_processes} processes, {config.precision}",
    )
    options = DecodeOptions(
        task=report["config"]["task"],
        tokens_per_second=report["tokens_per_second"]["p999"],
        num_beams=config.num_beams,
        num_workers=config.num_workers,
        quiet=not accelerator.is_main_process,
    )

    # ------ base and adapters
    systems: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Prediction]] = {}
    counts: dict[str, dict[str, ClipCounts]] = {}
    adapters = name_adapters(config.adapter)
    base = {"base": ""} if config.compare_base or not adapters else {}
    for name, adapter in (base | adapters).items():
        system = load_system(
            config.model,
            adapter,
            tokenizer,
            window_mode=config.context,
            dtype=DTYPES[config.precision],
            device=accelerator.device,
        )
        texts[name], figures = transcribe(config, accelerator, system, tokenizer, dataset, options)
        counts[name] = predictions.count_errors(dataset, texts[name], tokenizer, task=options.task)
        scores = predictions.summarise(texts[name], counts[name])
        worst = worst_clips(dataset, texts[name], counts[name]["keep_marks"])
        systems[name] = scores | figures | {"worst": worst}
        del system  # before the next one is loaded

    # ------ results
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        languages = predictions.written_languages(dataset, options.task)
        seen = None
        if train is not None:
            seen = words_of(train, predictions.written_languages(train, options.task))
        words = {name: own["raw"].words for name, own in counts.items()}
        groups = breakdown(dataset, languages, seen, words)
        ids, speakers = column(dataset, "id"), column(dataset, "speaker")
        for name in systems:
            confused = confusions(dataset, texts[name], languages)
            logprobs = [texts[name][str(clip_id)].logprob for clip_id in ids]
            systems[name] |= {
                "breakdown": groups[name],
                "confusions": confused,
                "logprob_error_correlation": confidence_correlation(logprobs, words[name]),
            }
        write_results(
            folder,
            dataset,
            systems,
            texts,
            counts,
            significance(ids, speakers, counts),
            adapters,
            describe_run(config),
        )
        address = write_report(folder, dataset, adapters=adapters, audio_mb=config.report_audio_mb)
        print(address, flush=True)
    close(accelerator)


if __name__ == "__main__":
    cli.run(main, Config)
