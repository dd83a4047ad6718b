"""Requests to SageMaker: golden ones, AWS's own limits, contradictions, metrics, prices."""

import json
import re
from pathlib import Path

import launch
import pytest
import torch
from short_run import small_options, train
from strict_aws import BUCKET, IMAGE, ROLE_ARN
from transformers import WhisperConfig, WhisperForConditionalGeneration

import eval_wer
import export
import preprocess
import train_lora
import transcribe
from common import cli
from jobs import aws_model, instances
from jobs import check as job_check
from jobs import fit as job_fit
from jobs import report as job_report
from jobs import request as job_request
from jobs.request import Eval, Export, Prepare, Train, Transcribe, build_request

GOLDEN = Path(__file__).parent / "golden"
NAME = "whisper-20261123-120000"
BASE = {"role": ROLE_ARN, "image_uri": IMAGE, "output_s3": f"s3://{BUCKET}/whisper"}


def train_job(**more):
    return Train(**BASE | {"train_s3": f"s3://{BUCKET}/prepared"} | more)


def train_request(options=None, **more):
    return build_request(train_job(**more), train_lora.Config(**options or {}), NAME)


def problems(options=None, **more):
    """What is found wrong with a training job."""
    job, config = train_job(**more), train_lora.Config(**options or {})
    request = build_request(job, config, f"{job.name}-20261123-120000")
    return job_check.all_problems(job, config, request)


# ------ golden requests

ORIGINAL = {
    "instance_type": "ml.g5.2xlarge", "input_mode": "FastFile", "keep_alive_seconds": 1800,
    "environment": "WANDB_DISABLED=true",
}  # fmt: skip
ORIGINAL_OPTIONS = {
    "model": "openai/whisper-large-v2", "quantize": "int8", "global_batch_size": 8,
    "warmup_ratio": 0.05, "precision": "fp16",
}  # fmt: skip
REQUESTS = {
    "original_recipe": lambda: train_request(ORIGINAL_OPTIONS, **ORIGINAL),
    "ddp_2_nodes": lambda: train_request(
        {"model": "openai/whisper-large-v3", "global_batch_size": 64},
        instance_type="ml.g5.12xlarge", instance_count=2, stage_to_local=True,
        input_mode="FastFile", tags="project=marathi,owner=speech", encrypt_traffic=True,
        subnets="subnet-1a,subnet-1b", security_groups="sg-1",
    ),
    "zero2_spot_2_nodes": lambda: train_request(
        {"model": "openai/whisper-large-v3", "tune": "full", "learning_rate": 1e-5},
        instance_type="ml.p4d.24xlarge", instance_count=2, spot=True,
        accelerate_config="deepspeed_zero2", max_run_seconds=43_200, max_wait_seconds=86_400,
        max_retries=3, tensorboard_s3=f"s3://{BUCKET}/tensorboard", kms_key="alias/speech",
        hf_token_from="secretsmanager:hf-token", remote_debug=True,
    ),
    "eval": lambda: build_request(
        Eval(
            **BASE, test_s3=f"s3://{BUCKET}/prepared", adapter_job="whisper-20261122-090000",
            instance_count=2, keep_alive_seconds=0,
        ),
        eval_wer.Config(model="openai/whisper-large-v2", compare_base=True, context="full"), NAME,
    ),
    "prepare": lambda: job_request.build_processing_request(
        Prepare(
            **BASE, source_s3=f"s3://{BUCKET}/raw/mr",
            kms_key="1234abcd-12ab-34cd-56ef-1234567890ab",
        ),
        preprocess.Config(language="mr", model="openai/whisper-large-v2"), NAME,
    ),
    "export": lambda: build_request(
        Export(
            **BASE, test_s3=f"s3://{BUCKET}/prepared", adapter_job="whisper-20261122-090000",
        ),
        export.Config(model="openai/whisper-small", formats="hf,ct2,ggml"), NAME,
    ),
    "transcribe": lambda: job_request.build_processing_request(
        Transcribe(
            **BASE, audio_s3=f"s3://{BUCKET}/radio", audio_file="files.txt",
            model_s3=f"s3://{BUCKET}/whisper-small", adapter_job="whisper-20261122-090000",
            kms_key="1234abcd-12ab-34cd-56ef-1234567890ab",
        ),
        transcribe.Config(language="mr", formats="srt"), NAME,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_the_golden_one_and_aws_model_takes_it(name):
    request = REQUESTS[name]()
    file = GOLDEN / f"{name}.json"
    assert request == json.loads(file.read_text(encoding="utf-8")), f"{file} differs"
    operation = f"Create{'Processing' if 'ProcessingJobName' in request else 'Training'}Job"
    assert aws_model.problems(operation, request) == []


def test_everything_that_the_estimator_of_sdk_v2_sent_is_sent_or_has_its_reason():
    """estimator_v2.json is what the HuggingFace estimator of sagemaker 2.257.7 really sent."""
    theirs = json.loads((GOLDEN / "estimator_v2.json").read_text(encoding="utf-8"))
    ours = REQUESTS["original_recipe"]()
    different = {  # member -> why
        "TrainingJobName": "a time of its own",
        "HyperParameters": "plain strings, not JSON in JSON; no sagemaker_*: no toolkit reads them",
        "DebugHookConfig": "an agent that nothing here uses",
        "AlgorithmSpecification": "its own metrics",
        "InputDataConfig": "one folder holds all splits",
    }
    for member, value in theirs.items():
        if member not in different:
            assert (
                ours[member].items() >= value.items()
                if isinstance(value, dict)
                else (ours[member] == value)
            ), f"{member}: {ours.get(member)} instead of {value}"
    for key in ("TrainingImage", "EnableSageMakerMetricsTimeSeries"):
        spec = theirs["AlgorithmSpecification"]
        assert ours["AlgorithmSpecification"][key] == spec[key]
    channel = theirs["InputDataConfig"][0]
    assert ours["InputDataConfig"] == [channel]


def test_only_options_that_differ_from_their_default_are_sent_and_booleans_are_spelled_plainly():
    sent = train_request({"cache_encoder": True, "lora_scope": "decoder", "seed": 42})
    assert sent["HyperParameters"] == {"cache_encoder": "true", "lora_scope": "decoder"}


def test_what_is_sent_is_read_back_as_it_was_meant():
    options = {"learning_rate": 5e-4, "cache_encoder": True, "lora_targets": "q_proj", "seed": 7}
    sent = train_request(options)["HyperParameters"]
    args = [f"--{key}={value}" for key, value in sent.items()]
    assert cli.parse(train_lora.Config, args) == train_lora.Config(**options)


def test_a_folder_ends_in_a_slash_because_a_prefix_matches_its_neighbours():
    channel = train_request(train_s3=f"s3://{BUCKET}/prepared")["InputDataConfig"][0]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{BUCKET}/prepared/"


def test_instances_with_their_own_disk_get_no_volume_key():
    own = train_request(kms_key="k", instance_type="ml.g5.2xlarge")
    assert "VolumeKmsKeyId" not in own["ResourceConfig"]
    assert own["OutputDataConfig"]["KmsKeyId"] == "k"
    assert train_request(kms_key="k", instance_type="ml.p3.2xlarge")["ResourceConfig"][
        "VolumeKmsKeyId"
    ] == "k"  # fmt: skip


@pytest.mark.parametrize("option", ["environment", "tags"])
def test_a_name_that_is_given_twice_is_refused(option):
    with pytest.raises(cli.UserError, match=f"--{option} A=1,A=2: A is given twice: keep one"):
        train_request(**{option: "A=1,A=2"})


def test_checkpoints_end_in_a_slash_because_their_prefix_matches_its_neighbours():
    given = train_request(checkpoint_s3=f"s3://{BUCKET}/whisper/a/checkpoints")
    assert given["CheckpointConfig"]["S3Uri"] == f"s3://{BUCKET}/whisper/a/checkpoints/"
    own = train_request()["CheckpointConfig"]["S3Uri"]
    assert own == f"s3://{BUCKET}/whisper/{NAME}/checkpoints/"


def test_an_alias_is_a_key_for_results_but_not_for_a_disk():
    assert not problems(kms_key="alias/speech"), "an instance type with its own disk"
    assert len(problems(kms_key="alias/speech", instance_type="ml.m5.xlarge")) >= 1
    key = "arn:aws:kms:us-east-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    assert not [one for one in problems(kms_key=key, instance_type="ml.m5.xlarge") if "kms" in one]


def test_a_spot_job_saves_by_the_clock_unless_told_how_often():
    assert train_request(spot=True)["HyperParameters"] == {"save_every_minutes": "10"}
    often = train_request({"save_every_minutes": 2.0}, spot=True)["HyperParameters"]
    assert often == {"save_every_minutes": "2.0"}


# ------ refusals

WRONG = [
    ({"spot": True, "keep_alive_seconds": 60}, "--keep_alive_seconds 60: spot instances cannot"),
    ({"spot": True, "max_wait_seconds": 60}, "--max_wait_seconds 60: is less than --max_run"),
    ({"max_wait_seconds": 90_000}, "--max_wait_seconds 90000: only spot jobs wait"),
    ({"instance_count": 2, "accelerate_config": "single_gpu"}, "is one process, and 2 x ml.g5.2x"),
    ({"instance_type": "ml.g5.12xlarge", "accelerate_config": "single_gpu"}, "would start 4"),
    ({"instance_count": 2, "accelerate_config": "multi_gpu"}, "give multi_node"),
    ({"accelerate_config": "deepspeed_zero2"}, "starts one: give auto, or more GPUs"),
    ({"accelerate_config": "cpu"}, "would leave the GPUs of ml.g5.2xlarge idle"),
    ({"accelerate_config": "zero9"}, "--accelerate_config zero9: is not in accelerate_configs"),
    ({"instance_type": "ml.g5.2xlrge"}, "--instance_type ml.g5.2xlrge: AWS knows no such value"),
    ({"instance_type": "ml.g5.2xlrge"}, "did you mean ml.g5.2xlarge?"),
    ({"name": "a_b"}, "--name 'a_b-"),
    ({"role": "arn:aws:iam::1:role/x"}, "--role 'arn:aws:iam::1:role/x': does not match"),
    ({"role": ""}, "--role is empty"),
    ({"role": "x", "dry_run": True}, "--role x: a name needs IAM"),
    ({"train_s3": ""}, "--train_s3 is empty"),
    ({"train_s3": "bucket/prepared"}, "--train_s3 bucket/prepared: is not an S3 URI: write s3://"),
    ({"train_s3": "s3://my-bucket/shared//prepared"}, "write s3://my-bucket/shared/prepared"),
    ({"train_s3": "s3://my-bucket//prepared"}, "write s3://my-bucket/prepared"),
    ({"output_s3": "s3://my-bucket/whisper//"}, "write s3://my-bucket/whisper"),
    ({"checkpoint_s3": "s3://My_Bucket/x"}, "--checkpoint_s3 s3://My_Bucket/x: My_Bucket is no bu"),
    ({"train_s3": "s3://10.0.0.1/x"}, "10.0.0.1 is no bucket's name"),
    ({"kms_key": "alias/speech", "instance_type": "ml.m5.xlarge"}, "takes a key's id or ARN, no"),
    (
        {"hf_token_from": "ssm:hf", "network_isolation": True, "model_s3": "s3://my-bucket/m"},
        "--hf_token_from ssm: cannot be read with --network_isolation true",
    ),
    ({"environment": "LAUNCH_SCRIPT=x.py"}, "--environment LAUNCH_SCRIPT: is set by the job: leav"),
    ({"environment": "NCCL_SOCKET_IFNAME=lo"}, "--environment NCCL_SOCKET_IFNAME: is set by the j"),
    ({"max_run_seconds": 2_419_201}, "--max_run_seconds 2419201: give at most 2419200, 28 days"),
    ({"tags": "aws:owner=a"}, "--tags aws:owner: AWS reserves names that begin with aws: fo"),
    ({"tags": ",".join(f"k{i}=v" for i in range(51))}, "51 entries, AWS takes at most 50"),
    ({"name": "x" * 50}, "does not match [a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}"),
    ({"region": "eu-west-1"}, "--region eu-west-1: the image is in us-east-1"),
    ({"image_uri": "whisper:latest"}, "--region is empty and --image_uri whisper:latest names"),
    ({"subnets": "subnet-1"}, "--subnets and --security_groups go together"),
    ({"network_isolation": True}, "--network_isolation true: the Hub cannot be reached"),
    ({"environment": "HF_TOKEN=hf_abc"}, "--environment HF_TOKEN: everybody who may look"),
    ({"hf_token_from": "hf_abc"}, "--hf_token_from: write secretsmanager:NAME or ssm:NAME"),
    ({"environment": f"A={'x' * 513}"}, "--environment xxx"),
    ({"tags": "owner=a?b"}, "--tags 'a?b': does not match"),
    ({"keep_alive_seconds": 99_999}, "--keep_alive_seconds 99999: 99999, AWS takes at most 21600"),
    ({"max_retries": 31}, "--max_retries 31: 31, AWS takes at most 30"),
    ({"processes_per_host": 2}, "--processes_per_host 2: ml.g5.2xlarge has 1 GPUs"),
    ({"stage_to_local": True}, "--stage_to_local true: File mode has copied the data already"),
    ({"instance_count": 0}, "--instance_count 0: give 1 or more"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_each_contradiction_is_named_with_its_remedy(wrong, message):
    found = problems(**wrong)
    assert any(message in one for one in found), found


@pytest.mark.parametrize("config", ["deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2"])
def test_packed_weights_are_not_sharded(config):
    found = problems({"quantize": "nf4"}, instance_type="ml.g5.12xlarge", accelerate_config=config)
    assert len(found) == 1
    assert f"--train.quantize nf4: packed weights cannot be sharded, as {config} does" in found[0]


def test_options_that_the_job_sets_are_refused():
    assert (
        "--train.data_dir x: is set by the job: give --train_s3" in problems({"data_dir": "x"})[0]
    )
    assert "--model_s3 names another" in problems({"model": "m"}, model_s3=f"s3://{BUCKET}/m")[0]


def test_other_folders_are_refused_because_a_job_has_the_data_of_one():
    job = Eval(**BASE, test_s3=f"s3://{BUCKET}/prepared", model_s3=f"s3://{BUCKET}/m")
    options = eval_wer.Config(also="news")
    found = job_check.all_problems(job, options, build_request(job, options, NAME))
    assert any("--eval.also news: a job has the data of --test_s3 alone" in text for text in found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"instance_count": 4},
            "--instance_count 4: a dataset is prepared on one machine: give 1, and an "
            "--instance_type with more cores: 32 prepare about 10,000 hours in about an hour",
        ),
        ({"network_isolation": True}, "--network_isolation true: preprocess.py copies the data"),
    ],
)
def test_what_a_preparation_cannot_do_is_refused(wrong, message):
    job = Prepare(**BASE, source_s3=f"s3://{BUCKET}/raw/mr", **wrong)
    options = preprocess.Config(language="mr", model="openai/whisper-large-v2")
    request = job_request.build_processing_request(job, options, NAME)
    (problem,) = job_check.all_problems(job, options, request)
    assert problem.startswith(message)


@pytest.mark.parametrize(
    ("file", "problems"), [("wer/audit.csv", 1), ("/opt/ml/processing/input/source/audit.csv", 0)]
)
def test_a_list_of_excluded_clips_has_to_be_in_the_source_of_the_job(file, problems):
    job = Prepare(**BASE, source_s3=f"s3://{BUCKET}/raw/mr")
    options = preprocess.Config(language="mr", model="openai/whisper-large-v2", exclude=file)
    request = job_request.build_processing_request(job, options, NAME)
    found = job_check.all_problems(job, options, request)
    assert [problem.split(":")[0] for problem in found] == [f"--prepare.exclude {file}"] * problems


def test_a_long_value_and_too_many_options_are_refused():
    long = problems({"lora_targets": ",".join(["q_proj"] * 400)})
    assert any("--train.lora_targets" in one and "at most 2500" in one for one in long), long
    request = train_request() | {"HyperParameters": {f"k{i}": "v" for i in range(101)}}
    (problem,) = aws_model.problems("CreateTrainingJob", request)
    assert problem.startswith("HyperParameters ")
    assert problem.endswith(": 101 entries, AWS takes at most 100")


def test_all_problems_are_told_at_once_and_each_option_once():
    found = problems(spot=True, keep_alive_seconds=1, max_wait_seconds=2, name="a_b", train_s3="")
    options = [re.match(r"--\w+", one)[0] for one in found]
    assert options == ["--train_s3", "--keep_alive_seconds", "--max_wait_seconds", "--name"]


@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("OutputDataConfig", {}, "OutputDataConfig.S3OutputPath: is missing: give it"),
        ("Compression", "x", "Compression: AWS knows no such member"),
        ("RoleArn", 5, "RoleArn: a int, where AWS wants a string"),
        (
            "EnableManagedSpotTraining",
            "true",
            "EnableManagedSpotTraining: a str, where AWS wants a",
        ),
        ("Tags", [{"Key": "a"}], "Tags.Value: is missing: give it"),
        ("StoppingCondition", {"MaxRuntimeInSeconds": True}, "a bool, where AWS wants a integer"),
    ],
)
def test_the_model_of_aws_is_kept_to(member, value, message):
    found = aws_model.problems("CreateTrainingJob", train_request() | {member: value})
    assert any(message in one for one in found), found


def test_processing_has_no_fastfile():
    request = REQUESTS["prepare"]()
    request["ProcessingInputs"][0]["S3Input"]["S3InputMode"] = "FastFile"
    (problem,) = aws_model.problems("CreateProcessingJob", request)
    assert "FastFile: AWS knows no such value" in problem


# ------ what an instance type can run

BIG = {"model": "openai/whisper-large-v3"}
UNFIT = [
    ("ml.p2.xlarge", {}, "its K80 (compute capability 3.7) is older than torch for CUDA 13"),
    ("ml.p3.2xlarge", {}, "its V100 (compute capability 7.0) is older than torch for CUDA 13"),
    ("ml.trn1.2xlarge", {}, "has AWS's own chips instead of GPUs"),
    ("ml.p6e-gb200.36xlarge", {}, "has an Arm CPU"),
    ("ml.m5.4xlarge", BIG, "has no GPU, and openai/whisper-large-v3 has 1,550 million parameters"),
    (
        "ml.g5.2xlarge",
        BIG | {"tune": "full", "learning_rate": 1e-5},
        "openai/whisper-large-v3 with --train.tune full does not fit its A10G: one clip takes ",
    ),
    ("ml.g4dn.xlarge", BIG | {"tune": "encoder_frozen", "learning_rate": 1e-5}, "not fit its T4"),
]
FIT = [
    ("ml.g5.2xlarge", BIG),
    ("ml.g4dn.xlarge", BIG),
    ("ml.m5.4xlarge", {"model": "openai/whisper-tiny"}),
    ("ml.g5.2xlarge", {"model": "openai/whisper-small", "tune": "full", "learning_rate": 1e-5}),
    ("ml.p4d.24xlarge", BIG | {"tune": "full", "learning_rate": 1e-5}),
    ("ml.g5.2xlarge", {"model": "somebody/else", "tune": "full", "learning_rate": 1e-5}),
    ("ml.g7e.2xlarge", BIG | {"tune": "full", "learning_rate": 1e-5}),  # not known
]


@pytest.mark.parametrize(("instance_type", "options", "message"), UNFIT)
def test_an_instance_type_that_cannot_run_the_job_is_refused(instance_type, options, message):
    (found,) = problems(options, instance_type=instance_type)
    assert found.startswith(f"--instance_type {instance_type}: ")
    assert message in found
    assert ": give ml." in found


@pytest.mark.parametrize(("instance_type", "options"), FIT)
def test_an_instance_type_that_can_or_is_not_known_is_taken(instance_type, options):
    assert problems(options, instance_type=instance_type) == []


def test_the_size_of_a_model_is_read_from_its_folder_or_its_name(checkpoint):
    assert job_fit.shape_of("openai/whisper-large-v3-turbo").decoder_layers == 4
    assert job_fit.shape_of("openai/whisper-small.en") == job_fit.SHAPES["small"]
    assert job_fit.shape_of("somebody/whisper-large-v3-hi") is None
    found = job_fit.shape_of(str(checkpoint))
    assert (found.encoder_layers, found.decoder_layers) == (2, 2)


@pytest.mark.parametrize("name", job_fit.SHAPES)
def test_sizes_by_name_agree_with_transformers(name):
    shape = job_fit.SHAPES[name]
    config = WhisperConfig(
        d_model=shape.width, encoder_layers=shape.encoder_layers, vocab_size=51_865,
        decoder_layers=shape.decoder_layers, encoder_ffn_dim=4 * shape.width,
        decoder_ffn_dim=4 * shape.width, encoder_attention_heads=1, decoder_attention_heads=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    counted = sum(one.numel() for one in model.parameters())
    assert shape.parameters == pytest.approx(counted, rel=0.05)


# ------ sweeps


def test_a_sweep_is_every_combination():
    found = job_request.sweep("train.learning_rate=1e-3,5e-4;train.lora_rank=16,32", "train")
    assert len(found) == 4
    assert {"learning_rate": "5e-4", "lora_rank": "16"} in found
    assert job_request.sweep("", "train") == [{}]


@pytest.mark.parametrize(
    "text", ["lora_rank=1", "train.lora_rank", "train.a=1;train.a=2", "train.a=1,"]
)
def test_a_sweep_that_cannot_be_read_is_refused(text):
    with pytest.raises(cli.UserError, match="--sweep"):
        job_request.sweep(text, "train")


# ------ metrics


def read_metric(definitions, name, lines):
    (pattern,) = (one["Regex"] for one in definitions if one["Name"] == name)
    return [float(found[1]) for line in lines if (found := re.search(pattern, line))]


def test_every_metric_is_read_out_of_what_the_scripts_really_print(
    checkpoint, prepared, tmp_path, capsys
):
    options = small_options(checkpoint, prepared, tmp_path, max_steps=4, eval_every=2)
    train(options)
    lines = capsys.readouterr().out.splitlines()
    text = Path(options["output_dir"], "metrics.jsonl").read_text(encoding="utf-8")
    written = [json.loads(line) for line in text.splitlines()]
    definitions = job_request.metric_definitions(train_job())
    for name, key in job_request.METRICS.items():
        expected = [record[key] for record in written if key in record]
        assert expected, f"{key} was never logged"
        assert read_metric(definitions, name, lines) == pytest.approx(expected, rel=1e-4), name

    output = str(tmp_path / "wer")
    adapter = str(Path(options["output_dir"], "adapter"))
    eval_wer.main(
        eval_wer.Config(
            model=str(checkpoint), adapter=adapter, compare_base=True, data_dir=str(prepared),
            output_dir=output, num_workers=0, panels=False,
        )
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads(Path(output, "wer.json").read_text(encoding="utf-8"))
    definitions = job_request.metric_definitions(Eval(**BASE, test_s3=f"s3://{BUCKET}/prepared"))
    for definition in definitions:
        system, _, rate = definition["Name"].partition(":")
        measure, _, normaliser = rate.partition("_")
        expected = scores[system]["normalisers"][normaliser][measure]
        assert read_metric(definitions, definition["Name"], lines) == [
            pytest.approx(expected, rel=1e-4)
        ]


def test_signs_and_exponents_of_a_metric_are_kept():
    definitions = job_request.metric_definitions(train_job())
    line = "step=3 epoch=0.1 loss=-1.5e-07 grad_norm=1e+03 learning_rate=4.4382e-05"
    assert read_metric(definitions, "train:loss", [line]) == [-1.5e-07]
    assert read_metric(definitions, "train:grad_norm", [line]) == [1000.0]
    assert read_metric(definitions, "train:learning_rate", [line]) == [4.4382e-05]
    assert read_metric(definitions, "train:loss", ["step=4 eval_loss=2.5"]) == []


# ------ prices and instance types


def test_an_unknown_price_stays_unknown():
    assert instances.price("ml.g5.2xlarge", "us-east-1") == (1.515, "2026-09-27")
    assert instances.price("ml.g5.2xlarge", "eu-west-1") is None
    assert instances.price("ml.m5.xlarge", "us-east-1") is None
    told = job_report.cost_ceiling(train_job(instance_type="ml.p3.2xlarge"), 1)
    assert told.startswith("cost ceiling: unknown")


@pytest.mark.parametrize("job", [Train, Eval, Export, Prepare, Transcribe])
def test_the_default_instance_type_has_a_price(job):
    assert instances.price(job().instance_type, "us-east-1")


def test_the_ceiling_counts_every_instance_job_and_the_kept_ones():
    kept = train_job(instance_count=2, max_run_seconds=3600, keep_alive_seconds=1800)
    told = job_report.cost_ceiling(kept, 4)
    assert told.startswith(f"cost ceiling: {4 * 2 * 1.5 * 1.515:.2f} USD (4 x 2 x ml.g5.2xlarge")
    assert told.endswith("without disks, S3, data transfer and taxes")
    spot = train_job(spot=True, max_run_seconds=3600)
    assert "cost ceiling: 1.51 USD" in job_report.cost_ceiling(spot, 1)
    assert "spot is cheaper" in job_report.cost_ceiling(spot, 1)


@pytest.mark.parametrize(
    ("instance_type", "gpus", "own_disk"),
    [
        ("ml.g5.2xlarge", 1, True), ("ml.g5.12xlarge", 4, True), ("ml.g6e.48xlarge", 8, True),
        ("ml.p4d.24xlarge", 8, True), ("ml.p5.4xlarge", 1, True), ("ml.p3.8xlarge", 4, False),
        ("ml.m5.4xlarge", 0, False), ("ml.c5d.xlarge", 0, True), ("ml.trn1.2xlarge", None, False),
    ],
)  # fmt: skip
def test_gpus_and_disks_of_instance_types(instance_type, gpus, own_disk):
    assert instances.num_gpus(instance_type) == gpus
    assert instances.has_local_disk(instance_type) == own_disk


def test_every_instance_type_with_a_price_is_one_that_sagemaker_has():
    table = json.loads(instances.TABLE.read_text(encoding="utf-8"))
    for region in table["regions"].values():
        for kind in region["usd_an_hour"]:
            assert not aws_model.problems("CreateTrainingJob", train_request(instance_type=kind))
            assert instances.num_gpus(kind) is not None


def test_defaults_are_those_of_the_original_recipe():
    job = Train()
    assert (job.volume_gb, job.max_run_seconds, job.input_mode) == (200, 86_400, "File")
    assert job.keep_alive_seconds == 0, "which they had at 1800: it is billed"
    assert launch.ROOT.joinpath("accelerate_configs", "multi_node.yaml").exists()
