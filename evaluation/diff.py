"""A transcript against its reference: words, and inside replaced words grapheme clusters, as HTML.

What only the reference has is in `<del>`, what only the transcript has in `<ins>`. The page's style
sheet adds the signs - and +, so the difference is readable without color.
"""

import unicodedata
from dataclasses import dataclass

from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

from common.metrics import graphemes

DELETED = Markup("<del{}>{}</del>")
INSERTED = Markup("<ins{}>{}</ins>")
OWN_DIRECTION = Markup(' dir="auto"')  # Urdu beside Hindi
MARKED = Markup("<u>{}</u>")
SPACE = Markup(" ")


@dataclass(frozen=True)
class Diff:
    """A raw transcript against its raw reference."""

    errors: int  # words substituted, deleted and inserted
    reference_words: int
    html: Markup

    @property
    def wer(self) -> float:
        """In per cent; the number of errors where the reference is empty, as in `ErrorCounts`."""
        return 100.0 * self.errors / max(self.reference_words, 1)


def compare(reference: str, hypothesis: str) -> Diff:
    """Align the words of two texts; neighboring errors form a single deletion and insertion.

    >>> str(compare("a bc d", "a bx").html)
    'a <del>b<u>c</u> d</del> <ins>b<u>x</u></ins>'
    """
    wanted, written = reference.split(), hypothesis.split()
    direction = OWN_DIRECTION if has_right_to_left(reference + hypothesis) else ""
    pieces: list[Markup | str] = []
    deleted: list[Markup | str] = []
    inserted: list[Markup | str] = []
    errors = 0

    def flush() -> None:
        if deleted:
            pieces.append(DELETED.format(direction, SPACE.join(deleted)))
        if inserted:
            pieces.append(INSERTED.format(direction, SPACE.join(inserted)))
        deleted.clear()
        inserted.clear()

    for block in Levenshtein.opcodes(wanted, written):
        old, new = (
            wanted[block.src_start : block.src_end],
            written[block.dest_start : block.dest_end],
        )
        if block.tag == "equal":
            flush()
            pieces += new
            continue
        errors += max(len(old), len(new))
        if block.tag == "replace":
            marked = [compare_graphemes(*pair) for pair in zip(old, new, strict=True)]
            old, new = [pair[0] for pair in marked], [pair[1] for pair in marked]
        deleted += old
        inserted += new
    flush()
    return Diff(errors, len(wanted), SPACE.join(pieces))


def has_right_to_left(text: str) -> bool:
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in set(text))


def compare_graphemes(old: str, new: str) -> tuple[Markup | str, Markup | str]:
    """Two words, the grapheme clusters that differ marked; unmarked if that is more than half.

    A vowel sign stays with its consonant.

    >>> [str(word) for word in compare_graphemes("मेढक", "मेंढक")]
    ['<u>मे</u>ढक', '<u>में</u>ढक']
    """
    wanted, written = graphemes(old), graphemes(new)
    blocks = Levenshtein.opcodes(wanted, written)
    common = sum(block.src_end - block.src_start for block in blocks if block.tag == "equal")
    if 2 * common < max(len(wanted), len(written)):
        return old, new
    left, right = Markup(), Markup()
    for block in blocks:
        form = Markup("{}") if block.tag == "equal" else MARKED
        if block.src_end > block.src_start:
            left += form.format("".join(wanted[block.src_start : block.src_end]))
        if block.dest_end > block.dest_start:
            right += form.format("".join(written[block.dest_start : block.dest_end]))
    return left, right
