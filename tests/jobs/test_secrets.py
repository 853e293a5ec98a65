"""Planted secrets do not appear in outputs, terminals, logs or error messages."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import pipeline
from cvt.errors import CheckpointError
from jobs.cli import make_app
from jobs.compare import compare
from jobs.console import OneLineFormatter, add_command, exit_on_error
from jobs.label import label
from jobs.local_s3 import LocalS3
from jobs.logs import logs
from jobs.plan import plan
from jobs.publish import publish
from jobs.report import report
from jobs.schedule import schedule
from jobs.stats import stats
from jobs.status import status
from pipeline.classify.checkpoint import open_checkpoint
from pipeline.config import Config, ConfigError, ScheduleConfig, load_config
from pipeline.schedule import DatasetState, JobClient, StateFile
from pipeline.schedule.client import CONFIG_VARIABLE
from pipeline.storage import Storage, StorageError
from tests.command import cvt_label, cvt_label_process
from tests.makers import make_image, make_tar
from tests.ray_head import Head

PLANTED = f"planted-{secrets.token_hex(8)}"
JOB = """\
input: {{uri: "{root}/in"}}
model: {{path: fashion-mnist}}
output: {{uri: "{root}/out"}}
"""
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def job(tmp_path: Path, bucket: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(root=bucket))
    return path


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's logs. Its name is short, because socket paths have a maximum length."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def readable_content(uri: str, data: bytes) -> bytes:
    """Returns the bytes of an object. For Parquet, adds the decoded footer, schema and rows."""
    if not uri.endswith(".parquet"):
        return data
    metadata = pq.read_metadata(io.BytesIO(data)).metadata or {}
    footer = b"".join(k + b"=" + v for k, v in metadata.items())
    schema = base64.b64decode(metadata.get(b"ARROW:schema", b""))
    return data + footer + schema + repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode()


def assert_without(places: Mapping[str, bytes], *planted: str) -> None:
    """Checks that no content has a planted secret."""
    for place, content in places.items():
        for secret in planted:
            assert secret.encode() not in content, place


@pytest.mark.slow
def test_run_leaves_no_secret_in_output_terminal_or_logs(
    job: Path, bucket: str, storage: Storage, s3_server: LocalS3, ray_folder: Path
) -> None:
    whole = make_tar([(f"{i}.jpg", make_image(i)) for i in range(8)] + [("bad.jpg", b"not an image")])
    storage.write(f"{bucket}/in/a.tar", whole)
    storage.write(f"{bucket}/in/cut.tar", whole[:3000])
    environment = {"HF_TOKEN": f"hf_{PLANTED}", "RAY_TMPDIR": str(ray_folder)}
    options = ["--config", job, "--set", "ray.address=local"]
    done = cvt_label_process("label", *options, **environment)
    assert done.returncode == 3, done.stderr
    written = {o.uri: readable_content(o.uri, storage.read(o.uri)) for o in storage.list(f"{bucket}/out")}
    logs = {str(path): path.read_bytes() for path in ray_folder.rglob("*") if path.is_file()}
    output = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for kind in ("/runs/", "/predictions/", "/manifest.", "/class_stats.", "/report.", "/lease."):
        assert any(kind in uri for uri in written), kind
    assert any("raylet" in path for path in logs)
    # Contents that must be found prove that the search works.
    assert b"bad" in next(content for uri, content in written.items() if "/predictions/" in uri)
    assert_without({**written, **logs, **output}, s3_server.secret_key, s3_server.access_key, PLANTED)


SCHEDULE = """\
submit: {{address: "{address}"}}
datasets:
  photos:
    cron: "@yearly"
    input: {{uri: "{root}/in"}}
    model: {{path: fashion-mnist}}
    output: {{uri: "{root}/out"}}
"""


def in_this_process(function: Callable[..., None], *arguments: object) -> str:
    """Runs a command in this process, checks that it succeeds, and returns its output."""
    app = make_app()
    add_command(app, function)
    done = CliRunner(env={"HF_TOKEN": f"hf_{PLANTED}"}).invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_cluster_commands_leave_no_secret_in_storage_terminal_or_logs(
    job: Path, bucket: str, storage: Storage, s3_server: LocalS3, head: Head, tmp_path: Path
) -> None:
    """A scheduled job labels, a submitted job finds nothing new, and then the labels are used."""
    storage.write(f"{bucket}/in/a.tar", make_tar([(f"{i}.jpg", make_image(i)) for i in range(8)]))
    path = tmp_path / "schedule.yaml"
    path.write_text(SCHEDULE.format(address=head.address, root=bucket))
    file = StateFile("photos", load_config(ScheduleConfig, path).datasets["photos"])
    file.write(DatasetState(dataset="photos", handled_until=datetime.now(UTC) - timedelta(days=400)))
    output: dict[str, str] = {}

    # The job must not receive the caller's credentials: with these, the job would fail.
    planted = {"HF_TOKEN": f"hf_{PLANTED}", "MY_TOKEN": PLANTED}
    done = cvt_label_process("schedule", "--config", path, "--once", **planted)
    output["schedule"] = done.stdout + done.stderr
    assert "submitted: label-" in output["schedule"]
    state = file.read()
    assert state is not None
    assert state.current_job is not None
    name = state.current_job.id
    assert JobClient(head.address).follow(name, lambda text: None).exit_status == 0
    at = ["--address", head.address]
    wrong = planted | {"AWS_SECRET_ACCESS_KEY": PLANTED}
    done = cvt_label("submit", "--config", job, *at, "--idempotency-key", "again", **wrong)
    output["submit"] = done.stdout + done.stderr
    assert done.returncode == 0, output["submit"]
    output["poll"] = in_this_process(schedule, "--config", path, "--once")
    output["state"] = in_this_process(schedule, "--config", path, "--status")
    output["jobs"] = in_this_process(status, *at)
    output["job"] = in_this_process(status, name, *at)
    output["log"] = in_this_process(logs, name, *at)

    partition = next(o.uri for o in storage.list(f"{bucket}/out") if "/lease." in o.uri).rpartition("/")[0]
    if importlib.util.find_spec("deltalake"):
        output["publish"] = in_this_process(publish, "--config", job, "--to", f"delta:{bucket}/table")
    output["compare"] = in_this_process(
        compare, partition, partition, "--output", f"{bucket}/compared.parquet"
    )
    output["report"] = in_this_process(report, partition)
    output["stats"] = in_this_process(stats, "--config", job, "--rebuild")

    written = {o.uri: readable_content(o.uri, storage.read(o.uri)) for o in storage.list(bucket)}
    kept = {str(p): p.read_bytes() for p in head.folder.glob("session_2*/logs/**/*") if p.is_file()}
    from ray.job_submission import JobSubmissionClient

    api = {"api": "".join(j.model_dump_json() for j in JobSubmissionClient(head.address).list_jobs())}
    # Contents that must be found prove that the search works.
    assert b"SUCCEEDED" in written[file.uri]
    assert "1 shard" in output["log"]
    assert f"{name} succeeded" in output["state"]
    assert CONFIG_VARIABLE in api["api"]
    assert any(name in place and b"images" in content for place, content in kept.items())
    texts = {place: text.encode() for place, text in (output | api).items()}
    cluster_secrets = s3_server.secret_key, s3_server.access_key, head.hub_token, os.environ["RAY_AUTH_TOKEN"]
    assert_without({**written, **kept, **texts}, *cluster_secrets, PLANTED)


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": PLANTED}, [], "SignatureDoesNotMatch"),
        (
            {"HTTPS_PROXY": f"http://me:{PLANTED}@{NOWHERE}", "AWS_ENDPOINT_URL_S3": "https://a.b"},
            [],
            "reach",
        ),
        pytest.param(
            {"HF_TOKEN": f"hf_{PLANTED}", "HF_ENDPOINT": f"http://{NOWHERE}"},
            ["model.path=a/b"],
            "the Hugging",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["wrong secret", "unreachable endpoint", "unreachable hub"],
)
def test_access_error_does_not_show_the_secret(
    job: Path,
    bucket: str,
    storage: Storage,
    environment: dict[str, str],
    overrides: list[str],
    message: str,
) -> None:
    storage.write(f"{bucket}/in/a.tar", make_tar([("a.jpg", make_image())]))
    options = [part for override in overrides for part in ("--set", override)]
    # huggingface_hub reads its variables when it is imported.
    run = cvt_label_process if "HF_ENDPOINT" in environment else cvt_label
    done = run("plan", "--config", job, *options, **environment)
    assert done.returncode == 4, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert PLANTED not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST", "RAY_ADDRESS"]
)
@pytest.mark.parametrize(
    "address",
    [f"http://me:{PLANTED}@host", f"me:{PLANTED}@host:1", f"http://h?sig={PLANTED}"],
    ids=["user", "no scheme", "signature"],
)
def test_address_in_the_environment_with_a_secret_is_refused(tmp_path: Path, name: str, address: str) -> None:
    done = cvt_label("stats", tmp_path, **{name: address})
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{name}: must not contain credentials" in done.stderr
    assert PLANTED not in done.stderr


def test_message_and_traceback_of_a_library_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    message = f"GET /x?X-Amz-Signature={PLANTED} by me:{PLANTED}@proxy failed"

    @exit_on_error()
    def run(error: Exception) -> None:
        raise error

    for error, expected in ((StorageError("s3://a", message), 4), (RuntimeError(message), 1)):
        with pytest.raises(SystemExit) as ended:
            run(error)
        assert ended.value.code == expected
        shown = capsys.readouterr().err
        assert "X-Amz-Signature=*** by ***@proxy failed" in shown
        assert ("Traceback" in shown) == (expected == 1)
        assert PLANTED not in shown
    try:
        run.__wrapped__(RuntimeError(message))  # type: ignore[attr-defined]
    except RuntimeError:
        record = logging.makeLogRecord({"msg": message, "exc_info": sys.exc_info()})
    logged = OneLineFormatter().format(record)
    assert logged.count("X-Amz-Signature=***") == 2
    assert PLANTED not in logged


def test_record_of_a_failed_run_shows_no_secret(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar([("a.jpg", make_image())]))
    fields = [f"input.uri={tmp_path}/in", f"output.uri={tmp_path}/out", "model.path=fashion-mnist"]

    def fail(prepared: object) -> None:
        raise RuntimeError(f"no answer from me:{PLANTED}@host")

    with pytest.raises(RuntimeError):
        pipeline.label(load_config(Config, None, [*fields, "ray.address=in-process"]), on_plan=fail)
    [record] = (tmp_path / "out").glob("*/runs/*.json")
    assert json.loads(record.read_text())["error"] == "RuntimeError: no answer from ***@host"


@pytest.mark.parametrize("field", ["input.uri", "output.uri", "model.path", "model.labels", "ray.address"])
@pytest.mark.parametrize(
    "address",
    [f"s3://AKIA:{PLANTED}@bucket/x", f"https://h/x?X-Amz-Signature={PLANTED}"],
    ids=["user", "signature"],
)
def test_field_with_a_secret_is_refused_and_not_shown(field: str, address: str) -> None:
    fields = ["input.uri=/in", "output.uri=/out", "model.path=fashion-mnist", f"{field}={address}"]
    with pytest.raises(ConfigError) as caught:
        load_config(Config, None, fields)
    assert f"{field}: must not contain credentials" in str(caught.value)
    assert PLANTED not in str(caught.value)


@pytest.mark.parametrize(
    "place", ["s3://bucket/with @ and ?x=1", "/folder/of/me@home", "microsoft/cvt-13@main", "gs://b/a@b"]
)
def test_field_without_a_secret_is_unchanged(place: str) -> None:
    fields = [f"input.uri={place}", f"output.uri={place}", f"model.path={place}"]
    config = load_config(Config, None, fields, keep_relative_paths=True)
    assert (config.input.uri, config.output.uri, config.model.path) == (place, place, place)


@pytest.mark.parametrize(
    "uri",
    [f"s3://AKIA:{PLANTED}@bucket/x", f"https://h/x?X-Amz-Signature={PLANTED}"],
    ids=["user", "signature"],
)
def test_uri_with_a_secret_is_refused_and_not_shown(uri: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: pipeline.open_partition(uri),
        lambda: pipeline.compare_labels(uri, uri),
        lambda: open_checkpoint(Storage(), uri),
    ]
    for action in actions:
        with pytest.raises((StorageError, CheckpointError)) as caught:
            action()
        assert PLANTED not in f"{caught.value!r} {caught.value}"


def test_help_shows_no_environment_value() -> None:
    planted = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"), PLANTED)
    app = make_app()
    for command in (label, plan, stats):
        add_command(app, command)
    for name in ("label", "plan", "stats"):
        done = CliRunner(env=planted).invoke(app, [name, "--help"])
        assert done.exit_code == 0, done.output
        assert "--config" in done.output
        assert PLANTED not in done.output
