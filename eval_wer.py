"""Word error rate of a Whisper, of LoRA adapters on it, or of all of them on the same clips.

    python eval_wer.py --model openai/whisper-large-v2 --adapter run/adapter --data_dir prepared \\
        --compare_base true --output_dir run/wer

Any number of processes (`accelerate launch eval_wer.py ...`) gives one corpus score, the same to
the last bit in fp32: a clip's window and token cap depend on the clip alone, predictions are
gathered by clip id, and errors are counted over the corpus once.
"""

import gc
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until cli.run: collecting takes a quarter of the imports, which leave no garbage

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from common import cli, labels, memory, precision, whisper
from common.accelerator import close, explain_lost_contact, open_accelerator, say
from common.files import write_json
from common.precision import DTYPES, Precision
from common.prepared import SPLITS, column, load_prepared
from common.provenance import describe_run, hub_id, read_record
from common.systems import check_languages, load_system
from common.windows import DecodeWindowMode
from evaluation import folders, leaderboard, push
from evaluation.abilities import measure_abilities
from evaluation.audit import audit, write_audit
from evaluation.card import write_cards
from evaluation.html_report import write_report
from evaluation.leakage import describe_leakage
from evaluation.nonspeech import decode_panel
from evaluation.report import write_results
from evaluation.scores import Scores, describe_errors, load_clips, score_clips, score_other_window


@dataclass
class Config:
    """Word and character error rate of a Whisper, with or without a LoRA adapter."""

    model: str = "openai/whisper-small"  # base or full fine-tune: a folder or a Hub id
    adapter: str = ""  # folder of an adapter, or A,B,C to compare several; empty: --model alone
    compare_base: bool = False  # also score --model without an adapter, on the same clips
    data_dir: str = os.environ.get("SM_CHANNEL_TEST", "prepared")  # output of preprocess.py
    also: str = ""  # more prepared folders to score, as DIR or A,B: other languages or domains
    split: str = "test"  # train, validation or test
    max_clips: int = 0  # number of clips to score, and to audit, from the first on; 0: all
    audit: str = ""  # split whose suspect transcripts are listed in audit.csv; empty: none
    context: DecodeWindowMode = "auto"  # natural follows the clip, full is 30 s, auto: as trained
    both_windows: bool = False  # also score at the other window, 30 seconds or natural
    batch_seconds: float = 0.0  # seconds of audio window per batch; 0: what fits memory
    num_beams: int = 1  # beams of the search; 1: greedy decoding
    precision: Precision = "auto"  # fp32, bf16 or fp16; auto: the GPU's best, or fp32 on a CPU
    panels: bool = True  # also test clips without speech and what the base could do
    num_workers: int = 1  # processes that read audio ahead; 0: the main process
    collective_timeout: float = 120.0  # minutes a process waits for the other processes
    report_audio_mb: float = 10.0  # megabytes of voices in report.html at most; 0: none
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "wer")  # for scores, texts, report
    model_card: bool = True  # README.md beside each adapter, if the whole test split is scored
    benchmark: str = ""  # OWNER/NAME:TASK that the split is of, for a leaderboard; empty: none
    push_to_hub: str = ""  # OWNER/NAME on the Hub to push adapter and card to; empty: none
    license: str = ""  # license in the model card, such as apache-2.0; empty: unknown


# ------ options and data


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    pushes_model = config.push_to_hub and not config.adapter
    recorded = not pushes_model or read_record(config.model, "--model")
    cli.refuse(
        [
            (
                config.compare_base and not config.adapter,
                "--compare_base true needs an adapter to compare: give --adapter",
            ),
            *folders.folder_rules("--adapter", config.adapter, "give a trained adapter's"),
            *folders.folder_rules("--also", config.also, "give the output of preprocess.py"),
            *(
                (
                    folders.same_folder(folder, config.data_dir),
                    f"--also {folder}: is scored as --data_dir already: leave it out",
                )
                for folder in folders.split_folders(config.also)
            ),
            *cli.out_of_range(config, not_negative=["batch_seconds"]),
            *leaderboard.rules(config.benchmark, has_card=has_card(config)),
            *push.rules(
                config.push_to_hub,
                config.model,
                config.adapter,
                has_card=has_card(config),
                is_recorded=bool(recorded),
            ),
            (config.num_beams < 1, f"--num_beams {config.num_beams}: give 1 or more"),
            (
                not 0 <= config.report_audio_mb < math.inf,
                f"--report_audio_mb {config.report_audio_mb}: give a number of megabytes, or 0",
            ),
        ]
    )


def lacks(data_dir: str, split: str) -> bool:
    """Whether a prepared folder is without a split that others have."""
    return split in SPLITS and split not in load_prepared(data_dir)[0]


def has_card(config: Config) -> bool:
    """Whether a model card is written: of a part of the test split its rates would mislead."""
    return config.model_card and config.split == "test" and not config.max_clips


def load_data(
    config: Config, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase
) -> tuple[Scores | None, dict[str, Scores], Scores | None]:
    """The clips to score, those of the other folders by their names, and those to audit.

    Where --data_dir has no clips but those to audit, there are none to score.
    """

    def load(shown: str, folder: str, split: str, **options: str) -> Scores:
        clips = load_clips(
            folder, split, max_clips=config.max_clips, num_beams=config.num_beams,
            num_workers=config.num_workers, quiet=not accelerator.is_main_process, **options,
        )  # fmt: skip
        option = options.get("folder_option", "--data_dir")
        codes = map(str, column(clips.dataset, "language"))
        check_languages(config.model, tokenizer, codes, f"clips in {option} {folder}")
        say(
            accelerator,
            f"{shown}: {clips.size}, {accelerator.num_processes} processes, {config.precision}",
        )
        return clips

    audited, also = None, {}
    if config.audit:
        shown = f"audit of {config.audit}"
        audited = load(shown, config.data_dir, config.audit, split_option="--audit")
    if audited and lacks(config.data_dir, config.split):
        missing = f"{config.data_dir} has no {config.split} split"
        say(accelerator, f"{missing}: no scores, only the audit of {config.audit}")
        return None, {}, audited
    scores = load(config.split, config.data_dir, config.split)
    for name, folder in folders.name_folders(config.also).items():
        also[name] = load(f"also {name}", folder, config.split, folder_option="--also")
        also[name].train = None  # no adapter was trained on it
    return scores, also, audited


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
    tokenizer = labels.load_tokenizer(config.model)
    scores, also, audited = load_data(config, accelerator, tokenizer)

    # ------ base and adapters
    adapters = folders.name_adapters(config.adapter)
    base = {"base": ""} if config.compare_base or not adapters else {}
    *_, last = systems = base | adapters
    for name, adapter in systems.items() if scores else [(last, systems[last])]:
        memory.reset_peak()
        system = load_system(
            config.model,
            adapter,
            tokenizer,
            accelerator,
            window_mode=config.context,
            dtype=DTYPES[config.precision],
            batch_seconds=config.batch_seconds,
        )
        for clips in (scores, *also.values()) if scores else ():
            score_clips(clips, name, system)
            if config.panels:
                measure_abilities(clips, name, system)
        if scores and config.both_windows:
            score_other_window(scores, name, system)
        if scores and config.panels:
            decode_panel(scores, name, system)
        if audited and name == last:
            suspects = audit(audited, system)
        del system  # before the next one is loaded

    # ------ results
    cards: dict[str, Path] = {}  # of the first process alone, which writes and pushes
    if accelerator.is_main_process:
        folder, provenance = Path(config.output_dir), describe_run(config)
        record = write_audit(folder, config.audit, last, suspects) if audited else None
    if accelerator.is_main_process and scores is None:
        write_json(
            folder / "wer.json", {"adapters": adapters, "audit": record, "recipe": provenance}
        )
    elif accelerator.is_main_process:
        scores.audit = record
        for clips in (scores, *also.values()):
            describe_errors(clips)
            describe_leakage(clips, config.model, systems)
        write_results(folder, scores, also, adapters, provenance)
        address = write_report(
            folder,
            scores.dataset,
            adapters=adapters,
            audio_mb=config.report_audio_mb,
            panel=scores.panel and scores.panel.clips,
        )
        if has_card(config):
            cards, lines = write_cards(folder)
            lines += leaderboard.write_entries(config.benchmark, folder, cards)
            print("".join(f"{line}\n" for line in lines), end="")
        print(address, flush=True)
    close(accelerator)
    if config.push_to_hub and cards:
        (card,) = cards.values()
        folder = Path(config.adapter or config.model)
        print(push.push(config.push_to_hub, folder, card, hub_id(config.model)), flush=True)


if __name__ == "__main__":
    cli.run(main, Config)
