"""Fixtures that several rooms share: a tiny checkpoint, a prepared corpus; always offline."""

import gc
import json
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# DeepSpeed compiles an extension, against this checkout's torch, when it is first used.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".pytest_cache" / "torch_extensions"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
collect_ignore = ["simulated_cuda/run.py"]  # a program, which must come before torch

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import WhisperForConditionalGeneration  # noqa: E402

from common import labels, whisper  # noqa: E402
from training import lora  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each worker of xdist begin with the files of long tests, and end with short tests.

    A worker gets a contiguous part of all tests, and takes over tests from the end of another's
    part when it has done its own: the shorter they are, the closer together the workers end.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return
    long = {item.path for item in items if item.get_closest_marker("slow")}
    groups = [[item for item in items if (item.path in long) is begins] for begins in (True, False)]
    items[:] = [
        item
        for worker in range(workers)
        for group in groups
        for item in group[worker * len(group) // workers : (worker + 1) * len(group) // workers]
    ]


def pytest_collection_finish() -> None:
    """Keep what imports made out of garbage collections: Accelerate asks for some in each run."""
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Let each test choose its precision: accelerate keeps the first for the whole process.

    Reset afterwards, too: fixtures of a module that train are made before this one.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Whisper with a 256-byte tokenizer."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def english_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with an English-only tokenizer: no languages and no tasks."""
    folder = tmp_path_factory.mktemp("model.en")
    tiny.make_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    wanted = (labels.START, labels.END, labels.NO_TIMESTAMPS)
    kept = [token for token in content["added_tokens"] if token["content"] in wanted]
    content["added_tokens"] = [{**token, "id": 256 + index} for index, token in enumerate(kept)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture(scope="session")
def prepared(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones with Marathi words: 21 clips to train on, 5 to validate, 7 to test."""
    folder = tmp_path_factory.mktemp("prepared")
    source = tiny.make_corpus(folder / "source", clips={"train": 21, "validation": 5, "test": 7})
    return tiny.prepare(source, checkpoint, folder / "data")


@pytest.fixture(scope="session")
def train_only(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips to train on and no others, for tests to which validation adds nothing."""
    folder = tmp_path_factory.mktemp("train_only")
    source = tiny.make_corpus(folder / "source", clips={"train": 21})
    return tiny.prepare(source, checkpoint, folder / "data", validation_fraction=0.0)


@pytest.fixture
def base(checkpoint: Path) -> WhisperForConditionalGeneration:
    """That Whisper, loaded."""
    return whisper.load_base(str(checkpoint), dtype=torch.float32).eval()


@pytest.fixture
def adapted(base: WhisperForConditionalGeneration) -> PeftModel:
    """A LoRA model whose adapter is not zero, as after training."""
    torch.manual_seed(1)
    model = lora.add_lora(base, rank=4, alpha=8, targets=["q_proj", "v_proj"], dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 server on 127.0.0.1, which has the bucket `speech`."""
    server_module = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="speech")
    yield client
    reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(reset).close()  # the next server of this process has the same objects
    server.stop()
