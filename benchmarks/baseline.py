"""The tutorial's recipe for fine-tuning Whisper with LoRA, written faithfully, to measure against.

    python -m benchmarks.baseline --stage prepare --source COMMON_VOICE_FOLDER --work recipe ...

What everybody copies: log-mels padded to 30 seconds by `dataset.map` and saved as float32,
Seq2SeqTrainer, LoRA on q_proj and v_proj, evaluation in batches of 8 with `generate` of 255 tokens.
Changed so that both solve the same task: the collator cuts the start token that the model adds
again, and decoding is asked for language and task instead of being given the reference's first
tokens. Given for free: SDPA, workers, no 8-bit base, no gradient checkpointing, no evaluation while
it trains. Each stage writes WORK/STAGE.json.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import soundfile
import soxr
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from common import cli
from common.files import write_json

BATCH_SIZE = 8  # of the tutorial, in training and in evaluation
MAX_NEW_TOKENS = 255
TARGETS = "q_proj,v_proj"  # of the adapter
NUM_WORKERS = 2
SPLITS = {"train": "train.tsv", "test": "test.tsv"}


@dataclass
class Config:
    """One stage of the tutorial's recipe."""

    stage: Literal["prepare", "train", "evaluate"]  # what to do
    source: str  # Common Voice folder
    model: str  # Whisper checkpoint
    language: str  # code
    work: str  # folder for data, adapter and figures
    max_steps: int = 0  # optimizer steps; 0 is one epoch
    learning_rate: float = 1e-3  # peak
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 is autocast
    seed: int = 42  # of order and adapter


@dataclass(frozen=True)
class PadSpeech:
    """The tutorial's collator, with the start token cut that the model puts there itself."""

    processor: WhisperProcessor
    start: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad rows to input_features (B, M, 3000) and labels (B, T)."""
        features = [{"input_features": row["input_features"]} for row in rows]
        batch = self.processor.feature_extractor.pad(features, return_tensors="pt")
        labels = self.processor.tokenizer.pad(
            [{"input_ids": row["labels"]} for row in rows], return_tensors="pt"
        )
        padded = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        assert (padded[:, 0] == self.start).all()
        return {"input_features": batch["input_features"], "labels": padded[:, 1:]}


def load_processor(config: Config) -> WhisperProcessor:
    return WhisperProcessor.from_pretrained(
        config.model, language=config.language, task="transcribe"
    )


def load_model(config: Config) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(
        config.model, dtype=torch.float32, attn_implementation="sdpa"
    )


def prepare(config: Config) -> dict[str, Any]:
    """Log-mels of 30 seconds for every clip, saved to WORK/data."""
    processor, clips = load_processor(config), Path(config.source) / "clips"

    def features(row: dict[str, Any]) -> dict[str, Any]:
        wave, rate = soundfile.read(clips / row["path"], dtype="float32")
        wave = soxr.resample(wave, rate, 16_000) if rate != 16_000 else wave
        extracted = processor.feature_extractor(wave, sampling_rate=16_000)
        return {
            "input_features": extracted.input_features[0],
            "labels": processor.tokenizer(row["sentence"]).input_ids,
        }

    splits = datasets.DatasetDict()
    for split, name in SPLITS.items():
        with (Path(config.source) / name).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        kept = [{"path": row["path"], "sentence": row["sentence"]} for row in rows]
        splits[split] = datasets.Dataset.from_list(kept)
    mapped = splits.map(features, remove_columns=["path"], num_proc=NUM_WORKERS)
    mapped.save_to_disk(str(Path(config.work) / "data"))
    return {"clips": sum(len(split) for split in mapped.values())}


def train(config: Config) -> dict[str, Any]:
    """Seq2SeqTrainer over the training split; the adapter goes to WORK/adapter."""
    torch.manual_seed(config.seed)
    data = datasets.load_from_disk(str(Path(config.work) / "data"))["train"]
    data = data.remove_columns("sentence")
    model = load_model(config)
    model.config.use_cache = False
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=32, lora_alpha=64, target_modules=TARGETS.split(","), lora_dropout=0.05, bias="none"
        ),
    )
    trainer = Seq2SeqTrainer(
        model=adapted,
        args=Seq2SeqTrainingArguments(
            output_dir=str(Path(config.work) / "trainer"),
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=config.learning_rate,
            warmup_steps=0.1,  # a share of all steps
            num_train_epochs=1,
            max_steps=config.max_steps or -1,
            bf16=config.precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_num_workers=NUM_WORKERS,
            save_strategy="no",
            report_to=[],
            logging_steps=10,
            seed=config.seed,
        ),
        train_dataset=data,
        data_collator=PadSpeech(load_processor(config), model.config.decoder_start_token_id),
    )
    start = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - start
    adapted.save_pretrained(str(Path(config.work) / "adapter"))
    clips = min(result.global_step * BATCH_SIZE, len(data))
    return {"clips": clips, "seconds": seconds, "steps": result.global_step}


@torch.no_grad()
def evaluate(config: Config) -> dict[str, Any]:
    """The tutorial's loop over the test split: reference and hypothesis of every clip."""
    data = datasets.load_from_disk(str(Path(config.work) / "data"))["test"]
    references = data["sentence"]
    processor, base = load_processor(config), load_model(config)
    collate = PadSpeech(processor, base.config.decoder_start_token_id)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PeftModel.from_pretrained(base, str(Path(config.work) / "adapter")).to(device).eval()
    loader = DataLoader(
        data.remove_columns("sentence"), BATCH_SIZE, collate_fn=collate, num_workers=NUM_WORKERS
    )
    hypotheses = []
    start = time.perf_counter()
    for batch in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            tokens = model.generate(
                input_features=batch["input_features"].to(device),
                language=config.language,
                task="transcribe",
                max_new_tokens=MAX_NEW_TOKENS,
            )
        hypotheses += processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return {
        "clips": len(data),
        "seconds": time.perf_counter() - start,
        "references": list(references),
        "hypotheses": [text.strip() for text in hypotheses],
    }


def main(config: Config) -> None:
    Path(config.work).mkdir(parents=True, exist_ok=True)
    stages = {"prepare": prepare, "train": train, "evaluate": evaluate}
    write_json(Path(config.work) / f"{config.stage}.json", stages[config.stage](config))


if __name__ == "__main__":
    cli.run(main, Config)
