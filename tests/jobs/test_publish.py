"""Tests of the command `publish`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.local_s3 import LocalS3
from pipeline.config import Config, load_config
from pipeline.storage import Storage
from tests.command import CompletedProcess, cvt_label, cvt_label_process
from tests.fault_proxy import FaultProxy
from tests.http_server import Answer, HttpServer
from tests.pipeline.publish.tables import FORMATS, Dataset, needs_format, predictions, reload_catalogs


@pytest.fixture(params=FORMATS)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """A dataset with a labeled shard of six rows, whose table does not exist yet."""
    return labeled(tmp_path, request.param)


def labeled(folder: Path, format: str, table_root: str | None = None) -> Dataset:
    """Returns a dataset with a labeled shard of six rows."""
    needs_format(format)
    dataset = Dataset(str(folder), format=format, table_root=table_root, catalog_folder=str(folder))
    dataset.label(a=6)
    return dataset


def publish(dataset: Dataset, to: str = "", *options: object, **environment: str) -> CompletedProcess:
    """Runs the command in this process."""
    return cvt_label("publish", dataset.uri, "--to", to or dataset.to, *options, **environment)


def error(done: CompletedProcess, status: int = 4) -> str:
    """Returns the only line of the output of a command that failed with this status."""
    assert (done.returncode, done.stdout) == (status, ""), done.stdout + done.stderr
    assert done.stderr.startswith("cvt-label: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.removeprefix("cvt-label: ").removesuffix("\n")


def test_output_reports_published_shards_and_up_to_date_table(dataset: Dataset) -> None:
    done = publish(dataset)
    version = dataset.version()
    counts = "1 shard added, 0 replaced, 0 removed; 6 rows written"
    assert (done.returncode, done.stdout) == (0, f"{dataset.to}: version {version}: {counts}\n")
    assert dataset.published() == dataset.labels()
    again = publish(dataset)
    assert (again.returncode, again.stdout) == (0, f"{dataset.to}: version {version}, already up to date\n")
    dataset.label(a=2, b=4, c=3)
    counts = "2 shards added, 1 replaced, 0 removed; 9 rows written"
    assert counts in publish(dataset).stdout
    dataset.label(remove=["a", "b"])
    assert "0 shards added, 0 replaced, 2 removed; 0 rows written" in publish(dataset).stdout
    assert dataset.published() == dataset.labels()


def test_options_select_what_is_written(dataset: Dataset) -> None:
    dataset.embedding = "float32"
    dataset.label(b=4)
    assert publish(dataset, "", "--without-embedding", "--memory", "500MB").returncode == 0
    assert not any("embedding" in row for row in dataset.published())
    assert "already up to date" in publish(dataset, "", "--memory", "1KiB").stdout
    done = publish(dataset, "", "--rebuild", "--memory", "1KiB")
    assert "0 shards added, 2 replaced, 0 removed; 10 rows written" in done.stdout
    assert dataset.published() == dataset.labels()


@pytest.mark.parametrize("size", ["0", "-1", "many", "1 parsec", ""])
def test_invalid_memory_ends_with_2(dataset: Dataset, size: str) -> None:
    done = publish(dataset, "", "--memory", size)
    assert done.returncode == 2
    assert "--memory" in done.stderr
    assert dataset.version() is None


@pytest.mark.parametrize(("by", "format"), [("uri", "delta"), ("uri", "iceberg"), ("config", "delta")])
def test_command_imports_neither_torch_nor_ray(tmp_path: Path, by: str, format: str) -> None:
    needs_format(format)
    dataset = Dataset(str(tmp_path), format=format)
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
        [sys.executable, "-c", code, "publish", *source, "--to", dataset.to],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("3 rows written\nset()\n")
    assert done.stderr == ""
    assert dataset.published() == dataset.labels()


@pytest.mark.parametrize(
    "arguments", [[], ["out", "--config", "job.yaml"], ["out", "--set", "output.topk=1"]]
)
def test_command_needs_either_a_partition_or_a_configuration(arguments: list[str]) -> None:
    assert cvt_label("publish", *arguments, "--to", "delta:table").returncode == 2


def test_missing_partition_ends_with_4(dataset: Dataset) -> None:
    done = cvt_label("publish", f"{dataset.root}/out/model=other", "--to", dataset.to)
    assert "model=other: not a partition" in error(done)
    dataset.storage.delete(dataset.partition.manifest.uri)
    assert error(publish(dataset)) == f"{dataset.uri}: nothing is labeled yet; run cvt-label label first"
    assert dataset.version() is None


def test_table_in_the_output_ends_with_2(dataset: Dataset) -> None:
    message = error(publish(dataset, f"delta:{dataset.root}/out/table"), 2)
    assert f"the table must be outside the output {dataset.root}/out" in message


@pytest.mark.parametrize(
    "to", ["table", "s3://bucket/table", "hudi:table", "delta:", "iceberg", "iceberg:a.b"]
)
def test_unknown_format_ends_with_2(dataset: Dataset, to: str) -> None:
    message = error(publish(dataset, to), 2)
    assert message == f"--to {to}: expected delta:URI or iceberg:CATALOG.NAMESPACE.TABLE"


def test_labels_newer_than_the_manifest_end_with_3(dataset: Dataset) -> None:
    dataset.label(b=3)
    os.utime(dataset.prediction_uri("a"), ns=(1, 1))
    done = publish(dataset)
    assert done.returncode == 3
    assert "1 shard added, 0 replaced, 0 removed; 3 rows written" in done.stdout
    assert done.stderr == "1 shard changed after the manifest was written: publish again later\n"


def test_edited_table_ends_with_4_until_rebuild(dataset: Dataset) -> None:
    dataset.publish()
    (dataset.delta() if dataset.format == "delta" else dataset.iceberg()).delete("index = 3")
    message = error(publish(dataset))
    assert message.startswith(f"{dataset.to}: the table was edited: rows of shard {dataset.shard('a')}")
    assert message.endswith("--rebuild")
    assert publish(dataset, "", "--rebuild").returncode == 0
    assert dataset.published() == dataset.labels()


def test_labels_that_keep_changing_end_with_5(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.publish.publishing.pause_after", lambda attempt: 0)
    read = Storage.open

    def relabel_and_read(storage: Storage, uri: str, *arguments: object, **options: object) -> object:
        if uri == dataset.prediction_uri("a"):
            dataset.label(a=6)
        return read(storage, uri, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Storage, "open", relabel_and_read)
    message = error(publish(dataset), 5)
    assert message.startswith(f"{dataset.to}: not published: the table or the labels changed during all 5")
    assert message.endswith("; publish again later")


@pytest.mark.parametrize("package", ["deltalake", "pyiceberg", "sqlalchemy"])
def test_missing_package_ends_with_4_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    format = "delta" if package == "deltalake" else "iceberg"
    dataset = labeled(tmp_path, format)
    if package == "sqlalchemy":
        monkeypatch.delitem(sys.modules, "pyiceberg.catalog.sql", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    message = error(publish(dataset))
    if package != "sqlalchemy":  # a catalog needs it
        assert message == f"{dataset.to}: requires the package {package}: pip install 'cvt-label[{format}]'"
    else:
        assert "SQLAlchemy support not installed: pip install 'pyiceberg[sql-postgres]'" in message


def test_wrong_credentials_end_with_4_and_are_not_shown(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = labeled(tmp_path, "delta", bucket)
    assert publish(dataset).returncode == 0
    assert "planted" not in error(publish(dataset, AWS_SECRET_ACCESS_KEY="planted"))


@pytest.mark.parametrize("is_new", [True, False])
def test_wrong_credentials_of_a_warehouse_end_with_4_and_are_not_shown(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    dataset = labeled(tmp_path, "iceberg", bucket)
    if not is_new:
        dataset.publish()
    prefix = f"PYICEBERG_CATALOG__{dataset.to.partition(':')[2].partition('.')[0].upper()}"
    monkeypatch.setenv(f"{prefix}__S3__SECRET_ACCESS_KEY", "planted")
    reload_catalogs()
    message = error(publish(dataset))
    assert message.startswith(f"{dataset.to}: ")
    assert "planted" not in message


def test_missing_bucket_of_a_warehouse_ends_with_4(
    s3_server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = labeled(tmp_path, "iceberg", "s3://no-such-bucket")
    assert error(publish(dataset)).startswith(f"{dataset.to}: the table cannot be created: ")


def add_rest_catalog(monkeypatch: pytest.MonkeyPatch, uri: str, **properties: str) -> None:
    """Configures the Iceberg catalog `lake` as a REST service."""
    for key, value in {"TYPE": "rest", "URI": uri, **properties}.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__{key}", value)
    reload_catalogs()


@pytest.mark.parametrize("status", [401, 403, 404, 500, 503])
def test_failure_of_a_catalog_service_ends_with_4_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    needs_format("iceberg")
    dataset = labeled(tmp_path, "delta")
    body = b'{"error": {"message": "no access to planted", "type": "X", "code": %d}}' % status
    with HttpServer() as server:
        server.answers["/v1/config"] = [Answer(body.replace(b"planted", b"it"), status)]  # type: ignore[assignment]
        add_rest_catalog(monkeypatch, server.url, TOKEN="planted")
        message = error(publish(dataset, "iceberg:lake.ns.table"))
    assert message.startswith("iceberg:lake.ns.table: the catalog lake cannot be used (configuration: ")
    assert "planted" not in message


def test_unreachable_catalog_service_ends_with_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_format("iceberg")
    dataset = labeled(tmp_path, "delta")
    add_rest_catalog(monkeypatch, "http://me:planted@127.0.0.1:1")
    message = error(publish(dataset, "iceberg:lake.ns.table"))
    assert "the catalog lake cannot be used" in message
    assert "planted" not in message


@pytest.mark.parametrize(
    "properties",
    [{}, {"TYPE": "sql"}, {"TYPE": "fax", "URI": "x"}, {"TYPE": "sql", "URI": "sqlite:////no/folder/x.db"}],
    ids=["none", "no address", "unknown type", "no folder"],
)
def test_invalid_configuration_of_a_catalog_ends_with_4_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str]
) -> None:
    needs_format("iceberg")
    for key, value in properties.items():
        monkeypatch.setenv(f"PYICEBERG_CATALOG__LAKE__{key}", value)
    reload_catalogs()
    dataset = Dataset(str(tmp_path))
    dataset.label(a=6)
    message = error(publish(dataset, "iceberg:lake.ns.table"))
    where = "(configuration: ~/.pyiceberg.yaml, PYICEBERG_CATALOG__LAKE__URI)"
    assert message.startswith(f"iceberg:lake.ns.table: the catalog lake cannot be used {where}: ")


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
    tmp_path: Path,
    bucket: str,
    s3_server: LocalS3,
    without_credentials: pytest.MonkeyPatch,
    profile: str,
) -> None:
    """The credentials file has the credentials, and the config file has the endpoint."""
    dataset = labeled(tmp_path, "delta")
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
    first = publish(dataset, f"delta:{bucket}/table")
    assert (first.returncode, first.stderr) == (0, "")
    assert "version 1: 1 shard added" in first.stdout
    assert "already up to date" in publish(dataset, f"delta:{bucket}/table").stdout
    assert s3_server.secret_key not in first.stdout


def test_missing_s3_credentials_or_bucket_is_reported_in_one_line(
    tmp_path: Path, without_credentials: pytest.MonkeyPatch, s3_server: LocalS3
) -> None:
    dataset = labeled(tmp_path, "delta")
    without_credentials.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint_url)
    to = "delta:s3://no-such-bucket/table"
    assert "no usable AWS credentials" in error(publish(dataset, to))
    for name, value in s3_server.environment().items():
        without_credentials.setenv(name, value)
    assert "bucket 'no-such-bucket' does not exist" in error(publish(dataset, to))


def test_unreadable_log_is_reported_in_one_line(dataset: Dataset) -> None:
    dataset.publish()
    if dataset.format == "delta":
        dataset.storage.write(f"{dataset.table}/_delta_log/{1:020d}.json", b"no\nlog")
        reason = "cannot be read as a Delta table"
    else:
        metadata = dataset.iceberg().metadata_location.removeprefix("file://")
        dataset.storage.write(metadata, b"no\nmetadata")
        reason = f"the catalog {dataset.to[8:].partition('.')[0]} cannot be used"
    message = error(publish(dataset))
    assert message.startswith(f"{dataset.to}: {reason}")
    assert " 0: " not in message  # the first line of a stack trace


def test_help_names_the_extras_that_the_formats_need() -> None:
    text = " ".join(cvt_label("publish", "--help").stdout.split())
    assert "cvt-label[delta]" in text
    assert "cvt-label[iceberg]" in text
    assert "5 if other writers kept changing the table" in text


@pytest.mark.parametrize("format", FORMATS)
def test_no_secret_is_written_or_logged(
    tmp_path: Path, bucket: str, storage: Storage, s3_server: LocalS3, format: str
) -> None:
    """Runs in a separate process with debug logs of the libraries."""
    dataset = labeled(tmp_path, format, bucket)
    done = cvt_label_process("publish", dataset.uri, "--to", dataset.to, RUST_LOG="debug")
    assert done.returncode == 0, done.stderr
    contents = {info.uri: storage.read(info.uri) for info in storage.list(bucket)}
    assert len(contents) >= 3
    contents["the catalog"] = b"".join(path.read_bytes() for path in tmp_path.glob("*.db"))
    for place, content in contents.items():
        assert s3_server.secret_key.encode() not in content, place
        assert s3_server.access_key.encode() not in content, place
    assert s3_server.secret_key not in done.stdout + done.stderr
    assert dataset.published() == dataset.labels()


def test_unwritable_table_ends_with_4_and_names_the_path(tmp_path: Path) -> None:
    dataset = labeled(tmp_path, "delta")
    (tmp_path / "file").touch()
    table = f"{tmp_path}/file/table"
    assert error(publish(dataset, f"delta:{table}")) == f"{table}/_delta_log: Not a directory"


def test_unwritable_warehouse_ends_with_4_and_names_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dataset = labeled(tmp_path, "iceberg", f"{tmp_path}/file")
    message = error(publish(dataset))
    assert message.startswith(f"{dataset.to}: the table cannot be created: NotADirectoryError: ")
    assert f"{tmp_path}/file/warehouse" in message


@pytest.mark.parametrize("format", FORMATS)
def test_denied_write_of_rows_ends_with_4(
    tmp_path: Path, bucket: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The store accepts the files of the new table, and no data files."""
    with FaultProxy(s3_server.endpoint_url) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        dataset = labeled(tmp_path, format, bucket)
        proxy.always("denied", lambda request: request.method != "GET" and ".parquet" in request.path)
        # In a process of its own: deltalake's calls would block the threads of the proxy.
        done = cvt_label_process("publish", dataset.uri, "--to", dataset.to)
    assert done.returncode == 4
    message = done.stderr.splitlines()[-1]  # deltalake may print a trace of its own before
    assert message.startswith(f"cvt-label: {dataset.to}: the ")
    assert re.search("lacked the necessary privileges|ACCESS_DENIED", message)
    dataset = labeled(tmp_path, format, bucket)
    assert dataset.published() == []
    assert publish(dataset).returncode == 0
    assert dataset.published() == dataset.labels()


#: Prints a line when the fifth prediction file is opened, and makes reading all later ones slow.
SLOW = """
import sys, time
opened = []
def slow(event, args):
    if event == "open" and "/predictions/" in str(args[0]):
        opened.append(args[0])
        if len(opened) == 5:
            print("reading", flush=True)
        if len(opened) >= 5:
            time.sleep(0.1)
sys.addaudithook(slow)
from jobs.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "number"), [("delta", signal.SIGINT), ("iceberg", signal.SIGTERM)], indirect=["dataset"]
)
def test_signal_during_a_long_write_ends_with_130_and_leaves_no_rows(
    dataset: Dataset, number: signal.Signals
) -> None:
    """The rest of the rows would take more than a minute."""
    names = [f"{shard:03d}" for shard in range(700)]
    table = predictions("", 10)
    dataset.label(
        *(table.set_column(0, table.schema.field(0), [[dataset.shard(name)] * 10]) for name in names)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "publish", dataset.uri, "--to", dataset.to, "--memory", "40KB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n", process.communicate()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout, stderr) == (130, "", "cvt-label: interrupted\n")
    assert dataset.published() == []
    dataset.publish()
    assert dataset.published() == dataset.labels()
