"""Why a clip is left out of the prepared dataset."""

MALFORMED_ROW = "malformed row"
OUTSIDE_SOURCE = "path leaves the source folder"
UNKNOWN_SPLIT = "unknown split"
NO_LANGUAGE = "no language"
UNKNOWN_LANGUAGE = "unknown language"
NO_TEXT = "empty text"
SPECIAL_TOKEN = "text spells a special token"  # noqa: S105 (no password)
TOO_MANY_LABELS = "labels over 448 tokens"
MISSING_AUDIO = "missing audio file"
NEEDS_PYAV = "needs PyAV (pip install av)"
UNREADABLE_AUDIO = "unreadable audio"
EMPTY_AUDIO = "empty audio"
TOO_LONG = "longer than max_seconds"
TOO_SHORT = "shorter than min_seconds"
IMPOSSIBLE_TEXT = "text impossible for the duration"
DUPLICATE = "duplicate audio"
AUDIO_OVERLAP = "audio also in another split"
TEXT_OVERLAP = "text also in training"
EXCLUDED = "excluded"  # by --exclude

REASONS = (  # a part file stores the index, so the order is part of its format
    "",  # kept
    MALFORMED_ROW,
    OUTSIDE_SOURCE,
    UNKNOWN_SPLIT,
    NO_LANGUAGE,
    UNKNOWN_LANGUAGE,
    NO_TEXT,
    SPECIAL_TOKEN,
    TOO_MANY_LABELS,
    MISSING_AUDIO,
    NEEDS_PYAV,
    UNREADABLE_AUDIO,
    EMPTY_AUDIO,
    TOO_LONG,
    TOO_SHORT,
    IMPOSSIBLE_TEXT,
    DUPLICATE,
    AUDIO_OVERLAP,
    TEXT_OVERLAP,
    EXCLUDED,
)
