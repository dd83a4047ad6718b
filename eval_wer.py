"""Word error rate of a Whisper, of a LoRA adapter on it, or of both on the same clips.

    python eval_wer.py --model openai/whisper-large-v2 --adapter run/adapter --data_dir prepared \\
        --compare_base true --output_dir run/wer

Any number of processes (`accelerate launch eval_wer.py ...`) gives one corpus score, the same to
the last bit in fp32: a clip's window and token cap depend on the clip alone, predictions are
gathered by clip id, and errors are counted over the corpus once.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import batching, cli, engine, labels, precision, predictions, whisper
from common.batching import DecodeContext
from common.files import write_json, write_text
from common.memory import peak_memory_gib
from common.precision import DTYPES, Precision
from common.predictions import Prediction
from common.prepared import column, load_prepared
from common.provenance import describe_run
from evaluation.report import key_values, table, worst_clips


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


# ------ results


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
    write_json(output / "wer.json", systems | {"recipe": describe_run(config)})
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
        model = predictions.load_for_decoding(
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
        batches, batch_seconds = predictions.plan_batches(
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
        mine = predictions.transcribe(
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
        texts[name] = predictions.gather(mine)
        wall_seconds = time.perf_counter() - start
        systems[name] = predictions.score(dataset, texts[name], tokenizer, task=task) | {
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
