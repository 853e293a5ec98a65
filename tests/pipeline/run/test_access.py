"""The policies in docs/how-to/restrict-access.md allow exactly the S3 requests of the jobs."""

from __future__ import annotations

import copy
import fnmatch
import json
import pickle
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.dataset as ds
import pytest
from pyarrow.fs import S3FileSystem
from typer.testing import CliRunner

from cvt.checkpoints import BUNDLED
from jobs.cli import make_app
from jobs.compare import compare
from jobs.console import add_command
from jobs.local_s3 import LocalS3
from jobs.metrics import metrics
from jobs.plan import plan
from jobs.publish import publish
from jobs.report import report
from jobs.schedule import schedule
from jobs.stats import stats
from pipeline.config import Config, ScheduleConfig, Selection, load_config
from pipeline.dataflow.local_executor import LocalExecutor
from pipeline.run import label, make_job, rebuild
from pipeline.schedule import DatasetState, StateFile
from pipeline.storage import Storage
from tests.fault_proxy import FaultProxy, Request
from tests.makers import list_shards, make_image, make_samples, make_tar
from tests.pipeline.publish.tables import FORMATS, Dataset, add_catalog, needs_format
from tests.runs import IN_PROCESS

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[3] / "docs" / "how-to" / "restrict-access.md"
POLICIES: dict[str, dict[str, Any]] = {
    name: json.loads(text)
    for name, text in re.findall(
        r"<!-- policy: (\w+) -->\n```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
}
#: Operations and their IAM actions. Only multipart uploads, which pyiceberg uses, have POST.
ACTIONS = {
    "GET": "s3:GetObject",
    "HEAD": "s3:GetObject",
    "PUT": "s3:PutObject",
    "POST": "s3:PutObject",
    "DELETE": "s3:DeleteObject",
}
LISTING = {
    "list-type",
    "prefix",
    "max-keys",
    "encoding-type",
    "continuation-token",
    "delimiter",
    "start-after",
}


@dataclass(frozen=True)
class Access:
    """The IAM permission that a request needs."""

    action: str
    resource: str
    prefix: str | None = None


def access(request: Request) -> Access:
    parts = urlsplit(request.path)
    bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
    query = parse_qs(parts.query, keep_blank_values=True)
    if not key:
        assert request.method in ("GET", "HEAD"), request
        assert set(query) <= LISTING, request
        return Access("s3:ListBucket", f"arn:aws:s3:::{bucket}", query.get("prefix", [""])[0])
    multipart = {"uploads", "uploadId", "partNumber"}
    assert set(query) <= {"x-id"} | multipart, request  # tagging, acl, versionId and others need more
    action = ACTIONS[request.method]
    if request.method == "DELETE" and "uploadId" in query:
        action = "s3:AbortMultipartUpload"
    return Access(action, f"arn:aws:s3:::{bucket}/{key}")


def accesses(proxy: FaultProxy) -> set[Access]:
    """The permissions of all requests; S3 reports a missing object only if its bucket may be listed."""
    needed = {access(request) for request in proxy.seen}
    missing = {access(request).resource.partition("/")[0] for request in proxy.missing}
    return needed | {Access("s3:ListBucket", bucket) for bucket in missing}


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def grants(policy: dict[str, Any]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yields statement name, action, resource and the allowed prefixes of listings."""
    for statement in policy["Statement"]:
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*")
        for action in listed(statement["Action"]):
            for resource in listed(statement["Resource"]):
                yield statement["Sid"], action, resource, listed(prefixes)


def check(policy: dict[str, Any], seen: set[Access]) -> None:
    """Asserts that the policy allows all accesses, and nothing that no access needs."""
    used: set[tuple[str, str, str]] = set()
    for needed in seen:
        allowed = {
            (name, action, resource)
            for name, action, resource, prefixes in grants(policy)
            if needed.action == action
            and fnmatch.fnmatchcase(needed.resource, resource)
            and any(fnmatch.fnmatchcase(needed.prefix or "", each) for each in prefixes)
        }
        assert allowed, f"not allowed: {needed}"
        used |= allowed
    for name, action, resource, _ in grants(policy):
        assert (name, action, resource) in used, f"not needed: {name} {action} {resource}"


@pytest.fixture(scope="module")
def root(s3_server: LocalS3) -> str:
    """The prefix of the names of the buckets."""
    name = f"access-{secrets.token_hex(4)}-"
    for kind in ("images", "labels", "models", "tables"):
        s3_server.create_bucket(name + kind)
    storage = Storage(endpoint_url=s3_server.endpoint_url)
    for file in BUNDLED["fashion-mnist"].iterdir():
        storage.write(f"s3://{name}models/cvt-13/{file.name}", file.read_bytes())
    write_shards(storage, name, 0)
    return name


def write_shards(storage: Storage, root: str, seed: int) -> None:
    for i in range(3):
        members = [(f"{k}.jpg", make_image(seed + k)) for k in range(5)]
        storage.write(f"s3://{root}images/shards/{i}.tar", make_tar(members))


def policy(name: str, root: str) -> dict[str, Any]:
    """A policy of the page, for the buckets of this test."""
    text = json.dumps(POLICIES[name])
    assert "my-" in text
    return dict(json.loads(text.replace(":::my-", f":::{root}")))


def config(root: str, endpoint: str, *overrides: str) -> Config:
    fields = [f"input.uri=s3://{root}images/shards", f"output.uri=s3://{root}labels/labels"]
    fields += [*IN_PROCESS, f"storage.endpoint_url={endpoint}"]
    return load_config(Config, None, [*fields, *overrides])


def requested(s3_server: LocalS3, action: Callable[[str], object]) -> set[Access]:
    """The accesses that an action requests; it gets the endpoint as an argument and in the environment."""
    with FaultProxy(s3_server.endpoint_url) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        action(proxy.url)
        return accesses(proxy)


@pytest.fixture(scope="module")
def labeled(root: str, s3_server: LocalS3) -> set[Access]:
    """The accesses of a first run, incremental runs, pruning and a rebuild."""
    storage = Storage(endpoint_url=s3_server.endpoint_url)

    def use(endpoint: str) -> None:
        label(config(root, endpoint))
        write_shards(storage, root, 7)
        storage.write(f"s3://{root}images/shards/cut.tar", b"no tar")
        label(config(root, endpoint))
        storage.delete(f"s3://{root}images/shards/0.tar")
        label(config(root, endpoint), selection=Selection(retry_errors=True, prune=True))
        label(config(root, endpoint))
        rebuild(make_job(config(root, endpoint)).partition)

    return requested(s3_server, use)


@pytest.fixture(scope="module")
def other(labeled: set[Access], root: str, s3_server: LocalS3) -> str:
    """URI of another partition of the same images, without a gallery."""
    return label(config(root, s3_server.endpoint_url, "output.topk=2", "report.gallery=0")).job.partition.uri


def test_labeling_requests_exactly_what_its_policy_allows(labeled: set[Access], root: str) -> None:
    check(policy("label", root), labeled)
    assert {
        needed.action for needed in labeled if needed.resource.startswith(f"arn:aws:s3:::{root}images/")
    } == {"s3:GetObject"}


@pytest.mark.parametrize("action", ["s3:DeleteObject", "s3:PutObject", "s3:ListBucket"])
def test_missing_or_extra_action_in_a_policy_is_detected(
    labeled: set[Access], root: str, action: str
) -> None:
    lacking = copy.deepcopy(policy("label", root))
    for statement in lacking["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        statement["Action"] = [each for each in actions if each != action]
    with pytest.raises(AssertionError, match="not allowed"):
        check(lacking, labeled)
    generous = copy.deepcopy(policy("label", root))
    generous["Statement"][1]["Action"] = ["s3:GetObject", "s3:PutObject"]
    with pytest.raises(AssertionError, match="not needed: ReadShards s3:PutObject"):
        check(generous, labeled)


def test_missing_object_is_reported_if_the_bucket_may_be_listed(labeled: set[Access], root: str) -> None:
    missing = Access("s3:ListBucket", f"arn:aws:s3:::{root}labels")
    assert missing in labeled
    with pytest.raises(AssertionError, match=r"not allowed: .*images"):
        check(policy("label", root), {Access("s3:ListBucket", f"arn:aws:s3:::{root}images")})


def run(command: Callable[..., None], *arguments: object) -> int:
    """Runs a command; returns its exit status."""
    app = make_app()
    add_command(app, command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code


@pytest.fixture
def job(root: str, tmp_path: Path) -> Path:
    """The configuration of `labeled` for commands; the environment has the endpoint of S3."""
    path = tmp_path / "job.yaml"
    values = config(root, "http://127.0.0.1:1").model_dump(include={"input", "model", "output"})
    path.write_text(json.dumps(values))  # JSON is YAML
    return path


def test_workers_request_what_their_policy_allows(
    labeled: set[Access], root: str, s3_server: LocalS3
) -> None:
    def read(endpoint: str) -> None:
        job = make_job(config(root, endpoint))
        shards = list(list_shards(Storage(endpoint_url=s3_server.endpoint_url), f"s3://{root}images/shards"))
        step = job.stages.make_read_step(LocalExecutor().resources(job.resource_request))
        chunks = list(pickle.loads(pickle.dumps(step))(enumerate(shards)))
        assert sum(chunk.samples.num_rows for chunk in chunks) == 10

    check(policy("worker", root), requested(s3_server, read))


def test_planning_and_statistics_request_what_their_policy_allows(
    labeled: set[Access], root: str, s3_server: LocalS3, job: Path
) -> None:
    def use(endpoint: str) -> None:
        assert run(plan, "--config", job, "--retry-errors", "--prune") == 0
        assert run(stats, "--config", job) == 0
        assert run(metrics, "--config", job) == 0
        assert run(stats, "--config", job, "--set", "output.topk=1") == 4  # no labels with this option

    check(policy("plan", root), requested(s3_server, use))


def test_reader_of_labels_requests_what_its_policy_allows(
    labeled: set[Access], root: str, s3_server: LocalS3
) -> None:
    partition = make_job(config(root, s3_server.endpoint_url)).partition.uri.removeprefix("s3://")

    def read(endpoint: str) -> None:
        files = S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http")
        assert ds.dataset(f"{partition}/predictions", filesystem=files).to_table().num_rows == 10

    check(policy("read", root), requested(s3_server, read))


def test_model_in_a_bucket_requests_what_its_policy_allows(root: str, s3_server: LocalS3) -> None:
    def load(endpoint: str) -> None:
        make_job(config(root, endpoint, f"model.path=s3://{root}models/cvt-13"))

    check(policy("model", root), requested(s3_server, load))


@pytest.mark.parametrize("format", FORMATS)
def test_publishing_requests_what_its_policy_allows(
    root: str, s3_server: LocalS3, format: str, tmp_path: Path
) -> None:
    """Three updates of the table, and one without changes."""
    needs_format(format)
    dataset = Dataset(
        f"s3://{root}images", format=format, table_root=f"s3://{root}tables", catalog_folder=str(tmp_path)
    )
    dataset.uri = f"s3://{root}labels/labels/model=cvt-{format}"

    def publish_labels(endpoint: str) -> None:
        if format == "iceberg":
            add_catalog(str(tmp_path), f"s3://{root}tables/warehouse")  # with the endpoint
        assert run(publish, dataset.uri, "--to", dataset.to) == 0

    found: set[Access] = set()
    for number in range(3):
        dataset.label(**{f"{number}.tar": 3, "0.tar": 4})
        found |= requested(s3_server, publish_labels)
        if number == 0 and format == "delta":  # write a checkpoint with every version, not every hundredth
            dataset.delta().alter.set_table_properties({"delta.checkpointInterval": "1"})
    found |= requested(s3_server, publish_labels)
    if format == "delta":
        assert any(needed.resource.endswith(".checkpoint.parquet") for needed in found)
    check(policy(f"publish_{format}", root), found)


def test_comparison_requests_what_its_policy_allows(
    labeled: set[Access], other: str, root: str, s3_server: LocalS3
) -> None:
    storage, job = Storage(endpoint_url=s3_server.endpoint_url), config(root, s3_server.endpoint_url)
    label(job, selection=Selection(relabel=True))  # the manifest has no runs after a rebuild
    storage.write(f"s3://{root}images/shards/more.tar", make_tar(make_samples(3)))
    uri = label(job).partition.uri

    def use(endpoint: str) -> None:
        assert run(compare, uri, other) == 0
        assert run(compare, f"{uri}@previous", f"{uri}@latest", "--drift-only") == 0
        assert run(compare, f"{uri}@20260101T000000.000000Z-000000", uri) == 4  # no such run
        assert run(compare, f"s3://{root}labels/labels/model=x-00000000", uri) == 4  # not a partition

    check(policy("compare", root), requested(s3_server, use))
    written = f"s3://{root}tables/comparison.parquet"
    with_output = requested(s3_server, lambda endpoint: run(compare, uri, other, "--output", written))
    extra = {needed for needed in with_output if not needed.resource.startswith(f"arn:aws:s3:::{root}labels")}
    assert extra == {Access("s3:PutObject", f"arn:aws:s3:::{written.removeprefix('s3://')}")}


def test_report_requests_what_its_policy_allows(
    labeled: set[Access], other: str, root: str, s3_server: LocalS3
) -> None:
    uri = make_job(config(root, s3_server.endpoint_url)).partition.uri

    def make(endpoint: str) -> None:
        assert run(report, uri, "--against", other) == 0
        assert run(report, other) == 0

    check(policy("report", root), requested(s3_server, make))


def test_schedule_requests_what_its_policy_allows(root: str, s3_server: LocalS3, tmp_path: Path) -> None:
    """The first poll of a dataset; a claimed scheduled time without a cluster; the states."""
    path = tmp_path / "schedule.yaml"
    values = config(root, "http://127.0.0.1:1").model_dump(include={"input", "model", "output"})
    submit = {"address": "http://127.0.0.1:1"}
    path.write_text(json.dumps({"submit": submit, "datasets": {"photos": values | {"cron": "* * * * *"}}}))
    dataset = load_config(ScheduleConfig, path).datasets["photos"]

    def use(endpoint: str) -> None:
        assert run(schedule, "--config", path, "--once") == 0
        earlier = DatasetState(dataset="photos", handled_until=datetime.now(UTC) - timedelta(hours=1))
        uri = StateFile("photos", dataset).uri
        Storage(endpoint_url=s3_server.endpoint_url).write(uri, earlier.model_dump_json().encode())
        assert run(schedule, "--config", path, "--once") == 4
        assert run(schedule, "--config", path, "--status") == 0

    check(policy("schedule", root), requested(s3_server, use))


def test_every_policy_of_the_page_is_tested() -> None:
    tested = {"label", "worker", "plan", "read", "model", "publish_delta", "publish_iceberg"}
    tested |= {"compare", "report", "schedule"}
    assert set(POLICIES) == tested
    assert DOCUMENT.read_text().count("```json") == len(POLICIES)
