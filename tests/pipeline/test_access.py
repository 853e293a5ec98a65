"""What docs/access.md allows is all that the jobs ask of S3, and no more, by their own requests."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow.dataset as ds
import pytest
from pyarrow.fs import S3FileSystem

from cvt.checkpoints import BUNDLED
from jobs.local_s3 import LocalS3
from pipeline.config import Config, load_config
from pipeline.labelling import make_plan, rebuild, run_labelling
from pipeline.partition import open_partition
from pipeline.planning import Selection
from pipeline.storage import Storage
from tests.fault_proxy import FaultProxy, Request
from tests.makers import make_image, make_tar
from tests.pipeline.crashing import leave_out_ray

DOCUMENT = Path(__file__).parents[2] / "docs" / "access.md"
POLICIES: dict[str, dict[str, Any]] = {
    name: json.loads(text)
    for name, text in re.findall(
        r"<!-- policy: (\w+) -->\n```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL
    )
}
#: Operations that AWS has an action for; all others, such as uploads in parts, have none here.
ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject", "DELETE": "s3:DeleteObject"}
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
    """What a request needs to be allowed, in IAM's words."""

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
    assert set(query) <= {"x-id"}, request  # uploadId, tagging, acl, versionId and others need more
    return Access(ACTIONS[request.method], f"arn:aws:s3:::{bucket}/{key}")


def statements(policy: dict[str, Any], needed: Access) -> Iterator[tuple[str, str]]:
    """The statements (and the action in each) that allow an access."""
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", "*")
        prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
        if (
            needed.action in actions
            and fnmatch.fnmatchcase(needed.resource, statement["Resource"])
            and any(fnmatch.fnmatchcase(needed.prefix or "", each) for each in prefixes)
        ):
            yield statement["Sid"], needed.action


def check(policy: dict[str, Any], seen: set[Access]) -> None:
    """Everything is allowed, and everything that is allowed was needed by something."""
    used: set[tuple[str, str]] = set()
    for needed in seen:
        allowed = set(statements(policy, needed))
        assert allowed, f"not allowed: {needed}"
        used |= allowed
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert (statement["Sid"], action) in used, f"not needed: {statement['Sid']} {action}"


@pytest.fixture(scope="module")
def root(s3_server: LocalS3) -> str:
    """What the buckets' names in this test begin with."""
    name = f"access-{secrets.token_hex(4)}-"
    for kind in ("images", "labels", "models"):
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
    """A policy of the page, for this test's buckets."""
    text = json.dumps(POLICIES[name])
    assert "my-" in text
    return dict(json.loads(text.replace(":::my-", f":::{root}")))


def config(root: str, endpoint: str, *overrides: str) -> Config:
    fields = [f"input.uri=s3://{root}images/shards", f"output.uri=s3://{root}labels/labels"]
    fields += ["model.path=fashion-mnist", f"storage.endpoint_url={endpoint}"]
    return load_config(Config, None, [*fields, *overrides])


def asked(s3_server: LocalS3, action: Callable[[str], object]) -> set[Access]:
    """The accesses that an action asks for, through the endpoint that it is given."""
    with FaultProxy(s3_server.endpoint_url) as proxy:
        action(proxy.url)
        return {access(request) for request in proxy.seen}


@pytest.fixture(scope="module")
def labelled(root: str, s3_server: LocalS3, ray_local: None) -> set[Access]:
    """What the life of a partition asks for: a run on Ray, then increments, removals and a rebuild."""
    storage = Storage(endpoint_url=s3_server.endpoint_url)

    def live(endpoint: str) -> None:
        run_labelling(config(root, endpoint, "classify.num_cpus=1", "classify.threads=1"))
        with pytest.MonkeyPatch.context() as patch:
            leave_out_ray(patch)
            write_shards(storage, root, 7)
            storage.write(f"s3://{root}images/shards/cut.tar", b"no tar")
            run_labelling(config(root, endpoint))
            storage.delete(f"s3://{root}images/shards/0.tar")
            run_labelling(config(root, endpoint), selection=Selection(retry_errors=True, prune=True))
            run_labelling(config(root, endpoint))
            rebuild(config(root, endpoint))

    return asked(s3_server, live)


def test_labelling_needs_what_its_policy_allows_and_nothing_else(labelled: set[Access], root: str) -> None:
    check(policy("label", root), labelled)
    assert {
        needed.action for needed in labelled if needed.resource.startswith(f"arn:aws:s3:::{root}images/")
    } == {"s3:GetObject"}


@pytest.mark.parametrize("action", ["s3:DeleteObject", "s3:PutObject", "s3:ListBucket"])
def test_a_policy_that_lacks_an_action_or_has_one_too_many_is_noticed(
    labelled: set[Access], root: str, action: str
) -> None:
    lacking = copy.deepcopy(policy("label", root))
    for statement in lacking["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        statement["Action"] = [each for each in actions if each != action]
    with pytest.raises(AssertionError, match="not allowed"):
        check(lacking, labelled)
    generous = copy.deepcopy(policy("label", root))
    generous["Statement"][1]["Action"] = ["s3:GetObject", "s3:PutObject"]
    with pytest.raises(AssertionError, match="not needed: ReadShards s3:PutObject"):
        check(generous, labelled)


def test_planning_and_statistics_need_what_their_policy_allows(
    labelled: set[Access], root: str, s3_server: LocalS3
) -> None:
    def look(endpoint: str) -> None:
        make_plan(config(root, endpoint))
        open_partition(config(root, endpoint)).manifest.fold_statistics()

    check(policy("plan", root), asked(s3_server, look))


def test_a_reader_of_labels_needs_what_its_policy_allows(
    labelled: set[Access], root: str, s3_server: LocalS3
) -> None:
    partition = open_partition(config(root, s3_server.endpoint_url)).uri.removeprefix("s3://")

    def read(endpoint: str) -> None:
        files = S3FileSystem(endpoint_override=endpoint.removeprefix("http://"), scheme="http")
        assert ds.dataset(f"{partition}/predictions", filesystem=files).to_table().num_rows == 10

    check(policy("read", root), asked(s3_server, read))


def test_a_model_in_a_bucket_needs_what_its_policy_allows(root: str, s3_server: LocalS3) -> None:
    def load(endpoint: str) -> None:
        open_partition(config(root, endpoint, f"model.path=s3://{root}models/cvt-13"))

    check(policy("model", root), asked(s3_server, load))


def test_every_policy_of_the_page_is_tested() -> None:
    assert set(POLICIES) == {"label", "plan", "read", "model"}
    assert DOCUMENT.read_text().count("```json") == len(POLICIES)
