"""README.md of an export: what it was checked to do, and at which window other programs decode."""

NAME = "README.md"
READERS = {
    "hf": "transformers (`WhisperForConditionalGeneration`), and by `eval_wer.py --model FOLDER` "
    "and `transcribe.py --model FOLDER`",
    "ct2": "CTranslate2, on which faster-whisper and WhisperX are built, and by `transcribe.py "
    "--model FOLDER`",
    "ggml": "whisper.cpp (`whisper-cli -m ggml-model-f16.bin`)",
}
PADDED = {
    "hf": "`generate` and `pipeline` of transformers pad every clip to 30 seconds.",
    "ct2": "faster-whisper and WhisperX pad every clip to 30 seconds.",
    "ggml": "whisper.cpp pads every clip to 30 seconds, unless given `--audio-ctx`. Its flash\n"
    "attention also attends to positions after the window: give `--no-flash-attn`, above all with\n"
    "`--audio-ctx`.",
}
NATURAL = {
    "hf": "`eval_wer.py` and `transcribe.py` do this.",
    "ct2": "`transcribe.py` does this.",
    "ggml": "`--audio-ctx N` of whisper.cpp does this, with N a multiple of 32.",
}


def text(form: str, source: str, weights: str, margin: int, *, is_natural: bool) -> str:
    """The file's content, a function of its arguments alone.

    Args:
        form: hf, ct2 or ggml.
        source: name of the model, and of the adapter that was merged into it.
        weights: their type.
        margin: positions of 20 ms after the speech.
        is_natural: whether the model was trained on windows that follow the speech.
    """
    trained = (
        "The model was trained on windows that follow the speech, and on some of 30 seconds.\n"
        f"It is scored at windows that end {margin * 20} ms after the speech, in steps of 640 ms.\n"
        f"{NATURAL[form]}\n{PADDED[form]}"
        if is_natural
        else f"The model was trained on windows of 30 seconds, whatever the speech.\n{PADDED[form]}"
    )
    return (
        f"# {source}\n\n"
        f"Whisper, written by export.py with weights in {weights}. Read by {READERS[form]}.\n\n"
        f"## Window\n\n{trained}\n\n"
        "Error rates at both windows are in export.json beside this folder, checksums in "
        "SHA256SUMS.\n"
    )
