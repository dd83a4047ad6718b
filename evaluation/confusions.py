"""What a system confuses: words and grapheme clusters that stand for one another, most often first.

Insertions and deletions are no confusions: of those, one loop would fill the list.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from rapidfuzz.distance import Levenshtein

from common.metrics import LETTER_LANGUAGES, graphemes
from common.predictions import Prediction
from common.prepared import column

MOST = 20  # pairs listed


def confusions(
    dataset: Dataset, predictions: dict[str, Prediction], languages: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The most frequent substitutions of words and of grapheme clusters in raw texts.

    Words of languages written without spaces are left out.

    Args:
        predictions: one for each clip of `dataset`, by id.
        languages: of the clips' texts (N).
    """
    words, clusters = [], []
    columns = column(dataset, "id"), column(dataset, "text"), languages
    for clip_id, text, language in zip(*columns, strict=True):
        pair = str(text), predictions[str(clip_id)].text
        clusters.append(pair)
        if language not in LETTER_LANGUAGES:
            words.append(pair)
    return {"words": _most(words, str.split), "graphemes": _most(clusters, graphemes)}


def _most(
    pairs: Sequence[tuple[str, str]], split: Callable[[str], list[str]]
) -> list[dict[str, Any]]:
    """The most frequent substitutions of one shortest alignment of each pair."""
    counts: Counter[tuple[str, str]] = Counter()
    for reference, hypothesis in pairs:
        wanted, written = split(reference), split(hypothesis)
        for edit in Levenshtein.editops(wanted, written):
            if edit.tag == "replace":
                counts[wanted[edit.src_pos], written[edit.dest_pos]] += 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [
        {"reference": wanted, "hypothesis": written, "count": count}
        for (wanted, written), count in ordered[:MOST]
    ]
