"""The launcher against a strict stand-in of AWS: submit, status, logs, stop, fetch, sweep, eval."""

import datetime
import io
import json
import re
import subprocess
import sys
import tarfile
import threading
import time

import launch
import pytest
from botocore.stub import Stubber
from strict_aws import BUCKET, IMAGE, REGION, ROLE, ROLE_ARN, strict_aws

import sagemaker_launch
from common import cli, files
from jobs import follow, instances
from jobs import report as job_report

TRAIN = {
    "role": ROLE_ARN, "image_uri": IMAGE, "train_s3": f"s3://{BUCKET}/prepared",
    "output_s3": f"s3://{BUCKET}/whisper", "name": "mr",
}  # fmt: skip
STEPS = [
    {"step": 10, "epoch": 0.5, "loss": 2.5, "learning_rate": 1e-3, "clips_per_second": 9.0},
    {"step": 20, "epoch": 1.0, "loss": 1.25, "learning_rate": 5e-4, "clips_per_second": 9.5},
    {"step": 20, "eval_loss": 1.5},
    {"step": 20, "wer_raw": 68.75, "cer_raw": 28.5},
]


@pytest.fixture
def aws():
    with strict_aws() as one:
        one.put("prepared/preprocess.json", "{}")
        one.put("raw/mr/train.tsv", "")
        elsewhere = {"LocationConstraint": "eu-central-1"}
        client = one.session.client("s3")
        client.create_bucket(Bucket="frankfurt", CreateBucketConfiguration=elsewhere)
        yield one


def call(command, **options):
    """`sagemaker_launch.py COMMAND --key value ...`; a dot of an option is written `__`."""
    words = [word for key, one in options.items() for word in (f"--{key.replace('__', '.')}", one)]
    sagemaker_launch.COMMANDS[command]([str(word) for word in words])


def the_job(aws):
    (name,) = aws.jobs
    return name


# ------ start


def test_a_training_job_is_started_as_the_dry_run_showed_it(aws, capsys):
    call("train", **TRAIN, dry_run="true", train__num_epochs=5)
    out, err = capsys.readouterr()
    assert err.startswith("cost ceiling: 36.36 USD"), err
    shown = json.loads(out)
    assert not aws.jobs
    call("train", **TRAIN, train__num_epochs=5)
    sent = aws.jobs[the_job(aws)]
    for member in shown.keys() - {"TrainingJobName", "CheckpointConfig"}:
        assert sent[member] == shown[member], member
    assert sent["HyperParameters"] == {"num_epochs": "5"}
    assert f"status --job {the_job(aws)} --region {REGION}" in capsys.readouterr().out


def test_a_dry_run_needs_neither_network_nor_credentials():
    words = [sys.executable, "sagemaker_launch.py", "train"]
    words += [word for key, one in TRAIN.items() for word in (f"--{key}", one)]
    offline = {
        name: value for name, value in launch.environment().items() if not name.startswith("AWS_")
    }
    offline |= dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/nonexistent")
    offline |= {"AWS_EC2_METADATA_DISABLED": "true"}
    offline |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # nothing listens there
    process = launch.start([*words, "--dry_run", "true", "--train.lora_rank", "8"], env=offline)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["HyperParameters"] == {"lora_rank": "8"}
    process = launch.start(words, env=offline)
    _, err = process.communicate()
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: --role"), err
    assert "no AWS credentials found: set AWS_PROFILE" in err


def test_a_roles_name_is_looked_up(aws):
    call("train", **TRAIN | {"role": ROLE})
    assert aws.jobs[the_job(aws)]["RoleArn"] == ROLE_ARN


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"train_s3": f"s3://{BUCKET}/nothing"},
            "--train_s3 s3://example-bucket/nothing: has no pr",
        ),
        ({"train_s3": "s3://nobody/x"}, "--train_s3 s3://nobody/x: AWS answers: "),
        ({"output_s3": "s3://nobody/x"}, "--output_s3 s3://nobody/x: AWS answers: "),
        (
            {"train_s3": "s3://frankfurt/p"},
            "--train_s3 s3://frankfurt/p: the bucket is in eu-centr",
        ),
        ({"checkpoint_s3": "s3://frankfurt/p"}, "--checkpoint_s3 s3://frankfurt/p: the bucket is "),
        ({"model_s3": f"s3://{BUCKET}/base"}, "--model_s3 s3://example-bucket/base: is empty"),
        ({"role": "nobody"}, "--role nobody: AWS answers: "),
        ({"role": "arn:aws:iam::123456789012:role/nobody"}, "AWS answers: .*Could not assume role"),
        ({"role": "arn:aws:iam::999999999999:role/other"}, "belongs to another account than y"),
        (
            {"train__lora_rnk": 8},
            "unknown option --train.lora_rnk: did you mean --train.lora_rank?",
        ),
        ({"train__lora_rank": 0}, "--train.lora_rank 0: give a positive number"),
        ({"sweep": "train.lora_rnk=8"}, "unknown option --train.lora_rnk: did you mean"),
        ({"sweep": "train.lora_rank=8,x"}, "x"),
        ({"sweep": "train.lora_rank=8", "train__lora_rank": 4}, "is in --sweep too: keep one"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(aws, wrong, message):
    with pytest.raises(cli.UserError) as error:
        call("train", **TRAIN | wrong)
    assert "\n" not in str(error.value)
    assert re.search(message.replace("?", r"\?"), str(error.value)), error
    assert not aws.jobs


@pytest.mark.parametrize(
    ("variables", "words", "message"),
    [
        (
            {"AWS_PROFILE": "nobody"},
            [],
            "error: AWS_PROFILE nobody: The config profile (nobody) co",
        ),
        ({}, ["--region", "us east"], "error: --region us east: Provided region_name 'us east' do"),
        ({}, [], "error: no region configured: pass --region, as us-east-1"),
    ],
)
def test_a_mistake_in_awss_own_settings_is_told_in_one_line(variables, words, message):
    offline = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run(
        [sys.executable, "sagemaker_launch.py", "status", "--job", "x", *words],
        cwd=launch.ROOT, env=offline | variables, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(message)


def test_an_unknown_command_is_answered_with_the_nearest():
    done = subprocess.run(
        [sys.executable, "sagemaker_launch.py", "trian"],
        cwd=launch.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "error: unknown command trian: did you mean train?\n",
    )
    done = subprocess.run(
        [sys.executable, "sagemaker_launch.py", "--help"],
        cwd=launch.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert all(command in done.stdout for command in sagemaker_launch.COMMANDS)


# ------ status


def put_records(aws, name, records=STEPS):
    text = "".join(json.dumps(record) + "\n" for record in records)
    aws.put(f"whisper/{name}/checkpoints/metrics.jsonl", text + '{"step": 30, "lo')


def test_status_shows_phase_curve_time_cost_and_the_saving_of_spot(aws, capsys):
    call("train", **TRAIN, spot="true", instance_count=2)
    name = the_job(aws)
    started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    hour = {"TrainingStartTime": started, "TrainingEndTime": started + datetime.timedelta(hours=1)}
    aws.set(name, SecondaryStatus="Training", **hour)  # an hour, however slow the machine is
    put_records(aws, name)
    capsys.readouterr()
    call("status", job=name)
    told = capsys.readouterr().out
    assert f"{name}: InProgress, Training" in told
    assert "instances  2 x ml.g5.2xlarge" in told
    assert "cost       3.03 USD so far at most (spot)" in told
    assert [line.split() for line in told.splitlines() if line.split()[:1] == ["20"]] == [
        ["20", "1.25", "1.5", "68.75", "28.5", "9.5"]
    ]
    aws.set(
        name, TrainingJobStatus="Completed", SecondaryStatus="Completed",
        TrainingTimeInSeconds=3600, BillableTimeInSeconds=1080,
        SecondaryStatusTransitions=[
            {"Status": status, "StartTime": started} for status in ("Training", "Interrupted")
        ],
    )  # fmt: skip
    call("status", job=name)
    told = capsys.readouterr().out
    assert f"{name}: Completed, not finished: run it again with --checkpoint_s3" in told
    aws.put(f"whisper/{name}/checkpoints/train.json", "{}")
    call("status", job=name)
    told = capsys.readouterr().out
    assert f"{name}: Completed\n" in told
    assert "time       3,600 s, billable 1,080 s an instance" in told
    assert "cost       0.91 USD\n" in told
    assert "spot       interrupted 1 times\nspot       saved 70 %" in told


def test_status_of_a_failed_job_says_why_and_an_unknown_one_is_named(aws, capsys):
    call("train", **TRAIN)
    aws.set(the_job(aws), TrainingJobStatus="Failed", FailureReason="AlgorithmError: no clips")
    capsys.readouterr()
    call("status", job=the_job(aws))
    assert "failure    AlgorithmError: no clips" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match="--job nobody: no such job in us-east-1"):
        call("status", job="nobody")
    with pytest.raises(cli.UserError, match="--job is empty"):
        call("status")


def test_a_sweep_is_a_job_each_under_one_name_and_status_compares_them(aws, capsys):
    call("train", **TRAIN, sweep="train.learning_rate=1e-3,5e-4;train.lora_rank=16,32")
    names = sorted(aws.jobs)
    assert len(names) == 4
    sent = [aws.jobs[name]["HyperParameters"] for name in names]
    assert {"lora_rank": "16"} in sent  # 1e-3 and 32 are the defaults
    assert {"learning_rate": "0.0005"} in sent
    assert {"learning_rate": "0.0005", "lora_rank": "16"} in sent
    assert len({aws.jobs[name]["CheckpointConfig"]["S3Uri"] for name in names}) == 4
    put_records(aws, names[0])
    out = capsys.readouterr().out
    group = names[0].rsplit("-", 1)[0]
    assert f"4 jobs started: {group}" in out
    call("status", job=group)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "job", "state", "learning_rate", "lora_rank", "step", "loss", "eval_loss", "wer_raw", "cost"
    ]  # fmt: skip
    assert [row.split()[0] for row in rows] == names
    assert "68.75" in rows[0]
    call("stop", job=group)
    assert {aws.jobs[name]["TrainingJobStatus"] for name in names} == {"Stopping"}
    with pytest.raises(cli.UserError, match="is a sweep of 4 jobs: give one"):
        call("logs", job=group)


def test_a_sweep_that_meets_a_quota_names_what_runs_and_how_to_end_it(aws, capsys):
    aws.quota = 2
    with pytest.raises(cli.UserError) as error:
        call("train", **TRAIN, sweep="train.lora_rank=8,16,32,64")
    names = sorted(aws.jobs)
    assert len(names) == 2
    told, group = str(error.value), names[0].rsplit("-", 1)[0]
    assert re.match("--name mr: AWS answers: .*ResourceLimitExceeded.*limit is 2", told), told
    assert f"2 of 4 jobs were started before and are paid for: {', '.join(names)}" in told
    assert f"stop them with python sagemaker_launch.py stop --job {group} --region {REGION}" in told
    assert capsys.readouterr().out == "".join(f"started {name}\n" for name in names)
    call("stop", job=group)
    assert {aws.jobs[name]["TrainingJobStatus"] for name in names} == {"Stopping"}


def test_a_run_that_another_jobs_checkpoints_had_finished_is_not_finished_by_them(aws, capsys):
    aws.put("whisper/old/checkpoints/train.json", "{}")
    call("train", **TRAIN, checkpoint_s3=f"s3://{BUCKET}/whisper/old/checkpoints")
    now = datetime.datetime.now(datetime.UTC)
    aws.end(the_job(aws), "Completed", CreationTime=now + datetime.timedelta(hours=1))
    call("status", job=the_job(aws))
    assert f"{the_job(aws)}: Completed, not finished" in capsys.readouterr().out


def test_a_long_curve_is_thinned_out_but_keeps_every_evaluation_and_the_end():
    records = [{"step": step, "loss": 1.0} for step in range(10, 2010, 10)]
    records += [{"step": step, "eval_loss": 2.0} for step in (770, 1540)]
    shown = [int(line.split()[0]) for line in job_report.curve(records)[1:]]
    assert {770, 1540, 2000} <= set(shown)
    assert len(shown) < 20


# ------ logs, stop

GROUP = "/aws/sagemaker/TrainingJobs"


def test_logs_show_all_hosts_in_order_of_time(aws, capsys):
    call("train", **TRAIN, instance_count=2)
    name = the_job(aws)
    capsys.readouterr()
    call("logs", job=name)
    assert capsys.readouterr().err == f"{name} has printed nothing yet\n"
    aws.say(GROUP, f"{name}/algo-1-1700000000", "one", "three", at=20)
    aws.say(GROUP, f"{name}/algo-2-1700000000", "two", at=10)
    aws.say(GROUP, "another-job/algo-1-1700000000", "not this")
    call("logs", job=name)
    assert capsys.readouterr().out == "algo-1: one\nalgo-1: three\nalgo-2: two\n"


def test_logs_follow_until_the_job_ends(aws, capsys, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    call("train", **TRAIN)
    name = the_job(aws)
    capsys.readouterr()
    follower = threading.Thread(target=call, args=("logs",), kwargs={"job": name, "follow": "true"})
    follower.start()
    for number in range(3):
        aws.say(GROUP, f"{name}/algo-1-1700000000", f"step={number}")
        time.sleep(0.2)
        assert follower.is_alive()
    aws.set(name, TrainingJobStatus="Completed")
    follower.join(20)
    out, err = capsys.readouterr()
    assert out == "algo-1: step=0\nalgo-1: step=1\nalgo-1: step=2\n"
    assert err == f"{name}: Completed\n"


def test_stop_asks_once_and_says_so_afterwards(aws, capsys):
    call("train", **TRAIN)
    call("stop", job=the_job(aws))
    assert aws.jobs[the_job(aws)]["TrainingJobStatus"] == "Stopping"
    assert "stopping; it has two minutes to save" in capsys.readouterr().out
    aws.set(the_job(aws), TrainingJobStatus="Stopped")
    call("stop", job=the_job(aws))
    assert "Stopped already" in capsys.readouterr().out


# ------ instances that are kept


@pytest.mark.parametrize("state", ["Completed", "Failed", "Stopped"])
def test_instances_are_kept_and_billed_however_a_job_ends_until_they_are_released(
    aws, state, capsys
):
    call("train", **TRAIN, keep_alive_seconds=3600, instance_count=2)
    name = the_job(aws)
    aws.put(f"whisper/{name}/checkpoints/train.json", "{}")
    aws.end(name, state, TrainingTimeInSeconds=60, BillableTimeInSeconds=60)
    aws.jobs[name]["WarmPoolStatus"]["ResourceRetainedBillableTimeInSeconds"] = 1800
    capsys.readouterr()
    call("status", job=name)
    told = capsys.readouterr().out
    assert "cost       0.05 USD\n" in told
    assert "kept       Available, billable 1,800 s an instance, 1.51 USD more" in told
    assert "sagemaker_launch.py release" in told
    call("release", job=name)
    assert capsys.readouterr().out == f"{name}: its instances are kept no longer\n"
    call("status", job=name)
    told = capsys.readouterr().out
    assert "kept       Terminated, billable 1,800 s an instance" in told
    assert "sagemaker_launch.py release" not in told
    call("release", job=name)
    assert capsys.readouterr().out == f"{name}: no instances are kept (Terminated)\n"


def test_no_instances_are_kept_unless_asked_for(aws, capsys):
    call("train", **TRAIN)
    assert "KeepAlivePeriodInSeconds" not in aws.jobs[the_job(aws)]["ResourceConfig"]
    aws.end(the_job(aws), "Failed")
    capsys.readouterr()
    call("release", job=the_job(aws))
    assert capsys.readouterr().out == f"{the_job(aws)}: no instances are kept\n"


# ------ --wait


@pytest.mark.parametrize(
    ("state", "finished", "code", "fate"),
    [
        ("Completed", True, 0, "Completed"),
        ("Completed", False, 1, "Completed, not finished: run it again with"),
        ("Failed", False, 1, "Failed"),
        ("Stopped", False, 1, "Stopped"),
    ],
)
def test_wait_follows_a_job_and_exits_with_its_fate(
    aws, state, finished, code, fate, capsys, monkeypatch
):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    ended = []

    def run():
        try:
            call("train", **TRAIN, wait="true")
            ended.append(0)
        except SystemExit as stop:
            ended.append(stop.code)

    waiting = threading.Thread(target=run)
    waiting.start()
    deadline = time.monotonic() + 60
    while not aws.jobs and time.monotonic() < deadline:
        time.sleep(0.05)
    name = the_job(aws)
    aws.say(GROUP, f"{name}/algo-1-1700000000", "step=1")
    time.sleep(0.5)
    assert waiting.is_alive(), "the job runs"
    if finished:
        aws.put(f"whisper/{name}/checkpoints/train.json", "{}")
    aws.end(name, state)
    waiting.join(60)
    assert ended == [code]
    out = capsys.readouterr().out.splitlines()
    assert "algo-1: step=1" in out
    assert out[-1].startswith(f"{name}: {fate}")


def test_wait_waits_for_all_jobs_of_a_sweep(aws, capsys, monkeypatch):
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.05)
    looks = []

    def described(sagemaker, name, describe=follow._describe_existing):
        looks.append(name)
        if len(looks) > 3:
            aws.put(f"whisper/{name}/checkpoints/train.json", "{}")
            aws.end(name, "Failed" if name.endswith("02") else "Completed")
        return describe(sagemaker, name)

    monkeypatch.setattr(follow, "_describe_existing", described)
    with pytest.raises(SystemExit) as stop:
        call("train", **TRAIN, sweep="train.lora_rank=8,16", wait="true")
    assert stop.value.code == 1
    first, second = sorted(aws.jobs)
    told = capsys.readouterr().out.splitlines()[-2:]
    assert told == [f"{first}: Completed", f"{second}: Failed"]


# ------ --request


def test_what_has_no_option_is_merged_into_the_request(aws, tmp_path, capsys):
    plan = f"arn:aws:sagemaker:{REGION}:123456789012:training-plan/p1"
    more = {
        "ResourceConfig": {"TrainingPlanArn": plan},
        "OutputDataConfig": {"CompressionType": "NONE"},
        "ProfilerConfig": None,
        "ExperimentConfig": {"ExperimentName": "mr"},
    }
    call("train", **TRAIN, request=json.dumps(more))
    name = the_job(aws)
    sent = aws.jobs[name]
    assert sent["ResourceConfig"]["TrainingPlanArn"] == plan
    assert sent["ResourceConfig"]["InstanceType"] == "ml.g5.2xlarge"
    assert sent["OutputDataConfig"]["S3OutputPath"] == f"s3://{BUCKET}/whisper"
    assert "ProfilerConfig" not in sent
    aws.put(f"whisper/{name}/output/model/adapter/adapter_config.json", "{}")
    call("fetch", job=name, output_dir=tmp_path)
    assert (tmp_path / name / "adapter" / "adapter_config.json").read_text() == "{}"


def test_an_input_that_is_not_in_s3_takes_the_place_of_the_channel(aws, capsys):
    source = {
        "FileSystemId": "fs-0123456789abcdef0", "FileSystemAccessMode": "ro",
        "FileSystemType": "FSxLustre", "DirectoryPath": "/fsx/prepared",
    }  # fmt: skip
    channel = {"ChannelName": "train", "DataSource": {"FileSystemDataSource": source}}
    options = {key: value for key, value in TRAIN.items() if key != "train_s3"}
    call("train", **options, request=json.dumps({"InputDataConfig": [channel]}), dry_run="true")
    assert json.loads(capsys.readouterr().out)["InputDataConfig"] == [channel]


@pytest.mark.parametrize(
    "wrong",
    [
        {"request": "{\n1"},
        {"request": "[\n1]"},
        {"request": '{"OutputDataConfig": {"CompressionType": "a\\nb"}}'},
        {"tags": "a=1,\nb"},
        {"tags": "a=1,a=1,\nb=1"},
        {"tags": "a=x\ny?"},
        {"sweep": "train.lora_rank\n"},
        {"sweep": "train.lora_rank=1;\ntrain.lora_rank=2"},
        {"environment": "a\nb=1"},
        {"instance_type": "ml.g5\n.xlarge"},
    ],
)
def test_a_value_of_several_lines_is_quoted_in_one(wrong):
    with pytest.raises(cli.UserError) as error:
        call("train", **TRAIN | wrong, dry_run="true")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--request {: is not JSON"),
        ("[1]", r"--request \[1\]: is not a JSON object: write"),
        ('{"ExperimentConfg": {}}', "--request ExperimentConfg: AWS knows no such member: did you"),
        (
            '{"OutputDataConfig": {"CompressionType": "NOE"}}',
            "--request OutputDataConfig.CompressionType NOE: AWS knows no such value: did you me",
        ),
        ('{"TrainingJobName": "x"}', "--request TrainingJobName: has an option: give --name inst"),
        (
            '{"ResourceConfig": {"InstanceType": "ml.g6.xlarge"}}',
            "--request ResourceConfig.InstanceType: has an option: give --instance_type instead",
        ),
        ('{"Environment": {"A": "b"}}', "--request Environment: has an option: give --environme"),
        (
            '{"ResourceConfig": null}',
            "--request ResourceConfig: would take away ResourceConfig.InstanceType, which has an",
        ),
        ('{"StoppingCondition": 1}', "--request StoppingCondition: would take away StoppingCondi"),
        (
            '{"Environment": {}, "OutputDataConfig": {"CompressionType": 1}}',
            "--request Environment: has .*--request OutputDataConfig.CompressionType: a int, where",
        ),
    ],
)
def test_what_is_merged_is_checked_as_the_rest_is(aws, text, message):
    with pytest.raises(cli.UserError, match=message):
        call("train", **TRAIN, request=text)
    assert not aws.jobs


# ------ fetch


def archive(**files):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as made:
        for name, content in files.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return data.getvalue()


def test_fetch_brings_adapter_curves_and_records_but_no_checkpoints(aws, tmp_path, capsys):
    call("train", **TRAIN)
    name = the_job(aws)
    with pytest.raises(cli.UserError, match="has written nothing yet"):
        call("fetch", job=name, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    put_records(aws, name)
    aws.put(f"whisper/{name}/checkpoints/tensorboard/events.1", "curve")
    aws.put(f"whisper/{name}/checkpoints/adapter_best/adapter_config.json", "{}")
    for marker in files.MARKERS:  # of SageMaker's uploader
        aws.put(f"whisper/{name}/checkpoints/adapter_best/adapter_config.json{marker}", "")
    aws.put(f"whisper/{name}/checkpoints/checkpoints/step-5/weights.safetensors", "big")
    call("fetch", job=name, output_dir=tmp_path)
    folder = tmp_path / name
    assert {path.name for path in folder.iterdir()} == {
        "metrics.jsonl", "tensorboard", "adapter_best",
    }  # fmt: skip
    assert [path.name for path in (folder / "adapter_best").iterdir()] == ["adapter_config.json"]
    model = archive(adapter__adapter_config=b"{}", adapter__adapter_model=b"w")
    aws.put(f"whisper/{name}/output/model.tar.gz", model)
    call("fetch", job=name, output_dir=tmp_path)
    assert (folder / "adapter" / "adapter_model").read_bytes() == b"w"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_an_archive_cannot_write_outside_the_folder(aws, tmp_path):
    call("train", **TRAIN)
    name = the_job(aws)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as made:
        made.addfile(tarfile.TarInfo("../evil"), io.BytesIO())
    aws.put(f"whisper/{name}/output/model.tar.gz", data.getvalue())
    with pytest.raises(cli.UserError, match=r"model\.tar\.gz: cannot be unpacked"):
        call("fetch", job=name, output_dir=tmp_path / "out")
    assert not list(tmp_path.rglob("evil*"))
    assert not any((tmp_path / "out").iterdir()), "nothing half-written"


def test_an_object_whose_name_leads_out_of_the_folder_is_refused(aws, tmp_path):
    call("train", **TRAIN)
    name = the_job(aws)
    put_records(aws, name)
    aws.put(f"whisper/{name}/checkpoints/tensorboard/../../../evil", "x")
    with pytest.raises(cli.UserError, match=r"/evil: leads out of the folder: remove or rename"):
        call("fetch", job=name, output_dir=tmp_path / "out")
    assert not list(tmp_path.rglob("evil"))
    assert not any((tmp_path / "out").iterdir()), "nothing half-written"


# ------ eval, prepare, prices


def test_an_evaluation_scores_a_jobs_adapter_and_status_shows_its_rates(aws, tmp_path, capsys):
    options = {key: one for key, one in TRAIN.items() if key != "train_s3"}
    options |= {"test_s3": f"s3://{BUCKET}/prepared", "adapter_job": "mr-1", "name": "wer"}
    with pytest.raises(cli.UserError, match=r"--adapter_job .*output/model\.tar\.gz: is empty"):
        call("eval", **options)
    aws.put("whisper/mr-1/output/model.tar.gz", archive(adapter__adapter_config=b"{}"))
    call("eval", **options, instance_count=2, eval__compare_base="true")
    name = the_job(aws)
    sent = aws.jobs[name]
    assert sent["Environment"]["LAUNCH_SCRIPT"] == "eval_wer.py"
    assert sent["HyperParameters"] == {"compare_base": "true"}
    aws.set(
        name, TrainingJobStatus="Completed",
        FinalMetricDataList=[{"MetricName": "adapter:wer_raw", "Value": 68.5, "Timestamp": 0}],
    )  # fmt: skip
    aws.put(f"whisper/{name}/output/output.tar.gz", archive(**{"wer.json": b"{}"}))
    capsys.readouterr()
    call("status", job=name)
    assert "adapter:wer_raw            68.5" in capsys.readouterr().out
    call("fetch", job=name, output_dir=tmp_path)
    assert (tmp_path / name / "wer.json").read_text() == "{}"


def test_preparation_is_a_processing_job_that_status_logs_and_stop_know(aws, capsys):
    options = {key: TRAIN[key] for key in ("role", "image_uri", "output_s3")}
    with pytest.raises(cli.UserError, match="--source_s3 s3://example-bucket/none: is empty"):
        call("prepare", **options, source_s3=f"s3://{BUCKET}/none", prepare__language="mr")
    call(
        "prepare", **options, source_s3=f"s3://{BUCKET}/raw/mr", source_file="train.tsv",
        prepare__language="mr",
    )  # fmt: skip
    name = the_job(aws)
    arguments = aws.jobs[name]["AppSpecification"]["ContainerArguments"]
    assert arguments == [
        "prepare", "--source", "/opt/ml/processing/input/source/train.tsv",
        "--s3_uri", f"s3://{BUCKET}/whisper/{name}", "--language", "mr",
    ]  # fmt: skip
    assert f"the prepared data will be s3://{BUCKET}/whisper/{name}" in capsys.readouterr().out
    aws.say("/aws/sagemaker/ProcessingJobs", f"{name}/algo-1-1700000000", "kept 5 of 5 clips")
    call("logs", job=name)
    assert capsys.readouterr().out == "algo-1: kept 5 of 5 clips\n"
    call("status", job=name)
    assert f"{name}: InProgress\ninstances  1 x ml.m5.4xlarge" in capsys.readouterr().out
    call("stop", job=name)
    assert aws.jobs[name]["ProcessingJobStatus"] == "Stopping"
    with pytest.raises(cli.UserError, match="prepared data stays in S3"):
        call("fetch", job=name)


def test_an_export_is_a_job_of_one_process_on_cpus(aws):
    options = {key: own for key, own in TRAIN.items() if key != "train_s3"}
    options |= {"test_s3": f"s3://{BUCKET}/prepared", "adapter_job": "mr-1"}
    aws.put("whisper/mr-1/output/model.tar.gz", archive(adapter__adapter_config=b"{}"))
    with pytest.raises(cli.UserError, match=r"--export.formats hf,onnx: 'onnx' is unknown"):
        call("export", **options, export__formats="hf,onnx")
    with pytest.raises(cli.UserError, match=r"--instance_count 2: a model is exported on one"):
        call("export", **options, instance_count=2)
    with pytest.raises(cli.UserError, match=r"--export.adapter .: is set by the job: give --adap"):
        call("export", **options, export__adapter=".")
    large = {"export__model": "openai/whisper-large-v3"}  # more than is scored without a GPU
    call("export", **options, export__formats="hf,ct2", **large)
    sent = aws.jobs[the_job(aws)]
    assert sent["Environment"]["LAUNCH_SCRIPT"] == "export.py"
    assert sent["Environment"]["LAUNCH_PROCESSES_PER_HOST"] == "1"
    assert sent["HyperParameters"] == {"formats": "hf,ct2", "model": "openai/whisper-large-v3"}
    assert {own["ChannelName"] for own in sent["InputDataConfig"]} == {"test", "adapter"}


def test_transcription_is_a_processing_job_whose_transcripts_are_fetched(aws, tmp_path, capsys):
    options = {key: TRAIN[key] for key in ("role", "image_uri", "output_s3")}
    options |= {"audio_s3": f"s3://{BUCKET}/radio", "adapter_job": "mr-1"}
    aws.put("whisper/mr-1/output/model.tar.gz", archive(adapter__adapter_config=b"{}"))
    with pytest.raises(cli.UserError, match=f"--audio_s3 s3://{BUCKET}/radio: is empty"):
        call("transcribe", **options)
    aws.put("radio/a.mp3", "")
    with pytest.raises(cli.UserError, match=r"--audio_s3 .*: has no files.txt"):
        call("transcribe", **options, audio_file="files.txt")
    with pytest.raises(cli.UserError, match=r"--transcribe.audio x: is set by the job: give --aud"):
        call("transcribe", **options, transcribe__audio="x")
    with pytest.raises(cli.UserError, match=r"--transcribe.formats doc: doc is not a format"):
        call("transcribe", **options, transcribe__formats="doc")
    with pytest.raises(cli.UserError, match=r"--instance_count 2: transcribe.py is one process"):
        call("transcribe", **options, instance_count=2)
    call("transcribe", **options, transcribe__language="mr")
    name, place = the_job(aws), f"s3://{BUCKET}/whisper/{the_job(aws)}"
    sent = aws.jobs[name]
    assert sent["AppSpecification"]["ContainerArguments"] == [
        "transcribe", "--audio", "/opt/ml/processing/input/audio", "--language", "mr",
    ]  # fmt: skip
    assert {own["InputName"] for own in sent["ProcessingInputs"]} == {"audio", "adapter"}
    assert f"the transcripts will be {place}" in capsys.readouterr().out
    aws.put(f"whisper/{name}/day/talk.srt", "1")
    call("fetch", job=name, output_dir=tmp_path)
    assert (tmp_path / name / "day" / "talk.srt").read_text() == "1"


def test_prices_of_a_region_are_renewed_from_the_price_list(aws, tmp_path):
    def product(usage, usd):
        dimension = {"unit": "Hrs", "pricePerUnit": {"USD": usd}}
        return json.dumps(
            {
                "product": {"attributes": {"usagetype": usage}},
                "terms": {"OnDemand": {"a": {"priceDimensions": {"b": dimension}}}},
            }
        )

    table = tmp_path / "instances.json"
    table.write_bytes(instances.TABLE.read_bytes())
    client = aws.session.client("pricing")
    pages = [product("EUW1-Train:ml.g5.2xlarge", "1.69"), product("EUW1-Host:ml.g5.2xlarge", "9")]
    with Stubber(client) as stub:
        stub.add_response("get_products", {"PriceList": pages, "FormatVersion": "aws_v1"})
        assert instances.refresh(client, "eu-west-1", table) == 1
    price, date = instances.price("ml.g5.2xlarge", "eu-west-1", table)
    assert price == 1.69
    assert date == datetime.datetime.now(datetime.UTC).date().isoformat()
    assert instances.price("ml.g5.2xlarge", "us-east-1", table) == (1.515, "2026-09-27")
