"""Tests of `submit`, `status`, `logs` and `stop` on a cluster of `ray start`."""

from __future__ import annotations

import json
import os
import re
import signal
import socketserver
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.console import add_command
from jobs.local_s3 import LocalS3
from jobs.logs import logs
from jobs.status import status
from jobs.stop import stop
from jobs.submit import submit
from pipeline.config import Config, ConfigError, Selection, SubmitConfig, load_config
from pipeline.dataflow import ClusterError
from pipeline.schedule import JobClient, Submission, minute_key
from pipeline.schedule.client import CONFIG_VARIABLE, AlreadySubmittedError, StillRunningError
from pipeline.storage import Storage
from tests.command import cvt_label_process
from tests.makers import make_image, make_tar

SECRET = "planted-in-the-submitters-environment"


@pytest.fixture
def job(tmp_path: Path, bucket: str) -> Path:
    path = tmp_path / "job.yaml"
    lines = [f'input: {{uri: "{bucket}/in"}}', "model: {path: fashion-mnist}"]
    lines += [f'output: {{uri: "{bucket}/out"}}', "ray: {address: local}  # ignored by submit"]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def sleeper(tmp_path: Path) -> str:
    """A fake interpreter that runs until it is stopped."""
    path = tmp_path / "sleeper"
    path.write_text(f"#!/bin/sh\necho awake\nexec {sys.executable} -c 'import time; time.sleep(300)'\n")
    path.chmod(0o755)
    return str(path)


def command(*arguments: object) -> Result:
    """Runs a command in this process, which is faster than a new process."""
    app = typer.Typer()
    for function in (submit, status, logs, stop):
        add_command(app, function)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def config_of(job: Path) -> Config:
    return load_config(Config, job)


def test_code_in_working_dir_replaces_code_of_the_cluster(cluster: str, job: Path, tmp_path: Path) -> None:
    """Control characters in the log are escaped."""
    code = tmp_path / "code" / "jobs"
    code.mkdir(parents=True)
    (code / "__init__.py").touch()
    (code / "label.py").write_text(
        "import os, sys\n"
        f"print('uploaded', sys.argv[1:], 'key_column' in os.environ['{CONFIG_VARIABLE}'])\n"
        "print('\\x1b[2Jred')\n"
        "sys.exit(7)\n"
    )
    options = ["--config", job, "--address", cluster, "--working-dir", code.parent]
    done = command("submit", *options, "--retry-errors", "--prune")
    assert done.exit_code == 7, done.output
    arguments = [f"--config=env:{CONFIG_VARIABLE}", "--retry-errors", "--prune"]
    assert f"uploaded {arguments} True" in done.stdout
    assert r"\x1b[2Jred" in done.stdout
    assert "\x1b" not in done.stdout


def test_submit_follows_the_job_and_returns_its_exit_status(
    cluster: str, job: Path, bucket: str, storage: Storage, s3_server: LocalS3
) -> None:
    """The job receives the configuration but no secret. It ends with 3 because of a truncated shard."""
    from ray.job_submission import JobSubmissionClient

    whole = make_tar([(f"{i}.jpg", make_image(i)) for i in range(10)])
    storage.write(f"{bucket}/in/a.tar", whole)
    storage.write(f"{bucket}/in/cut.tar", whole[:3000])
    options = [
        "--config",
        job,
        "--address",
        cluster,
        "--set",
        "output.topk=3",
        "--idempotency-key",
        "night-1",
    ]
    done = cvt_label_process("submit", *options, AWS_SECRET_ACCESS_KEY=SECRET, MY_TOKEN=SECRET)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "10 in 1 shard" in done.stdout
    assert "2 of 2 shards" in done.stdout  # progress
    assert "failed, exit status 3" in done.stderr
    name = re.findall(r"submitted (\S+);", done.stderr)[0]

    repeated = command("submit", *options)
    assert repeated.exit_code == 6
    assert f"the cluster already has job {name} (failed)" in repeated.stderr

    shown = command("status", name, "--address", cluster)
    assert shown.exit_code == 0, shown.stderr
    assert re.search(r"status +3", shown.stdout)
    assert f"{bucket}/in" in shown.stdout
    assert re.search(rf"failed .* 3  {re.escape(name)}\n", command("status", "--address", cluster).stdout)
    log = command("logs", name, "--address", cluster)
    assert "10 in 1 shard" in log.stdout

    records = [o.uri for o in storage.list(f"{bucket}/out") if "/runs/" in o.uri]
    record = storage.read(records[0]).decode()
    assert json.loads(record)["config"]["output"]["topk"] == 3
    stored = JobSubmissionClient(cluster).get_job_info(name).model_dump_json()
    for text in (stored, record, *(o for d in (done, repeated, shown, log) for o in (d.stdout, d.stderr))):
        assert SECRET not in text
        assert s3_server.secret_key not in text
        assert os.environ["RAY_AUTH_TOKEN"] not in text


def test_stopped_job_ends_with_130(cluster: str, job: Path, sleeper: str) -> None:
    options = ["--config", job, "--address", cluster, "--python", sleeper]
    first = command("submit", *options, "--idempotency-key", "1", "--no-wait")
    assert first.exit_code == 0, first.stderr
    name = first.stdout.strip()
    other_key = command("submit", *options, "--idempotency-key", "2")
    assert other_key.exit_code == 6
    assert f"job {name} for the same dataset and model is" in other_key.stderr

    following = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "logs", name, "--address", cluster, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    assert "awake\n" in iter(following.stdout.readline, "")
    following.send_signal(signal.SIGINT)
    _, stderr = following.communicate(timeout=300)
    assert following.returncode == 130
    assert "the job continues" in stderr
    assert JobClient(cluster).job(name).state == "RUNNING"

    stopped = command("stop", name, "--address", cluster)
    assert stopped.exit_code == 0, stopped.stderr
    assert "stopped, exit status 130" in stopped.stdout
    assert command("logs", name, "--address", cluster, "--follow").exit_code == 130
    assert command("stop", name, "--address", cluster).exit_code == 0  # the job is already finished


def test_one_of_two_concurrent_submissions_wins(cluster: str, job: Path, sleeper: str) -> None:
    submission = Submission(config_of(job), "race", submit_config=SubmitConfig(python=sleeper))
    first, second = JobClient(cluster), JobClient(cluster)
    known = second.jobs()
    second.jobs = lambda: known  # type: ignore[method-assign] # as it was before the first one submitted
    first.submit(submission)
    with pytest.raises(AlreadySubmittedError):
        second.submit(submission)
    with pytest.raises(StillRunningError):
        first.submit(Submission(config_of(job), "later", submit_config=SubmitConfig(python=sleeper)))
    assert first.stop(submission.id).exit_status == 130


def test_explicit_address_overrides_the_environment(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    JobClient(cluster).jobs()
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"
    with pytest.raises(ClusterError, match=re.escape("answers at http://127.0.0.1:1")):
        JobClient()
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    JobClient().jobs()


def test_unknown_job_ends_with_4(cluster: str) -> None:
    for name in ("status", "logs", "stop"):
        done = command(name, "no-such-job", "--address", cluster)
        assert done.exit_code == 4
        assert "has no job no-such-job" in done.stderr
        assert "Traceback" not in done.stderr
        assert command(name, "", "--address", cluster).exit_code == 4  # the value of an unset shell variable


def test_missing_or_wrong_token_ends_with_4(cluster: str, tmp_path: Path) -> None:
    # In separate processes, because Ray reads the token once per process.
    for environment in ({"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = cvt_label_process("status", "--address", cluster, **environment)
        assert done.returncode == 4, done.stderr
        assert "the cluster requires a token" in done.stderr
        assert "Traceback" not in done.stderr


def test_missing_file_of_an_option_is_named(cluster: str, job: Path) -> None:
    for option in ("--requirements", "--working-dir"):
        done = command("submit", "--config", job, "--address", cluster, option, "/no/such")
        assert done.exit_code == 4, done.stderr
        assert "/no/such" in done.stderr
        assert "Traceback" not in done.stderr


def test_unreachable_address_ends_with_4(job: Path) -> None:
    done = command("submit", "--config", job, "--address", "http://127.0.0.1:1")
    assert done.exit_code == 4
    assert "no Ray cluster answers at http://127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1", "localhost:1"])
def test_unreachable_address_in_environment_ends_with_4(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    done = command("status")
    assert done.exit_code == 4
    assert f"no Ray cluster answers at {address}" in done.stderr


def test_address_with_credentials_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "planted:secret@127.0.0.1:1")
    done = command("status")
    assert done.exit_code == 2
    assert "RAY_ADDRESS: must not contain credentials" in done.stderr
    assert "planted" not in done.output


def test_empty_idempotency_key_is_refused(job: Path) -> None:
    done = command("submit", "--config", job, "--idempotency-key", "")
    assert done.exit_code == 2
    assert "--idempotency-key" in done.stderr


def test_token_with_line_break_ends_with_4_and_is_not_shown() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "planted\nsecret"}
        done = cvt_label_process("status", "--address", address, **environment)
    assert done.returncode == 4, done.stderr
    assert "the token in RAY_AUTH_TOKEN contains a line break" in done.stderr
    assert "planted" not in done.stdout + done.stderr


def test_invalid_field_ends_with_2_before_connecting(job: Path) -> None:
    done = command("submit", "--config", job, "--set", "output.topkk=3", "--address", "http://127.0.0.1:1")
    assert done.exit_code == 2
    assert "--set output.topkk=3: unknown field" in done.stderr
    done = command("submit", "--config", job, "--idempotency-key", "a b", "--address", "http://127.0.0.1:1")
    assert done.exit_code == 2
    assert "idempotency key 'a b'" in done.stderr


def test_job_id_depends_on_dataset_model_and_idempotency_key(job: Path) -> None:
    config = load_config(Config, job, ["input.uri=s3://Photos/2026/new/", "model.path=microsoft/cvt-13"])
    name = Submission(config, "20261123T0200Z").id
    assert re.fullmatch(r"label-photos-2026-new-microsoft-cvt-13-[0-9a-f]{6}-20261123T0200Z", name)
    assert Submission(config, "20261123T0200Z", Selection(relabel=True)).id == name
    settings = ["input.uri=s3://Photos/2026/new", "model.path=microsoft/cvt-13"]
    same = load_config(
        Config, job, [*settings, "classify.batch_size=7", "decode.num_cpus=2", "classify.device=cuda"]
    )  # no label's matter
    assert Submission(same, "20261123T0200Z").id == name
    places = ("input.uri=s3://Photos/2026-new", "model.revision=v2", "output.uri=s3://b/other")
    labels = ("model.precision=bf16", "output.topk=3", "model.labels=names.txt", "decode.quality=fast")
    for override in (*places, *labels):
        other = load_config(Config, job, [*settings, override])
        assert Submission(other, "20261123T0200Z").id != name
    assert minute_key(datetime(2026, 11, 23, 2, 0, 59, tzinfo=UTC)) == "20261123T0200Z"


def test_configuration_arrives_unchanged(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unusual = ["input.label_field='1e3'", "input.key_column='日本 \"x\": 🙂'", "classify.batch_size=7"]
    config = load_config(Config, job, [*unusual, "run.flush_interval_s=1e-05"])
    variables = Submission(config, "1").runtime_env["env_vars"]
    monkeypatch.setenv(CONFIG_VARIABLE, variables[CONFIG_VARIABLE])
    arrived = load_config(Config, f"env:{CONFIG_VARIABLE}")
    assert arrived.ray.address is None
    assert arrived.model_copy(update={"ray": config.ray}) == config
    with pytest.raises(ConfigError, match="env:NOT_SET: the environment has no such variable"):
        load_config(Config, "env:NOT_SET")
