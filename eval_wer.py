"""Word error rate of a Whisper, of a LoRA adapter on it, or of both on the same clips.

    python eval_wer.py --model openai/whisper-large-v2 --adapter run/adapter --data_dir prepared \\
        --compare_base true --output_dir run/wer

Any number of processes (`accelerate launch eval_wer.py ...`) gives one corpus score, the same to
the last bit in fp32: a clip's window and token cap depend on the clip alone, predictions are
gathered by clip id, and errors are counted over the corpus once.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from common import batching, cli, decoding, engine, labels, metrics, precision, whisper
from common.batching import DecodeBatch, DecodeContext, DecodeWindow
from common.collator import SpeechCollator, load_batches
from common.dataset import column, load_prepared
from common.files import write_json, write_text
from common.memory import CAP_MARGIN, device_memory_gib, peak_memory_gib, plan_decoding
from common.precision import DTYPES, Precision
from common.progress import track
from common.recipe import recipe

CAP_EXTRA = 16  # tokens on top, for clips so short that a rate says little
WORST_CLIPS = 20


@dataclass
class Config:
    """Word and character error rate of a Whisper, with or without a LoRA adapter."""

    model: str = "openai/whisper-small"  # base or full fine-tune: folder or Hub id
    adapter: str = ""  # adapter folder that train_lora.py wrote; empty scores --model alone
    compare_base: bool = False  # score --model without the adapter too, on the same clips
    data_dir: str = os.environ.get("SM_CHANNEL_TEST", "prepared")  # folder of preprocess.py
    split: str = "test"  # train, validation or test
    max_clips: int = 0  # score only the first so many clips; 0 scores all
    context: DecodeContext = "auto"  # natural follows the clip, full is 30 s, auto as trained
    batch_seconds: float = 0.0  # seconds of window a batch; 0 fits the memory
    num_beams: int = 1  # 1 decodes greedily
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    num_workers: int = 1  # processes that read audio ahead; 0 reads in the main one
    collective_timeout: float = 120.0  # minutes that a process waits for the others
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "wer")  # for wer.json, predictions.jsonl


@dataclass(frozen=True)
class Prediction:
    """What was decoded from one clip."""

    id: str
    text: str
    hit_cap: bool  # the token cap cut it off: most likely a loop
    decoded_again: bool = False  # at 30 seconds, as its own window gave a loop or hit the cap


# ------ decoding


def load_for_decoding(
    model: str, adapter: str, *, dtype: torch.dtype, device: torch.device
) -> WhisperForConditionalGeneration:
    """Load a base, merge the adapter (if not empty) in float32, then convert the weights once."""
    base = whisper.load_base(model, dtype=torch.float32)
    if adapter:
        base = whisper.load_merged(base, adapter)
    return base.to(device, dtype).eval()


def collator_for(model: WhisperForConditionalGeneration) -> SpeechCollator:
    """The collator with a model's start token."""
    return SpeechCollator(model.config.decoder_start_token_id, model.config.pad_token_id)


def token_cap(seconds: float, tokens_per_second: float) -> int:
    """Most new tokens a clip may take: what its duration can hold and some more.

    Args:
        tokens_per_second: the rate that 99.9 % of the prepared clips stay below.
    """
    return min(
        math.ceil(seconds * tokens_per_second * CAP_MARGIN) + CAP_EXTRA,
        labels.MAX_LABELS - decoding.PROMPT_LENGTH,
    )


def transcribe(
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    *,
    task: str,
    tokens_per_second: float,
    num_beams: int = 1,
    num_workers: int = 0,
    quiet: bool = True,
) -> list[Prediction]:
    """Decode `batches` of clips of `dataset` in this process.

    A clip whose text loops or hits its cap at a window shorter than 30 seconds is decoded once more
    at 30 seconds, and that text counts: which clips are is a matter of each clip alone.
    """
    once = partial(
        _transcribe_once, model, tokenizer, dataset, task=task, tokens_per_second=tokens_per_second,
        num_beams=num_beams, num_workers=num_workers, quiet=quiet,
    )  # fmt: skip
    found = once(batches)
    again = sorted(clip for clip, (_, failed) in found.items() if failed)
    if again:
        held = max(sum(batch.windows) for batch in batches)  # as much memory as before
        planned = batching.decode_plan(
            column(dataset, "seconds")[again],
            batch_seconds=held / batching.POSITIONS_PER_SECOND,
            context="full",
            window=batching.UNTRAINED,
        )
        wide = [replace(one, clips=tuple(again[row] for row in one.clips)) for one in planned]
        for clip, (prediction, _) in once(wide).items():
            found[clip] = replace(prediction, decoded_again=True), False
    return [prediction for prediction, _ in found.values()]


def _transcribe_once(
    model: WhisperForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    batches: Sequence[DecodeBatch],
    *,
    task: str,
    tokens_per_second: float,
    num_beams: int,
    num_workers: int,
    quiet: bool,
) -> dict[int, tuple[Prediction, bool]]:
    """Predictions by row of `dataset`, and whether each is one that 30 seconds may mend."""
    collate = collator_for(model)
    english_only = labels.is_english_only(tokenizer)
    seconds, languages = column(dataset, "seconds"), column(dataset, "language")
    ids = column(dataset, "id")
    loader = load_batches(dataset, batches, collate, num_workers=num_workers)
    found = {}
    collated = track(loader, total=len(batches), what="decoding, batches", quiet=quiet)
    for batch, inputs in zip(batches, collated, strict=True):
        clips = list(batch.clips)
        caps = [token_cap(float(seconds[clip]), tokens_per_second) for clip in clips]
        decoded = decoding.decode(
            model,
            inputs["waves"],
            windows=batch.windows,
            languages=None if english_only else [str(languages[clip]) for clip in clips],
            task=task,
            caps=caps,
            num_beams=num_beams,
        )
        for clip, window, tokens, cap in zip(clips, batch.windows, decoded, caps, strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            hit_cap = len(tokens) >= cap
            failed = window < batching.FULL_CONTEXT and (hit_cap or decoding.loops(tokens))
            found[clip] = Prediction(str(ids[clip]), text, hit_cap), failed
    return found


def gather(predictions: list[Prediction]) -> dict[str, Prediction]:
    """All ranks' predictions by clip id, on every rank."""
    return {found.id: found for found in gather_object(predictions)}


# ------ scores


def written_languages(dataset: Dataset, task: str) -> list[str]:
    """The codes of the languages that the clips' texts are in: translations are English."""
    return [
        "en" if task == "translate" else str(language) for language in column(dataset, "language")
    ]


def score(
    dataset: Dataset,
    predictions: dict[str, Prediction],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
) -> dict[str, Any]:
    """Count errors over the corpus on the stored transcripts, under each normaliser.

    Args:
        predictions: one for each clip of `dataset`, by id.
        tokenizer: may hold the spelling table of the English normaliser.
        task: `transcribe` or `translate`, whose texts are English.
    """
    languages = written_languages(dataset, task)
    references = [str(text) for text in column(dataset, "text")]
    found = [predictions[str(clip_id)] for clip_id in column(dataset, "id")]
    texts = [one.text for one in found]
    spelling = getattr(tokenizer, "english_spelling_normalizer", None)
    names = metrics.normalisers_for(languages)
    return {
        "clips": len(found),
        "clips_at_cap": sum(one.hit_cap for one in found),
        "clips_decoded_again": sum(one.decoded_again for one in found),
        "normalisers": {
            name: metrics.ErrorRate(name, spelling=spelling, languages=languages).compute(
                predictions=texts, references=references
            )
            for name in names
        },
    }


def worst_clips(
    dataset: Dataset, predictions: dict[str, Prediction], task: str
) -> list[dict[str, Any]]:
    """The clips with the most word errors (marks kept), worst first."""
    rows = []
    told = column(dataset, "id"), column(dataset, "text"), written_languages(dataset, task)
    for clip_id, text, language in zip(*told, strict=True):
        said = predictions[str(clip_id)]
        counts = metrics.count_errors(
            metrics.keep_marks(str(text), language),
            metrics.keep_marks(said.text, language),
            "word",
        )
        rows.append(
            {
                "id": said.id,
                "word_errors": counts.errors,
                "reference_words": counts.reference_length,
                "reference": str(text),
                "hypothesis": said.text,
                "hit_cap": said.hit_cap,
                "decoded_again": said.decoded_again,
            }
        )
    return sorted(rows, key=lambda row: (-row["word_errors"], row["id"]))[:WORST_CLIPS]


def table(systems: dict[str, dict[str, Any]]) -> str:
    """Rates of all systems side by side, a line a measure."""
    first = next(iter(systems.values()))
    lines = [" " * 22 + "".join(f"{name:>12}" for name in systems)]
    lines.append(f"{'window':<22}" + "".join(f"{one['window']:>12}" for one in systems.values()))
    for rate in ("wer", "cer"):
        for normaliser in first["normalisers"]:
            values = (one["normalisers"][normaliser][rate] for one in systems.values())
            lines.append(
                f"{rate.upper()} {normaliser:<18}" + "".join(f"{value:12.2f}" for value in values)
            )
    units = {name: rates["unit"] for name, rates in first["normalisers"].items()}
    by_letter = [f"{name} by {unit}" for name, unit in units.items() if unit != "word"]
    if by_letter:
        lines.append(f"WER is counted by word, but {', '.join(by_letter)}")
    lines += [_edits(systems, normaliser) for normaliser in first["normalisers"]]
    last = (
        ("clips_at_cap", "12d"), ("clips_decoded_again", "12d"), ("real_time_factor", "12.3f"),
        ("peak_memory_gib", "12.2f"),
    )  # fmt: skip
    for measure, form in last:
        values = (one[measure] for one in systems.values())
        lines.append(f"{measure:<22}" + "".join(f"{value:{form}}" for value in values))
    return "\n".join(lines)


def key_values(system: dict[str, Any]) -> str:
    """Rates in one line, as a program reads them: `wer_raw=68.7 cer_raw=28.7 ...`."""
    return " ".join(
        f"{rate}_{name}={rates[rate]:.5g}"
        for name, rates in system["normalisers"].items()
        for rate in ("wer", "cer")
    )


def _edits(systems: dict[str, dict[str, Any]], normaliser: str) -> str:
    """Word substitutions + deletions + insertions of all systems."""
    words = (one["normalisers"][normaliser]["words"] for one in systems.values())
    edits = (f"{w['substitutions']}+{w['deletions']}+{w['insertions']}" for w in words)
    return f"S+D+I {normaliser:<16}" + "".join(f"{edit:>12}" for edit in edits)


def write_results(
    config: Config,
    dataset: Dataset,
    systems: dict[str, dict[str, Any]],
    texts: dict[str, dict[str, Prediction]],
) -> None:
    """Write predictions.jsonl and wer.json, print the table."""
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in dataset.select_columns(["id", "text", "seconds", "language"]):
        said = {name: found[row["id"]] for name, found in texts.items()}
        row |= {name: one.text for name, one in said.items()}
        row |= {f"{name}_hit_cap": one.hit_cap for name, one in said.items()}
        row |= {f"{name}_decoded_again": one.decoded_again for name, one in said.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(output / "predictions.jsonl", "".join(lines))
    write_json(output / "wer.json", systems | {"recipe": recipe(config)})
    print(table(systems))
    for name, system in systems.items():
        print(f"{name}: {key_values(system)}")
    print(f"scores {output / 'wer.json'}, texts {output / 'predictions.jsonl'}", flush=True)


# ------ main


def check(config: Config) -> None:
    """Refuse options that cannot be meant, all at once."""
    problems = []
    if config.compare_base and not config.adapter:
        problems.append("--compare_base true needs an adapter to compare: give --adapter")
    if config.adapter and not Path(config.adapter).is_dir():
        problems.append(f"--adapter {config.adapter}: no such folder: give a trained adapter's")
    if config.batch_seconds < 0:
        problems.append(f"--batch_seconds {config.batch_seconds}: give a positive number, or 0")
    if config.num_beams < 1:
        problems.append(f"--num_beams {config.num_beams}: give 1 or more")
    if problems:
        raise cli.UserError("; ".join(problems))


def check_languages(config: Config, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    """Refuse a model that cannot be asked for the clips' languages."""
    codes = {str(code) for code in column(dataset, "language")}
    unknown = sorted(code for code in codes if not labels.has_language(tokenizer, code))
    if unknown:
        raise cli.UserError(
            f"--model {config.model}: cannot write {', '.join(unknown)}, the language of clips in "
            f"--data_dir {config.data_dir}: give a multilingual model that has it"
        )


def read_record(trained: str, option: str) -> dict[str, Any] | None:
    """What train_lora.py wrote beside an adapter or a model; `None` for one trained elsewhere."""
    file = Path(trained) / "recipe.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise cli.UserError(
            f"{option} {trained}: its recipe.json is damaged ({error}): copy it again, or remove "
            "it to score at 30 seconds"
        ) from error
    is_ours = isinstance(record, dict) and {"base_probe", "window"} <= record.keys()
    return record if is_ours else None  # of another program


def check_base(config: Config, record: dict[str, Any], model: torch.nn.Module) -> None:
    """Refuse an adapter whose own record says that it was trained on another base."""
    if not whisper.same_base(record["base_probe"], whisper.base_probe(model)):
        raise cli.UserError(
            f"--adapter {config.adapter}: was trained on {record['config']['model']}, whose "
            f"weights are not those of --model {config.model}: give that base"
        )


def plan_batches(
    accelerator: Accelerator,
    model_config: WhisperConfig,
    seconds: np.ndarray,
    *,
    bytes_per_value: int,
    context: DecodeContext,
    window: DecodeWindow,
    batch_seconds: float = 0.0,
    num_beams: int = 1,
) -> tuple[list[DecodeBatch], float]:
    """Batches that fit the memory of every process, as many for each; their seconds of window.

    All processes must call. What earlier batches have left in the allocator's cache is given back.

    Args:
        seconds: (N,) length of each clip.
        bytes_per_value: of keys and values.
        batch_seconds: given by hand; 0 fits the memory.
    """
    clear_device_cache(garbage_collection=True)
    of = accelerator.num_processes
    fits = plan_decoding(
        model_config,
        memory_gib=engine.least(accelerator, device_memory_gib(accelerator.device, of)),
        bytes_per_value=bytes_per_value,
        num_beams=num_beams,
    )
    batch_seconds = batch_seconds or fits
    batches = batching.decode_plan(
        seconds, batch_seconds=batch_seconds, context=context, window=window, num_processes=of
    )
    return batches, batch_seconds


def main(config: Config) -> None:
    check(config)
    with engine.clear_errors(config.collective_timeout):
        evaluate(config)


def evaluate(config: Config) -> None:
    whisper.quiet_libraries()
    config = replace(config, precision=precision.choose(config.precision))
    accelerator = engine.open_accelerator(
        precision=config.precision, timeout_minutes=config.collective_timeout
    )
    say = partial(engine.say, accelerator)

    # ------ data
    splits, prepared = load_prepared(config.data_dir)
    if config.split not in splits:
        raise cli.UserError(
            f"--split {config.split}: {config.data_dir} has only {', '.join(splits)}: give one"
        )
    dataset = splits[config.split]
    if config.max_clips:
        dataset = dataset.select(range(min(config.max_clips, len(dataset))))
    seconds, task = column(dataset, "seconds"), prepared["config"]["task"]
    tokenizer = labels.load_tokenizer(config.model)
    check_languages(config, tokenizer, dataset)
    say(
        f"{config.split}: {len(dataset)} clips, {seconds.sum() / 60:.1f} minutes, "
        f"{accelerator.num_processes} processes, {config.precision}"
    )

    # ------ base and adapter
    systems: dict[str, dict[str, Any]] = {}
    texts: dict[str, dict[str, Prediction]] = {}
    adapters = {"base": ""} if config.compare_base or not config.adapter else {}
    if config.adapter:
        adapters["adapter"] = config.adapter
    for name, adapter in adapters.items():
        model = load_for_decoding(
            config.model, adapter, dtype=DTYPES[config.precision], device=accelerator.device
        )
        whisper.complete_generation_config(model, tokenizer)
        record = read_record(adapter or config.model, "--adapter" if adapter else "--model")
        if adapter and record:  # of one trained elsewhere, shapes are all there is to compare
            check_base(config, record, model)
        policy = record and record["window"]
        window, context = batching.natural_window(policy), config.context
        if context == "auto":
            context = batching.trained_context(policy)
        batches, batch_seconds = plan_batches(
            accelerator,
            model.config,
            seconds,
            bytes_per_value=model.dtype.itemsize,
            context=context,
            window=window,
            batch_seconds=config.batch_seconds,
            num_beams=config.num_beams,
        )
        margin = window.margin / batching.POSITIONS_PER_SECOND
        after = f" ({margin:.2f} s after the speech)" if context == "natural" else ""
        say(
            f"decoding with {adapter or config.model}, {context} window{after}, "
            f"{len(batches)} batches"
        )
        start = time.perf_counter()
        mine = transcribe(
            model,
            tokenizer,
            dataset,
            batches[accelerator.process_index :: accelerator.num_processes],
            task=task,
            tokens_per_second=prepared["tokens_per_second"]["p999"],
            num_beams=config.num_beams,
            num_workers=config.num_workers,
            quiet=not accelerator.is_main_process,
        )
        texts[name] = gather(mine)
        wall_seconds = time.perf_counter() - start
        systems[name] = score(dataset, texts[name], tokenizer, task=task) | {
            "window": context,
            "audio_seconds": float(seconds.sum()),
            "batch_seconds": batch_seconds,
            "wall_seconds": wall_seconds,
            "real_time_factor": wall_seconds / float(seconds.sum()),
            "peak_memory_gib": peak_memory_gib(),  # of rank 0 so far
            "worst": worst_clips(dataset, texts[name], task),
        }
        del model

    # ------ results
    if accelerator.is_main_process:
        write_results(config, dataset, systems, texts)
    engine.close(accelerator)


if __name__ == "__main__":
    cli.run(main, Config)
