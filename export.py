"""A fine-tuned Whisper for other programs: Hugging Face, CTranslate2 and whisper.cpp, checked.

    python export.py --model openai/whisper-small --adapter run/adapter --data_dir prepared \\
        --formats hf,ct2,ggml

The adapter is merged in float32 and compared with the unmerged one on real clips. Each export is
loaded again by a process of its own and scored beside the original.
"""

import gc
import hashlib
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until cli.run: collecting takes a quarter of the imports, which leave no garbage

import torch
from accelerate import Accelerator

from common import cli, ct2, labels, whisper
from common.accelerator import close
from common.decoding import decode
from common.files import has_content, new_folder, write_json, write_text
from common.prepared import column, load_prepared
from common.provenance import describe_run, hub_id, read_record
from common.systems import System, check_languages, load_system
from common.windows import is_trained_on_short_windows
from conversion import ct2 as ct2_files
from conversion import ggml, hf, merge, notes, report, scoring

FORMATS = ("hf", "ct2", "ggml")
RECORD, CHECKSUMS = "export.json", "SHA256SUMS"
CARRIED = ("recipe.json", "trained_on.safetensors")  # of the adapter, read by the scripts


@dataclass
class Config:
    """A fine-tuned Whisper in the formats of other programs, scored beside the original."""

    model: str = "openai/whisper-small"  # base or full fine-tune: a folder or a Hub id
    adapter: str = ""  # folder of an adapter, which is merged; empty: --model alone
    data_dir: str = os.environ.get("SM_CHANNEL_TEST", "prepared")  # output of preprocess.py
    split: str = "test"  # train, validation or test: the clips that exports are scored on
    max_clips: int = 200  # number of clips, from the first on; 0: all
    formats: str = "hf"  # some of hf, ct2 and ggml, as hf,ct2
    ct2_types: str = "float32,int8"  # weights of ct2: float32, int8, or both
    ggml_type: str = "f16"  # weights of ggml
    accept_worse: bool = False  # exit code 0 even if an export is worse than the original
    output_dir: str = os.environ.get("SM_OUTPUT_DATA_DIR", "export")  # a folder for each export


# ------ options


def check(config: Config) -> None:
    """Refuse impossible options, all of them in one message."""
    cli.refuse(
        [
            *_list_rules("--formats", config.formats, FORMATS),
            *_list_rules("--ct2_types", config.ct2_types, ct2_files.TYPES),
            (
                config.ggml_type == "f32",
                "--ggml_type f32: whisper.cpp aborts when it loads such a file: give f16",
            ),
            (
                config.ggml_type not in (*ggml.TYPES, "f32"),
                f"--ggml_type {config.ggml_type}: is not written: give f16, and quantize the file "
                "with whisper.cpp's own quantize program",
            ),
            (
                bool(config.adapter) and not Path(config.adapter).is_dir(),
                f"--adapter {config.adapter}: no such folder: give a trained adapter's",
            ),
            *cli.out_of_range(config, not_negative=["max_clips"]),
        ]
    )


def _list_rules(option: str, value: str, names: tuple[str, ...]) -> list[tuple[bool, str]]:
    """Rules of an option that names some of `names`, each once."""
    given = value.split(",")
    unknown = [name for name in given if name not in names]
    return [
        (
            bool(unknown),
            f"{option} {value}: {unknown[0] if unknown else ''!r} is unknown: give some of "
            f"{','.join(names)}",
        ),
        (len(set(given)) < len(given), f"{option} {value}: names one twice: keep one"),
    ]


def check_installed(formats: list[str]) -> None:
    """Refuse formats whose engine is not installed."""
    if "ct2" in formats:
        ct2.check_installed()
    if "ggml" in formats:
        ggml.check_installed()


def check_output(config: Config) -> None:
    """Refuse to replace a folder that holds anything but an earlier export."""
    folder = Path(config.output_dir)
    if has_content(folder) and not (folder / RECORD).is_file():
        raise cli.UserError(
            f"--output_dir {config.output_dir}: holds other files, which would be removed: give "
            "another folder"
        )


# ------ exports


def write_exports(folder: Path, config: Config, system: System) -> dict[str, tuple[str, Path]]:
    """Write all formats: (format, folder) by the name of each export."""
    formats, exports = config.formats.split(","), {}
    hf_folder = folder / "hf"
    hf.write(hf_folder, system.model, system.tokenizer)
    carry(config, hf_folder, CARRIED)
    describe(config, system, hf_folder, "hf", "float32")
    if "hf" in formats:
        exports["hf"] = ("hf", hf_folder)
    if "ct2" in formats:
        for weight_type in config.ct2_types.split(","):
            name = f"ct2_{weight_type}"
            exports[name] = ("ct2", folder / name)
            ct2_files.write(folder / name, hf_folder, weight_type)
            carry(config, folder / name, CARRIED[:1])
            describe(config, system, folder / name, "ct2", weight_type)
    if "ggml" in formats:
        exports["ggml_f16"] = ("ggml", folder / "ggml_f16")
        exports["ggml_f16_no_flash"] = ("ggml_no_flash", folder / "ggml_f16")
        (folder / "ggml_f16").mkdir()
        ggml.write(folder / "ggml_f16" / ggml.FILE_NAME, system.model, system.tokenizer)
        describe(config, system, folder / "ggml_f16", "ggml", "float16")
    if "hf" not in formats:
        shutil.rmtree(hf_folder)
    return exports


def carry(config: Config, folder: Path, names: tuple[str, ...]) -> None:
    """Copy what train_lora.py wrote beside the adapter or the fine-tuned model."""
    if read_record(config.adapter or config.model, "--adapter" if config.adapter else "--model"):
        for name in names:
            source = Path(config.adapter or config.model) / name
            if source.is_file():
                shutil.copyfile(source, folder / name)


def describe(config: Config, system: System, folder: Path, form: str, weights: str) -> None:
    """Write the export's README.md."""
    source = hub_id(config.model) or Path(config.model).resolve().name
    if config.adapter:
        source += f" with {Path(config.adapter).resolve().name}"
    policy = (read_record(config.adapter or config.model, "--adapter") or {}).get("window")
    write_text(
        folder / notes.NAME,
        notes.text(
            form, source, weights, system.margin.margin,
            is_natural=is_trained_on_short_windows(policy),
        ),
    )  # fmt: skip


def checksums(folder: Path) -> str:
    """SHA-256 of every file below a folder, as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)


# ------ main


def main(config: Config) -> None:
    check(config)
    check_installed(config.formats.split(","))
    check_output(config)
    whisper.quiet_libraries()
    accelerator = Accelerator(cpu=True)  # where exports are scored as well
    if accelerator.num_processes > 1:
        raise cli.UserError(
            f"export.py was started as {accelerator.num_processes} processes: start it with python"
        )

    # ------ data
    tokenizer = labels.load_tokenizer(config.model)
    clips = scoring.load_clips(config.data_dir, config.split, config.max_clips)
    codes = map(str, column(clips, "language"))
    check_languages(config.model, tokenizer, codes, f"clips in --data_dir {config.data_dir}")
    _, prepared = load_prepared(config.data_dir)

    # ------ the original
    few = clips.select(range(min(merge.CHECK_CLIPS, len(clips))))
    before = merge.unmerged_logits(config.model, config.adapter, few) if config.adapter else None
    system = load_system(
        config.model, config.adapter, tokenizer, accelerator, window_mode="auto",
        dtype=torch.float32,
    )  # fmt: skip
    merged = before and merge.compare(config.adapter, *before, merge.logits(system.model, few))
    merge.check_unquantised(system.model, config.model)
    if merged:
        print(
            f"merged: logits of {merged.clips} clips differ by up to {merged.difference:.2g} from "
            f"the unmerged adapter's, which differ by up to {merged.effect:.3g} from the base's",
            flush=True,
        )
    if "ggml" in config.formats.split(","):
        ggml.check_model(system.model, tokenizer)
    task = scoring.Task(
        data_dir=str(Path(config.data_dir).resolve()),
        split=config.split,
        max_clips=config.max_clips,
        task=prepared["config"]["task"],
        tokens_per_second=prepared["tokens_per_second"]["p999"],
        margin=(system.margin.margin, system.margin.floor),
    )
    decode_original = scoring.by_batches(system.model, tokenizer, decode, task)
    texts = {"original": scoring.decode_both(decode_original, clips)}

    # ------ exports
    scored = report.Clips(clips, tokenizer, task.task)
    with new_folder(Path(config.output_dir)) as folder:
        exports = write_exports(folder, config, system)
        close(accelerator)
        del system, decode_original
        for name, (engine, path) in exports.items():
            print(f"{name}: loaded again by another process", flush=True)
            own = replace(task, engine=engine, path=str(path.resolve()))
            texts[name] = scoring.score_fresh(own)
        sizes = {name: report.megabytes(path) for name, (_, path) in exports.items()}
        scores = {
            name: report.score(scored, decoded, texts["original"])
            for name, decoded in texts.items()
        }
        worse = report.problems(scores)
        write_text(folder / CHECKSUMS, checksums(folder))
        write_json(
            folder / RECORD,
            {
                "merge": merged and asdict(merged),
                "scores": scores,
                "megabytes": sizes,
                "worse": worse,
                "recipe": describe_run(config),
            },
        )

    # ------ results
    print(report.table(scores, sizes), flush=True)
    for reason in worse:
        print(f"worse: {reason}", file=sys.stderr)
    if worse and not config.accept_worse:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, Config)
