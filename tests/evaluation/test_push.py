"""--push_to_hub: what is sent to the Hub and what is not, against a strict server on 127.0.0.1."""

import base64
import hashlib
import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import launch
import pytest
import yaml
from huggingface_hub.repocard import metadata_load
from short_run import small_options, train

import eval_wer
from common import cli
from evaluation.push import check_access

TOKEN = "hf_test"
REPO = "me/whisper-mr"
PUSH = """\
import sys
from pathlib import Path
from common import cli
from evaluation import push

repo, folder, card, base = sys.argv[1:]
try:
    push.check_access(repo)
    print(push.push(repo, Path(folder), Path(card), base))
except cli.UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


EVALUATE = """\
import json, sys
import eval_wer

first, second = json.loads(sys.argv[1])
eval_wer.main(eval_wer.Config(**first))
print("evaluated", flush=True)
input()  # the test looks at the Hub
eval_wer.main(eval_wer.Config(**second))
"""


class Hub(BaseHTTPRequestHandler):
    """The endpoints of a push: account, repository, metadata, upload modes, LFS, commit."""

    def log_message(self, *words):
        pass

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def refused(self):
        if self.headers["Authorization"] == f"Bearer {TOKEN}":
            return False
        self.answer({"error": "Invalid credentials"}, 401)
        return True

    def do_GET(self):
        assert self.path == "/api/whoami-v2", self.path
        if not self.refused():
            token = {"displayName": "test", "role": self.server.role}
            self.answer({"name": "me", "auth": {"type": "access_token", "accessToken": token}})

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.refused():
            return None
        if self.path == "/api/repos/create":
            given = json.loads(body)
            if given["organization"] != "me":
                return self.answer({"error": "You don't have the rights to create a model"}, 403)
            hub.created.append(given)
            return self.answer({"url": f"{hub.address}/{REPO}"}, 409 if hub.created[1:] else 200)
        if self.path == "/api/validate-yaml":
            hub.validated.append(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        if self.path == f"/api/models/{REPO}/preupload/main":
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return self.answer(
                {
                    "files": [
                        {
                            "path": file["path"], "shouldIgnore": False,
                            "uploadMode": modes[file["path"].endswith(".safetensors")],
                        }
                        for file in files
                    ]
                }
            )  # fmt: skip
        if self.path == f"/{REPO}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for own in objects:
                own["actions"] = {"upload": {"href": f"{hub.address}/store/{own['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == f"/api/models/{REPO}/commit/main", self.path
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                assert len(hub.store[value["oid"]]) == value["size"]
                hub.files[value["path"]] = hub.store[value["oid"]]
            else:
                assert operation["key"] == "header", operation["key"]
        hub.commits += 1
        address = f"{hub.address}/{REPO}/commit/1"
        return self.answer({"commitUrl": address, "commitOid": "1" * 40, "success": True})

    def do_PUT(self):
        content = self.body()
        oid = self.path.removeprefix("/store/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.store[oid] = content
        self.answer({})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.created, server.validated, server.files, server.store = [], [], {}, {}
    server.commits, server.role = 0, "write"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def environment(folder, address, token=TOKEN):
    """Of a child process whose Hub is the test's; xet is another protocol of storage."""
    own = {
        "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"), "PYTHONPATH": str(launch.ROOT),
    }  # fmt: skip
    kept = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


def push(folder, address, *, repo=REPO, base="", token=TOKEN):
    words = [sys.executable, "-c", PUSH, repo, str(folder), str(folder / "README.md"), base]
    return subprocess.run(
        words, env=environment(folder, address, token), capture_output=True, text=True
    )


@pytest.fixture
def adapter(tmp_path):
    """An adapter's folder with all that may lie in and beside it."""
    folder = tmp_path / "run" / "adapter"
    (folder / ".eval_results").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    configuration = {"peft_type": "LORA", "base_model_name_or_path": "/home/me/whisper-small"}
    (folder / "adapter_config.json").write_text(json.dumps(configuration))
    recipe = {"config": {"model": "/home/me/whisper-small", "data_dir": "/home/me/data"}, "step": 2}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Card\n")
    (folder / ".eval_results" / "mine.yaml").write_text("- value: 1\n")
    for name in ("report.html", "predictions.jsonl", "wer.json", "clip.flac", "training_args.bin"):
        (folder / name).write_text("private")
    return folder


def test_adapter_card_and_records_are_pushed_and_nothing_else(hub, adapter):
    done = push(adapter, hub.address, base="openai/whisper-small")
    assert done.returncode == 0, done.stderr
    assert set(hub.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.json",
        ".eval_results/mine.yaml",
    }  # fmt: skip
    assert hub.files["adapter_model.safetensors"] == b"weights"
    assert hub.files["README.md"] == (adapter / "README.md").read_bytes()
    assert hub.validated == ["---\nlicense: mit\n---\n# Card\n"]
    assert hub.commits == 1
    assert done.stdout.startswith("pushed README.md, ")
    assert done.stdout.endswith(f" to {hub.address}/{REPO}\n")


def test_a_new_repository_is_private_and_one_that_exists_is_pushed_to(hub, adapter):
    for _ in range(2):
        assert push(adapter, hub.address).returncode == 0
    assert [own.get("visibility") for own in hub.created] == ["private", "private"]
    assert hub.commits == 2


def test_paths_of_the_machine_are_cut_down_and_the_base_gets_its_id(hub, adapter):
    push(adapter, hub.address, base="openai/whisper-small")
    assert not [name for name, content in hub.files.items() if b"/home/" in content]
    configuration = json.loads(hub.files["adapter_config.json"])
    assert configuration["base_model_name_or_path"] == "openai/whisper-small"
    assert json.loads(hub.files["recipe.json"])["config"]["data_dir"] == "data"


def refusal(done):
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_what_the_hub_refuses_is_one_line(hub, adapter):
    assert "no token: set HF_TOKEN" in refusal(push(adapter, hub.address, token=""))
    assert "Invalid user token" in refusal(push(adapter, hub.address, token="hf_wrong"))
    assert f"--push_to_hub you/x: {hub.address} does not take it (" in refusal(
        push(adapter, hub.address, repo="you/x")
    )
    hub.role = "read"
    assert "the token can only read" in refusal(push(adapter, hub.address))
    assert hub.files == {}


def test_a_hub_that_cannot_be_reached_is_one_line(adapter):
    nowhere = f"http://127.0.0.1:{launch.free_port()}"
    assert f"{nowhere} does not take it (" in refusal(push(adapter, nowhere))


def test_what_cannot_be_pushed_is_refused_before_anything_is_read(checkpoint):
    config = eval_wer.Config(
        model=str(checkpoint), push_to_hub="whisper mr", max_clips=3, output_dir="/nowhere"
    )
    with pytest.raises(cli.UserError) as error:
        eval_wer.check(config)
    for message in (
        "--push_to_hub whisper mr: is no name on the Hub: give OWNER/NAME",
        "goes with a model card: score all of --split test",
        "has no recipe.json of train_lora.py: give --adapter",
    ):
        assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(cli.UserError, match="HF_HUB_OFFLINE is set: unset it"):
        check_access(REPO)
    with pytest.raises(cli.UserError, match="takes one adapter: give --adapter one folder"):
        eval_wer.check(eval_wer.Config(push_to_hub=REPO, adapter="tests,docs"))


@pytest.mark.slow
def test_an_evaluation_pushes_its_adapter_only_if_asked(hub, checkpoint, prepared, tmp_path):
    run = small_options(checkpoint, prepared, tmp_path, max_steps=1)
    train(run)
    options = {
        "model": run["model"], "data_dir": run["data_dir"],
        "adapter": f"{run['output_dir']}/adapter", "output_dir": str(tmp_path / "wer"),
        "num_workers": 0, "panels": False,
    }  # fmt: skip
    pushed = options | {"push_to_hub": REPO, "benchmark": "google/fleurs:mr_in"}
    words = [sys.executable, "-c", EVALUATE, json.dumps([options, pushed])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    own = environment(tmp_path, hub.address)
    with subprocess.Popen(words, cwd=launch.ROOT, env=own, text=True, **pipes) as process:
        lines = list(itertools.takewhile(lambda line: line != "evaluated\n", process.stdout))
        assert hub.files == {}
        rest, _ = process.communicate("\n")
    assert process.returncode == 0, "".join(lines) + rest
    (tmp_path / "README.md").write_bytes(hub.files["README.md"])
    metadata = metadata_load(tmp_path / "README.md")
    assert metadata["model-index"][0]["name"] == "whisper-mr"
    (entry,) = yaml.safe_load(hub.files[".eval_results/google_fleurs_mr_in.yaml"])
    assert entry["value"] == metadata["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert f'"{REPO}"' in hub.files["README.md"].decode()
    assert not [name for name, content in hub.files.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in hub.files.items() if str(checkpoint).encode() in content]
