"""What a run is trained on: the splits, and a tokenizer that agrees with their labels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from common import cli, labels
from common.predictions import DecodeOptions
from common.prepared import column, load_prepared


@dataclass(frozen=True)
class Data:
    """The prepared dataset, and the tokenizer that its labels were made with."""

    train: Dataset
    validation: Dataset | None
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]  # preprocess.json

    def decode_options(self, num_workers: int) -> DecodeOptions:
        """How the validation clips are decoded."""
        tokens_per_second = self.report["tokens_per_second"]["p999"]
        return DecodeOptions(
            self.report["config"]["task"], tokens_per_second, num_workers=num_workers
        )


def load_data(data_dir: str, model: str, *, eval_clips: int, seed: int, patience: int = 0) -> Data:
    """Open the prepared dataset, and choose the clips to validate on.

    Args:
        eval_clips: number of validation clips, drawn by `seed`; 0 takes all.
        patience: evaluations without a better model that end the run; 0: none.

    Raises:
        UserError: no training split, or labels made by another tokenizer than the model's.
    """
    splits, report = load_prepared(data_dir)
    tokenizer = labels.load_tokenizer(model)
    agrees = labels.tokenizer_fingerprint(tokenizer) == report["tokenizer_fingerprint"]
    cli.refuse(
        [
            ("train" not in splits, f"--data_dir {data_dir}: has no train split: prepare one"),
            (
                not agrees,
                f"--data_dir {data_dir}: its labels were made by the tokenizer of "
                f"{report['config']['model']}, which is not that of --model {model}: "
                f"run preprocess.py --model {model} into another folder",
            ),
        ]
    )
    validation = splits.get("validation")
    no_validation = f"--patience {patience}: {data_dir} has no validation split: prepare one"
    cli.refuse([(patience > 0 and validation is None, f"{no_validation}, or give 0")])
    if validation is not None and eval_clips:
        order = np.random.default_rng(seed).permutation(len(validation))
        validation = validation.select(sorted(order[:eval_clips].tolist()))
    return Data(splits["train"], validation, tokenizer, report)


def describe(data: Data) -> dict[str, Any]:
    """How much a run is trained on, for its model card."""
    return {
        "clips": len(data.train),
        "hours": round(float(column(data.train, "seconds").sum()) / 3600, 3),
        "speakers": len(set(column(data.train, "speaker")) - {""}),
        "languages": data.report["languages"],
    }
