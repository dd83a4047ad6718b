"""Faults, each injected into a real run: what is kept, and what the user reads.

| fault | what is kept | what the user reads |
|---|---|---|
| SIGKILL of one process of two | the last checkpoint; the same run goes on | one line |
| SIGTERM of one of two (test_stop.py) | a checkpoint of that very step | stopped by SIGTERM |
| disk full while saving | all checkpoints before (test_train.py) | one line |
| checkpoint cut short at 20 places | the one before | a warning that names the damage |
| NaN in one batch | nothing of it | the clips' ids, and bad_batch.json |
| a corrupt row of the prepared data | the last checkpoint | the clip's id |
| a slow process | everything; the others wait | nothing |
| read-only data folder | everything | nothing |
| read-only output | nothing is begun | one line |
| a machine that never comes | nothing is begun | 1/2 clients joined, by the launcher |
| out of memory in one micro-batch | everything | pieces are cut in N from here on |
| out of memory while decoding (test_decoding.py) | everything | nothing |
| an evaluation that fails (test_train.py) | a checkpoint of that very step | the error |
| an overflow in fp16 (test_fp16.py) | everything | skipped_steps in the log line |
| a GPU that torch cannot use (test_precision.py) | nothing is begun | one line |
| different free memory (test_uneven_memory.py) | everything | nothing |
| a clock that jumps | everything (test_stop.py) | nothing |
"""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
from pathlib import Path

import launch
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from short_run import records, small_options, train

import train_lora
from common import cli
from training import checkpoint as checkpoints
from training import engine, sharded
from training import step as steps


@pytest.fixture
def options(checkpoint, train_only, tmp_path):
    return small_options(checkpoint, train_only, tmp_path, save_every=2)


def saved(options):
    return sorted(Path(options["output_dir"], "checkpoints").glob("step-*"))


def adapter(options):
    return load_file(Path(options["output_dir"], "adapter", "adapter_model.safetensors"))


def assert_same_run(whole, cut):
    assert records(cut, "loss") == records(whole, "loss")
    expected, got = adapter(whole), adapter(cut)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


# ------ processes


LONG = {"max_steps": 60}  # still under way when a loaded machine comes to stopping it


@pytest.fixture(scope="module")
def whole(checkpoint, train_only, tmp_path_factory):
    """Options of a run of two processes that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    options = small_options(checkpoint, train_only, folder, save_every=2) | LONG
    done = launch.run("train_lora.py", options, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    return options


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(options, whole):
    long = options | LONG
    process = launch.start(launch.command("train_lora.py", long, processes=2))
    launch.wait_for(lambda: len(saved(long)) > 0, process)
    launch.ranks(process)[-1].send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode
    assert "SIGKILL" in err, "the launcher says what happened"
    again = launch.run("train_lora.py", long, processes=2)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resumed at step" in again.stdout
    assert_same_run(whole, long)


@pytest.mark.slow
def test_a_process_that_is_slow_for_a_while_is_waited_for(options, whole):
    options |= LONG
    process = launch.start(launch.command("train_lora.py", options, processes=2))
    launch.wait_for(lambda: Path(options["output_dir"], "metrics.jsonl").exists(), process)
    slow = launch.ranks(process)[-1]
    slow.send_signal(signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    slow.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]
    assert_same_run(whole, options)


@pytest.mark.slow
def test_a_machine_that_never_comes_is_waited_for_as_long_as_asked(options):
    words = launch.command("train_lora.py", options, processes=2)
    port = words.index("--main_process_port")
    words[port:port] = ["--num_machines", "2", "--machine_rank", "0", "--same_network"]
    words[port:port] = ["--main_process_ip", "127.0.0.1", "--rdzv_conf", "timeout=5"]
    words[words.index("--main_process_port") + 1] = str(launch.free_port())
    launcher = launch.start(words)
    _, err = launcher.communicate(timeout=240)
    assert launcher.returncode
    assert "Timed out after" in err and "1/2 clients joined" in err, err
    assert not Path(options["output_dir"]).exists()


# ------ checkpoints


def test_a_checkpoint_cut_short_anywhere_is_skipped_for_the_one_before(options, tmp_path, capsys):
    train(options)
    newest, before = saved(options)[-1], saved(options)[-2]
    files = sorted(newest.iterdir())
    whole = {file.name: file.read_bytes() for file in files}
    cuts = [(file, share) for file in files for share in (0.0, 0.25, 0.5, 0.9, 0.999)]
    assert len(cuts) == 20
    identity = checkpoints.read_state(newest)["identity"]
    for file, share in cuts:
        content = whole[file.name]
        file.write_bytes(content[: int(share * len(content))])
        found, warnings = checkpoints.find(newest.parent, identity)
        assert found == before, (file.name, share)
        assert len(warnings) == 1 and str(newest) in warnings[0]
        file.write_bytes(content)
    assert checkpoints.find(newest.parent, identity) == (newest, [])

    flipped = bytearray(whole["weights.safetensors"])
    flipped[-1] ^= 1
    (newest / "weights.safetensors").write_bytes(flipped)
    loss = records(options, "loss")
    train(options)
    out = capsys.readouterr().out
    assert f"warning: {newest} is skipped: weights.safetensors is not as it was written" in out
    assert f"resumed at step {int(before.name[-8:])}" in out
    assert records(options, "loss") == loss


def test_a_run_with_no_whole_checkpoint_starts_anew_and_says_why(options, capsys):
    train(options)
    for folder in saved(options):
        (folder / "state.json").unlink()
    train(options)
    out = capsys.readouterr().out
    assert out.count("is skipped: state.json is missing") == 2
    assert "resumed" not in out


def test_other_options_resume_where_that_is_asked_for(options, capsys):
    train(options | {"max_steps": 4})
    train(options | {"weight_decay": 0.1, "resume_changed": True})
    out = capsys.readouterr().out
    assert "warning: resumes with other options: --max_steps 6 (was 4), --weight_decay 0.1" in out
    with pytest.raises(cli.UserError, match="holds other parameters than this run trains"):
        train(options | {"lora_rank": 8, "weight_decay": 0.1, "resume_changed": True})


def test_what_a_resumed_run_may_change_are_options():
    options = {field.name for field in dataclasses.fields(train_lora.Config)}
    assert options > checkpoints.FREE_ON_RESUME, checkpoints.FREE_ON_RESUME - options


# ------ data


def test_a_batch_of_nan_is_named_written_down_and_kept_out(options, monkeypatch):
    stock = steps.batch_loss
    monkeypatch.setattr(steps, "batch_loss", lambda *a: stock(*a) * math.nan)
    with pytest.raises(cli.UserError, match=r"see .*bad_batch\.json\)") as error:
        train(options | {"seed": 1})
    told = json.loads(Path(options["output_dir"], "bad_batch.json").read_text())
    assert told["step"] == 1
    ids = ", ".join(clip["id"] for clip in told["clips"])
    assert f"in step 1 (clips {ids}; " in str(error.value)
    assert all(clip["id"].startswith("train_") and clip["text"] for clip in told["clips"])
    assert not saved(options)


def test_no_step_is_taken_from_a_gradient_that_is_not_finite_on():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    seen = []
    for gradient in (1.0, math.nan, 1.0):
        weight.grad = torch.full((3,), gradient)
        norm = torch.nn.utils.get_total_norm([weight.grad])
        engine.hold_if_not_finite(Accelerator(cpu=True), optimizer, norm)
        optimizer.step()
        seen.append(weight.tolist())
    assert seen[0] != [1.0, 1.0, 1.0]
    assert seen[0] == seen[1] == seen[2]
    assert sharded.steps_taken(optimizer) == 1


@pytest.mark.parametrize(
    ("num_workers", "spoil"),
    [
        (0, lambda audio: b"no audio at all"),
        (1, lambda audio: b"no audio at all"),
        (0, lambda audio: audio[: len(audio) // 2]),
    ],
)
def test_a_corrupt_row_is_one_line_with_the_clips_id(
    options, prepared, tmp_path, num_workers, spoil
):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    (file,) = (copy / "train").glob("*.arrow")
    with pa.ipc.open_stream(file.read_bytes()) as stream:
        table = stream.read_all()
    audio = table["audio"].to_pylist()
    audio[7] = spoil(audio[7])
    spoilt = table.set_column(table.schema.get_field_index("audio"), "audio", pa.array(audio))
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(spoilt.cast(table.schema))
    with pytest.raises(cli.UserError, match="the audio of clip 'train_007' is damaged"):
        train(options | {"data_dir": str(copy), "num_workers": num_workers})


# ------ folders


@pytest.mark.root
def test_a_read_only_data_folder_is_enough(options, prepared, tmp_path):
    with launch.read_only(prepared, tmp_path / "data") as data:
        train(options | {"data_dir": str(data)})
    assert adapter(options)


@pytest.mark.root
def test_a_read_only_output_is_one_line(options, tmp_path):
    (tmp_path / "there").mkdir()
    with launch.read_only(tmp_path / "there", tmp_path / "mounted") as folder:
        done = launch.run("train_lora.py", options | {"output_dir": str(folder / "run")})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "cannot be written (Read-only file system): give another place" in done.stderr


@pytest.mark.slow
def test_when_one_of_two_processes_runs_out_of_memory_both_halve_and_the_losses_stay(
    options, tmp_path
):
    plain = options | {"global_batch_size": 8, "max_batch_seconds": 1000.0, "nospeech_share": 0.0}
    train(plain)
    halved = plain | {"output_dir": str(tmp_path / "halved")}
    done = launch.run("tests/out_of_memory.py", halved, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("out of memory: pieces are cut in") == 2  # 4 clips, 2, 1
    expected, got = records(plain, "loss"), records(halved, "loss")
    assert expected.keys() == got.keys()
    assert max(abs(got[step] / expected[step] - 1) for step in expected) < 1e-4


@pytest.mark.slow
def test_when_memory_runs_out_under_fsdp_the_run_ends_with_advice(options):
    del options["max_steps"]
    short = options | {"global_batch_size": 8, "max_batch_seconds": 1000.0}
    short |= {"collective_timeout": 0.2}
    done = launch.run("tests/out_of_memory.py", short, processes=2, config="fsdp2")
    assert done.returncode
    assert "error: --max_batch_seconds 1000.0: step 2 does not fit" in done.stderr, done.stderr
