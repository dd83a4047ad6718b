"""Transcripts of whole recordings scored against texts (--reference): wer.json."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.files import write_json
from transcription.output import read_transcript, written_language
from transcription.recordings import Recording

FILE_NAME = "wer.json"


def score(
    folder: Path,
    recordings: Sequence[Recording],
    texts: dict[Recording, str],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Write the error rates of all recordings under each normalizer, and of each recording.

    Args:
        folder: with the json transcripts of `recordings`; those that failed have none.
        texts: references, of the recordings that have one.
        tokenizer: may hold the spelling table of the English normalizer.

    Returns:
        A line with the rates and with what was not scored.
    """
    from common.error_rate import count_by_normaliser

    scored = {own: read_transcript(folder, own) for own in texts}
    scored = {own: content for own, content in scored.items() if content}
    languages = [written_language(content) for content in scored.values()]
    hypotheses = [
        " ".join(segment["text"] for segment in content["segments"]) for content in scored.values()
    ]
    references = [texts[own] for own in scored]
    counts = count_by_normaliser(references, hypotheses, languages, tokenizer)
    rates = {name: own.rates() for name, own in counts.items()}
    rows = [
        {"name": own.name, "wer": words.rate, "words": words.reference_length}
        for own, words in zip(scored, counts["raw"].words, strict=True)
    ]
    write_json(folder / FILE_NAME, {"normalisers": rates, "recordings": rows})
    shown = ", ".join(f"{own['wer']:.1f} {name}" for name, own in rates.items())
    number = sum(row["words"] for row in rows)
    return (
        f"{folder / FILE_NAME}: WER {shown}; {len(rows)} recordings, {number:,} words; "
        f"not scored: {len(recordings) - len(rows)}"
    )
