"""What a script loads before it works, and that no time goes into collecting its imports."""

import ast
import subprocess
import sys

import launch
import pytest

SCRIPTS = ("preprocess.py", "train_lora.py", "eval_wer.py", "transcribe.py", "export.py")
MODELS = "transformers.models.whisper.modeling_whisper"  # and with it torch._dynamo and SciPy
NOT_FOR_OPTIONS = (
    MODELS, "peft", "bitsandbytes", "datasets", "evaluate", "scipy", "torch._dynamo",
)  # fmt: skip
HELP = """
import gc, runpy, sys
collections = []
gc.callbacks.append(lambda phase, _: collections.append(phase))
sys.argv = ["transcribe.py", "--help"]
try:
    runpy.run_path("transcribe.py", run_name="__main__")
except SystemExit:
    pass
print(len(collections), gc.isenabled(), *sys.modules)
"""


@pytest.mark.slow
def test_options_are_read_without_models_adapters_and_corpora_and_without_collecting_garbage():
    done = subprocess.run(
        [sys.executable, "-c", HELP],
        cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    collections, is_enabled, *modules = done.stdout.splitlines()[-1].split()
    assert "tyro" in modules
    assert not set(NOT_FOR_OPTIONS).intersection(modules)
    assert is_enabled == "True"
    assert int(collections) < 200, "1,160 if it collects while it imports"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_disables_garbage_collection_before_it_imports_any_library(script):
    tree = ast.parse((launch.ROOT / script).read_text(encoding="utf-8"))
    before = tree.body[: next(i for i, node in enumerate(tree.body) if isinstance(node, ast.If))]
    assert "gc.disable()" in ast.unparse(tree.body[len(before)])
    modules = {
        name
        for node in before
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert "gc" in modules and modules <= sys.stdlib_module_names
