"""accelerate_configs: accelerate accepts each, each says how it is launched, all are documented."""

import shlex

import launch
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FILES = sorted((launch.ROOT / "accelerate_configs").glob("*.yaml"))
EXPECTED = {
    "single_gpu", "multi_gpu", "multi_node", "deepspeed_zero1", "deepspeed_zero2",
    "deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2", "cpu",
}  # fmt: skip


def test_every_way_to_run_is_there_and_documented():
    assert {file.stem for file in FILES} == EXPECTED
    page = (launch.ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    for name in EXPECTED:
        assert f"`{name}`" in page, name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_accepts_it_and_its_own_command_names_it(file):
    text = file.read_text(encoding="utf-8")
    load_config_from_file(str(file))  # refuses keys that it does not know
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    joined = " ".join(comments).replace("\\ ", "")
    command = shlex.split(joined[joined.index("accelerate launch") :])
    parsed, _ = launch_command_parser().parse_known_args(command[2:])
    assert parsed.config_file == f"accelerate_configs/{file.name}"
    assert parsed.training_script == "train_lora.py"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deepspeed_is_started_by_hand_on_each_machine_and_weights_are_read_whole(file):
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert content["mixed_precision"] in ("bf16", "no"), "unquoted, YAML reads false"
    deepspeed = content.get("deepspeed_config")
    assert (deepspeed is None) == ("deepspeed" not in file.stem)
    if deepspeed:
        assert deepspeed["deepspeed_multinode_launcher"] == "standard"
        assert not deepspeed.get("zero3_init_flag", False)
