"""The texts that --align and --reference name: a .txt file, or a folder with one per recording."""

from collections.abc import Sequence
from pathlib import Path

from common.cli import UserError
from transcription.recordings import Recording


def read_texts(option: str, source: str, recordings: Sequence[Recording]) -> dict[Recording, str]:
    """The text of each recording that has one.

    Args:
        option: named in error messages.
        source: a text of the only recording, or a folder in which a/b.wav has a/b.txt.

    Raises:
        UserError: there is no text, or one that cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        files = {own: path / f"{own.name}.txt" for own in recordings}
        files = {own: file for own, file in files.items() if file.is_file()}
        if not files:
            raise UserError(
                f"{option} {source}: has no text of any recording: name that of "
                f"{recordings[0].path.name} {recordings[0].name}.txt"
            )
    elif not path.is_file():
        raise UserError(f"{option} {source}: does not exist: give a .txt file or a folder of them")
    elif path.suffix.lower() != ".txt":
        raise UserError(f"{option} {source}: is not plain text: save it as .txt in UTF-8")
    elif len(recordings) > 1:
        raise UserError(
            f"{option} {source}: is one text, and --audio names {len(recordings)} recordings: give "
            f"a folder with a text for each, {recordings[0].name}.txt and so on"
        )
    else:
        files = {recordings[0]: path}
    return {own: _read(option, file) for own, file in files.items()}


def _read(option: str, file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"{option} {file}: cannot be read as UTF-8: save it again") from error
    if not any(sign.isalnum() for sign in text):
        raise UserError(f"{option} {file}: holds no words: give the transcript of the recording")
    return text
