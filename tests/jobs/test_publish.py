"""Tests of the command `publish`."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from jobs.cli import make_app
from jobs.console import add_command
from jobs.local_s3 import LocalS3
from jobs.publish import publish
from pipeline.config import Config, load_config
from pipeline.publish.data_files import DataFile
from pipeline.storage import Storage, StorageError
from tests.pipeline.publish.tables import Dataset, needs_delta

needs_delta()


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    output: str


def command(*arguments: object) -> CommandResult:
    """Runs `publish` in this process."""
    app = make_app()
    add_command(app, publish)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return CommandResult(result.exit_code, result.output)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    dataset = Dataset(str(tmp_path))
    dataset.label(a=6)
    return dataset


def test_output_reports_published_shards_and_up_to_date_table(dataset: Dataset) -> None:
    done = command(dataset.uri, "--to", dataset.table)
    expected = f"{dataset.table}: version 1: 1 shard added, 0 replaced, 0 removed; 6 rows in 1 file\n"
    assert (done.status, done.output) == (0, expected)
    assert dataset.published() == dataset.labels()
    again = command(dataset.uri, "--to", dataset.table)
    assert (again.status, again.output) == (0, f"{dataset.table}: version 1, already up to date\n")


@pytest.mark.parametrize("by", ["uri", "config"])
def test_command_imports_neither_torch_nor_ray(dataset: Dataset, tmp_path: Path, by: str) -> None:
    fields = [f"input.uri={dataset.root}/in", f"output.uri={dataset.root}/out", "model.path=fashion-mnist"]
    config = load_config(Config, None, fields)
    dataset.config = config.model_dump(mode="json")
    dataset.label(b=3)
    Path(tmp_path, "job.yaml").write_text(config.model_dump_json())
    source = [dataset.uri] if by == "uri" else ["--config", f"{tmp_path}/job.yaml"]
    code = (
        "import atexit, sys\n"
        "from jobs.cli import main\n"
        "atexit.register(lambda: print({'torch', 'ray', 'transformers'} & {*sys.modules}))\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "publish", *source, "--to", dataset.table],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("9 rows in 1 file\nset()\n")
    assert dataset.published() == dataset.labels()


@pytest.mark.parametrize(
    "arguments", [[], ["out", "--config", "job.yaml"], ["out", "--set", "output.topk=1"]]
)
def test_command_needs_either_a_partition_or_a_configuration(dataset: Dataset, arguments: list[str]) -> None:
    assert command(*arguments, "--to", dataset.table).status == 2


def test_missing_partition_ends_with_4(dataset: Dataset) -> None:
    done = command(f"{dataset.root}/out/model=other", "--to", dataset.table)
    assert done.status == 4
    assert "model=other: not a partition" in done.output
    dataset.storage.delete(dataset.partition.manifest.uri)
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 4
    assert "nothing is labeled yet" in done.output
    assert not dataset.objects(dataset.table)


def test_table_in_the_output_ends_with_2(dataset: Dataset) -> None:
    done = command(dataset.uri, "--to", f"{dataset.root}/out/table")
    assert done.status == 2
    assert f"the table must be outside the output {dataset.root}/out" in done.output


def test_labels_newer_than_the_manifest_end_with_3(dataset: Dataset) -> None:
    os.utime(dataset.prediction_uri("a"), ns=(1, 1))
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 3
    assert "1 shard changed after the manifest was written" in done.output


def test_edited_table_ends_with_4_until_rebuild(dataset: Dataset) -> None:
    dataset.publish()
    dataset.delta().delete("index = 3")
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 4
    cause = "the rows of model=cvt-00000001 differ from the published rows: DELETE"
    assert f"{dataset.table}: {cause}" in done.output
    assert "--rebuild" in done.output
    assert command(dataset.uri, "--to", dataset.table, "--rebuild").status == 0
    assert dataset.published() == dataset.labels()


def test_missing_package_ends_with_4_and_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 4
    assert "pip install 'cvt-label[delta]'" in done.output


def test_wrong_credentials_end_with_4_and_are_not_shown(
    dataset: Dataset, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(dataset.uri, "--to", f"{bucket}/table").status == 0
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    done = command(dataset.uri, "--to", f"{bucket}/table")
    assert done.status == 4
    assert "planted" not in done.output


@pytest.fixture
def without_credentials(
    s3_server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    """An environment without S3 settings and without AWS files."""
    for name in s3_server.environment():
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, f"{tmp_path}/{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return monkeypatch


@pytest.mark.parametrize("profile", ["default", "labels"])
def test_profile_is_enough_to_publish(
    dataset: Dataset,
    bucket: str,
    s3_server: LocalS3,
    without_credentials: pytest.MonkeyPatch,
    profile: str,
) -> None:
    """The credentials file has the credentials, and the config file has the endpoint."""
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
    first = command(dataset.uri, "--to", f"{bucket}/table")
    assert (first.status, first.output) == (0, first.output)
    assert "version 1: 1 shard added" in first.output
    assert "already up to date" in command(dataset.uri, "--to", f"{bucket}/table").output
    assert s3_server.secret_key not in first.output


def test_missing_s3_credentials_or_bucket_is_reported_in_one_line(
    dataset: Dataset, without_credentials: pytest.MonkeyPatch, s3_server: LocalS3
) -> None:
    without_credentials.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint_url)
    done = command(dataset.uri, "--to", "s3://no-such-bucket/table")
    assert done.status == 4
    assert "no usable AWS credentials" in done.output
    assert done.output.count("\n") == 1
    for name, value in s3_server.environment().items():
        without_credentials.setenv(name, value)
    done = command(dataset.uri, "--to", "s3://no-such-bucket/table")
    assert done.status == 4
    assert "bucket 'no-such-bucket' does not exist" in done.output
    assert done.output.count("\n") == 1


def test_unreadable_delta_log_is_reported_in_one_line(dataset: Dataset) -> None:
    dataset.storage.write(f"{dataset.table}/_delta_log/{0:020d}.json", b"no\nlog")
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 4
    assert "table: cannot be read as a Delta table: " in done.output
    assert done.output.count("\n") == 1
    assert "\x1b" not in done.output
    assert " 0: " not in done.output  # the first line of a stack trace


def test_help_names_the_extra_that_delta_needs() -> None:
    assert "cvt-label[delta]" in command("--help").output


def test_no_secret_is_written_or_logged(
    dataset: Dataset, bucket: str, storage: Storage, s3_server: LocalS3
) -> None:
    """Runs in a separate process with debug logs of the libraries."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "publish", dataset.uri, "--to", f"{bucket}/table"],
        env=os.environ | {"RUST_LOG": "debug"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for content in [storage.read(info.uri) for info in storage.list(bucket)]:
        assert s3_server.secret_key.encode() not in content
        assert s3_server.access_key.encode() not in content
    assert s3_server.secret_key not in done.stdout + done.stderr


def test_unwritable_table_ends_with_4_and_names_the_path(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    table = f"{tmp_path}/file/table"
    done = command(dataset.uri, "--to", table)
    assert (done.status, done.output) == (4, f"cvt-label: {table}/_delta_log: Not a directory\n")

    def write(storage: Storage, table: str, path: str, rows: pa.Table) -> DataFile:
        raise StorageError(f"{table}/{path}", "access denied")

    monkeypatch.setattr("pipeline.publish.publishing.write_data_file", write)
    done = command(dataset.uri, "--to", dataset.table)
    assert done.status == 4
    assert done.output == f"cvt-label: {dataset.table}: cannot be written: access denied\n"
