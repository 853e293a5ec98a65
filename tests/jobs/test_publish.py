"""`cvt-label publish` as a person or a schedule meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.local_s3 import LocalS3
from jobs.publish import TableFormat, publish
from pipeline.storage import Storage
from tests.makers import make_image, make_tar
from tests.pipeline.crashing import leave_out_ray
from tests.pipeline.publish.publishing_runs import DELTA, NEEDS_DELTALAKE, PARQUET, Format, Place


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    shown: str


class Command:
    """`publish` in this process, with a folder of labels."""

    def __init__(self, place: Place, captured: pytest.CaptureFixture[str]) -> None:
        self.place = place
        self.config = Path(place.root, "job.yaml")
        self.config.write_text("")
        self._captured = captured

    def __call__(self, to: str, **options: Any) -> Done:
        status = 0
        try:
            publish(self.config, to, self.place.fields, **options)
        except SystemExit as left:
            status = int(left.code or 0)
        return Done(status, "".join(self._captured.readouterr()))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    leave_out_ray(monkeypatch)
    place = Place(str(tmp_path))
    place.put({"a.tar": make_tar([(f"{i}.jpg", make_image(i)) for i in range(6)])})
    return place


@pytest.fixture
def command(place: Place, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(place, capsys)


def test_what_was_published_is_told_and_so_is_that_there_was_nothing(place: Place, command: Command) -> None:
    place.label()
    done = command(f"{place.root}/table")
    assert done.status == 0
    assert "version 1: 1 shards added, 0 replaced, 0 removed; 6 rows in 1 files" in done.shown
    assert place.published() == place.predictions()
    again = command(f"{place.root}/table")
    assert again.status == 0
    assert "version 1 has everything already" in again.shown


def test_nothing_labelled_ends_with_4(place: Place, command: Command) -> None:
    done = command(f"{place.root}/table")
    assert done.status == 4
    assert "nothing is labelled yet" in done.shown
    assert not place.objects("table")


@pytest.mark.parametrize("where", ["out", "out/table", "in/table", "."])
def test_a_table_among_other_things_is_refused_with_2(place: Place, command: Command, where: str) -> None:
    done = command(f"{place.root}/{where}")
    assert done.status == 2
    assert "a table needs a place of its own" in done.shown


def test_labels_that_have_changed_since_the_manifest_end_with_3(place: Place, command: Command) -> None:
    place.label()
    os.utime(place.prediction_uri("a.tar"), ns=(1, 1))
    done = command(f"{place.root}/table")
    assert done.status == 3
    assert "1 shards have changed since the manifest was written" in done.shown


def test_a_pointer_that_cannot_be_read_ends_with_4_and_is_named(place: Place, command: Command) -> None:
    place.label()
    place.storage.write(f"{place.root}/table/model={place.partition.model}/current.json", b"[1]")
    done = command(f"{place.root}/table")
    assert done.status == 4
    assert "current.json: not a version of a table" in done.shown


def test_a_missing_package_ends_with_4_and_is_named(
    place: Place, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.label()
    monkeypatch.setitem(sys.modules, "deltalake", None)
    done = command(f"{place.root}/table", format=TableFormat.DELTA)
    assert done.status == 4
    assert "pip install 'cvt-label[delta]'" in done.shown


@pytest.mark.parametrize("format", [PARQUET, DELTA])
def test_wrong_credentials_end_with_4_and_are_not_shown(
    place: Place, command: Command, bucket: str, format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.label()
    assert command(f"{bucket}/table", format=TableFormat(format)).status == 0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    done = command(f"{bucket}/table", format=TableFormat(format))
    assert done.status == 4
    assert "planted" not in done.shown


@pytest.fixture
def without_credentials(
    s3_server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """An environment that says nothing of S3, and a home without AWS's files."""
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, f"{tmp_path}/{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.mark.parametrize("profile", ["default", "labels"])
@pytest.mark.parametrize("format", [PARQUET, DELTA])
def test_a_profile_is_enough_to_publish(
    place: Place,
    command: Command,
    bucket: str,
    s3_server: LocalS3,
    without_credentials: pytest.MonkeyPatch,
    format: Format,
    profile: str,
) -> None:
    """Credentials in the one file, and the service in the other."""
    place.label()
    Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text(
        f"[{profile}]\naws_access_key_id = {s3_server.access_key}\n"
        f"aws_secret_access_key = {s3_server.secret_key}\n"
    )
    section = "default" if profile == "default" else f"profile {profile}"
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(
        f"[{section}]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint_url}\n"
    )
    if profile != "default":
        without_credentials.setenv("AWS_PROFILE", profile)
    first = command(f"{bucket}/table", format=TableFormat(format))
    assert (first.status, first.shown) == (0, first.shown)
    assert "version 1: 1 shards added" in first.shown
    assert "has everything already" in command(f"{bucket}/table", format=TableFormat(format)).shown
    assert s3_server.secret_key not in first.shown


@pytest.mark.parametrize("format", [PARQUET, DELTA])
def test_what_is_missing_of_s3_is_told_in_one_line(
    place: Place,
    command: Command,
    without_credentials: pytest.MonkeyPatch,
    s3_server: LocalS3,
    format: Format,
) -> None:
    place.label()
    without_credentials.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint_url)
    done = command("s3://no-such-bucket/table", format=TableFormat(format))
    assert done.status == 4
    assert "no usable AWS credentials were found" in done.shown
    assert done.shown.count("\n") == 1
    for name, value in s3_server.environment().items():
        without_credentials.setenv(name, value)
    done = command("s3://no-such-bucket/table", format=TableFormat(format))
    assert done.status == 4
    assert "bucket 'no-such-bucket' does not exist" in done.shown
    assert done.shown.count("\n") == 1


@NEEDS_DELTALAKE
def test_a_log_that_deltalake_cannot_read_is_told_in_one_line(place: Place, command: Command) -> None:
    place.label()
    place.storage.write(f"{place.root}/table/_delta_log/{0:020d}.json", b"no\nlog")
    done = command(f"{place.root}/table", format=TableFormat.DELTA)
    assert done.status == 4
    assert "table: can't be read as a Delta table: " in done.shown
    assert done.shown.count("\n") == 1
    assert "\x1b" not in done.shown
    assert " 0: " not in done.shown  # the first of many lines of a stack


def test_help_names_the_extra_that_delta_needs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.publish", "--help"],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "cvt-label[delta]" in done.stdout


@NEEDS_DELTALAKE
def test_no_secret_is_written_or_logged(
    place: Place, command: Command, bucket: str, storage: Storage, s3_server: LocalS3
) -> None:
    """By a process of its own, whose libraries log all that they log."""
    place.label()
    fields = [part for field in place.fields for part in ("--set", field)]
    options = ["--config", str(command.config), "--to", f"{bucket}/table", "--format", "delta"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "publish", *options, *fields],
        env=os.environ | {"RUST_LOG": "debug"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for content in [storage.read(info.uri) for info in storage.list(bucket)]:
        assert s3_server.secret_key.encode() not in content
        assert s3_server.access_key.encode() not in content
    assert s3_server.secret_key not in done.stdout + done.stderr
