"""Word error rate of a Whisper, of LoRA adapters on it, or of all of them on the same clips.

    python eval_wer.py --model openai/whisper-large-v2 --adapter run/adapter --data_dir prepared \\
        --compare_base true --output_dir run/wer

Any number of processes (`accelerate launch eval_wer.py ...`) gives one corpus score, the same to
the last bit in fp32: a clip's window and token cap depend on the clip alone, predictions are
gathered by clip id, and errors are counted over the corpus once.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import cli, labels, precision, whisper
from common.accelerator import close, explain_lost_contact, open_accelerator, say
from common.precision import DTYPES, Precision
from common.prepared import column
from common.provenance import describe_run, hub_id
from common.windows import DecodeWindowMode
from evaluation import push
from evaluation.card import write_cards
from evaluation.html_report import write_report
from evaluation.report import write_results
from evaluation.scores import describe_errors, load_clips, score_clips
from evaluation.systems import load_system, read_record


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
    model_card: bool = True  # README.md beside each adapter, if the whole test split is scored
    push_to_hub: str = ""  # OWNER/NAME on the Hub to push adapter and card to; empty: none
    license: str = ""  # license in the model card, such as apache-2.0; empty: unknown


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
            *cli.out_of_range(config, not_negative=["batch_seconds"]),
            (
                bool(config.push_to_hub) and not push.is_repo(config.push_to_hub),
                f"--push_to_hub {config.push_to_hub}: is no name on the Hub: give OWNER/NAME",
            ),
            (
                bool(config.push_to_hub) and not has_card(config),
                f"--push_to_hub {config.push_to_hub}: goes with a model card: score all of "
                "--split test, with --model_card true",
            ),
            (
                bool(config.push_to_hub) and len(folders) > 1,
                f"--push_to_hub {config.push_to_hub}: takes one adapter: give --adapter one folder",
            ),
            (
                bool(config.push_to_hub)
                and not folders
                and read_record(config.model, "--model") is None,
                f"--push_to_hub {config.push_to_hub}: --model {config.model} has no recipe.json "
                "of train_lora.py: give --adapter, or a full fine-tune of your own",
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


def check_languages(
    model: str, data_dir: str, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> None:
    """Refuse a model that has no token for a language of the clips."""
    codes = {str(code) for code in column(dataset, "language")}
    unknown = sorted(code for code in codes if not labels.has_language(tokenizer, code))
    if unknown:
        raise cli.UserError(
            f"--model {model}: cannot write {', '.join(unknown)}, the language of clips in "
            f"--data_dir {data_dir}: give a multilingual model that has it"
        )


def has_card(config: Config) -> bool:
    """Whether a model card is written: of a part of the test split its rates would mislead."""
    return config.model_card and config.split == "test" and not config.max_clips


# ------ main


def main(config: Config) -> None:
    check(config)
    if config.push_to_hub:
        push.check_access(config.push_to_hub)
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
    scores = load_clips(
        config.data_dir, config.split, max_clips=config.max_clips, num_beams=config.num_beams,
        num_workers=config.num_workers, quiet=not accelerator.is_main_process,
    )  # fmt: skip
    tokenizer = labels.load_tokenizer(config.model)
    check_languages(config.model, config.data_dir, tokenizer, scores.dataset)
    say(
        accelerator,
        f"{config.split}: {len(scores.dataset)} clips, {scores.seconds / 60:.1f} minutes, "
        f"{accelerator.num_processes} processes, {config.precision}",
    )

    # ------ base and adapters
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
        score_clips(scores, name, system, accelerator, tokenizer, config.batch_seconds)
        del system  # before the next one is loaded

    # ------ results
    cards: dict[str, Path] = {}  # of the first process alone, which writes and pushes
    if accelerator.is_main_process:
        folder = Path(config.output_dir)
        describe_errors(scores)
        write_results(folder, scores, adapters, describe_run(config))
        address = write_report(
            folder, scores.dataset, adapters=adapters, audio_mb=config.report_audio_mb
        )
        if has_card(config):
            cards, lines = write_cards(folder)
            print("".join(f"{line}\n" for line in lines), end="")
        print(address, flush=True)
    close(accelerator)
    if config.push_to_hub and cards:
        (card,) = cards.values()
        folder = Path(config.adapter or config.model)
        print(push.push(config.push_to_hub, folder, card, hub_id(config.model)), flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
