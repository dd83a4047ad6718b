"""What others made (manifests, audio, models) can neither run code, nor read elsewhere, nor exhaust
the memory; and secrets stay where they are.
"""

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import launch
import numpy as np
import pytest
import soundfile
import tiny
import torch
from short_run import small_options
from test_house import ROOMS

from common import adapter as adapter_files
from common import audio, cli, whisper
from prepare import reading

SOURCES = [
    path
    for folder in (".", "common", *ROOMS, "benchmarks", "demo")
    for path in sorted((launch.ROOT / folder).glob("*.py"))
]
FORBIDDEN_IMPORTS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "os.system", "os.popen"}


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


# ------ our own code


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_unpickles_uses_a_shell_or_trusts_remote_code(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {name.name.split(".")[0] for name in node.names} & FORBIDDEN_IMPORTS
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_IMPORTS
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, node.lineno
            for keyword in node.keywords:
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                    assert ast.unparse(keyword.value) == "False", node.lineno
                assert keyword.arg != "weights_only" or ast.unparse(keyword.value) == "True"


# ------ models


def test_a_model_in_pickle_is_refused_and_not_run(checkpoint, tmp_path):
    copy, mark = shutil.copytree(checkpoint, tmp_path / "model"), tmp_path / "ran"
    (copy / "model.safetensors").unlink()
    torch.save({"x": Payload(mark)}, copy / "pytorch_model.bin")
    with pytest.raises(cli.UserError, match=r"a checkpoint with whole model\.safetensors"):
        whisper.load_base(str(copy), dtype=torch.float32)
    assert not mark.exists()


def test_an_adapter_in_pickle_is_refused_and_not_run(base, adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "r")))
    with pytest.raises(cli.UserError, match=r"has no adapter_model\.safetensors"):
        adapter_files.load_adapter(base, str(tmp_path / "adapter"))
    assert not (tmp_path / "r").exists()


def test_code_that_comes_with_a_model_is_not_run(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    (copy / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(cli.UserError, match="--model"):
        whisper.load_base(str(copy), dtype=torch.float32)
    assert not (tmp_path / "ran").exists()


# ------ manifests and audio


def test_a_hostile_manifest_reads_nothing_outside_its_folder(checkpoint, tmp_path):
    source = tiny.make_corpus(tmp_path / "in" / "source", clips={"train": 3}).parent
    secret = shutil.copy(source / "train_000.wav", tmp_path / "secret.wav")
    (source / "link.wav").symlink_to(secret)
    (source / "folder").symlink_to(tmp_path)
    hostile = ["../../../../etc/passwd", "/etc/passwd", "../../secret.wav", str(secret), "link.wav",
               "folder/secret.wav", "file:///etc/passwd", "s3://bucket/key", "-"]  # fmt: skip
    with (source / "clips.csv").open("a") as file:
        file.writelines(f"{path},एक,train,x\n" for path in hostile)
    data = tiny.prepare(source / "clips.csv", checkpoint, tmp_path / "data")
    told = json.loads((data / "preprocess.json").read_text())
    assert sum(split["clips"] for split in told["splits"].values()) == 3
    lines = (data / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons.count("path leaves the source folder") == 6, reasons
    assert len(reasons) == len(hostile)


READ = """
import resource, sys
from common import audio
from prepare import reading
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(len(reading.read_audio(sys.argv[1], max_seconds=30.0)) / 16_000, "s")
except audio.AudioError as error:
    print("AudioError", error)
try:
    print(len(audio.decode_flac(open(sys.argv[1], "rb").read())) / 16_000, "s stored")
except audio.AudioError as error:
    print("AudioError", error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def read_within_memory(path):
    """What reading a file prints, and the MiB that it took."""
    words = [sys.executable, "-c", READ, str(path)]
    done = subprocess.run(words, cwd=launch.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, mebibytes = done.stdout.splitlines()
    return said, float(mebibytes)


def test_hours_of_audio_in_a_small_file_take_the_memory_of_a_clip(tmp_path):
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(120):
            file.write(np.ones(60 * 16_000, dtype=np.int16))
    assert path.stat().st_size < 2_000_000
    said, mebibytes = read_within_memory(path)
    assert said == ["30.5 s", "30.0 s stored"]
    assert mebibytes < 60, mebibytes  # two hours are 440


def test_a_declared_length_of_ten_gigabytes_takes_the_memory_of_what_is_there(tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, tiny.tone(1.0, pitch=200), 16_000)
    content = bytearray(path.read_bytes())
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 2**32 - 1)
    path.write_bytes(content)
    said, mebibytes = read_within_memory(path)
    assert said[0] == "1.0 s"
    assert mebibytes < 60, mebibytes

    flac = bytearray(audio.encode_flac(audio.to_pcm(tiny.tone(1.0, pitch=200))))
    flac[21] |= 0x0F  # the upper four of 36 bits of the number of samples, and the next
    flac[22:26] = b"\xff" * 4
    (tmp_path / "long.flac").write_bytes(flac)
    said, mebibytes = read_within_memory(tmp_path / "long.flac")
    assert mebibytes < 60, (said, mebibytes)


def test_a_header_that_asks_for_absurd_rates_is_unreadable_audio(tmp_path):
    path = tmp_path / "absurd.wav"
    soundfile.write(path, np.zeros((200_000, 1000), np.int16), 8_000)
    with pytest.raises(audio.AudioError):
        reading.read_audio(path, max_seconds=30.0)


# ------ secrets


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_and_no_log(
    checkpoint, prepared, tmp_path, monkeypatch
):
    secret = "hf_ThisMustNotBeSeenAnywhere0123456789"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secret)
    options = small_options(checkpoint, prepared, tmp_path, max_steps=2, save_every=1)
    done = launch.run("train_lora.py", options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert secret not in done.stdout + done.stderr
    files = [path for path in Path(options["output_dir"]).rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        assert secret.encode() not in path.read_bytes(), path
