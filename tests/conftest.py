"""Fixtures shared by all tests: a real S3 server, a real local Ray, a Ray cluster, and photographs."""

from __future__ import annotations

import os
import re
import secrets
import signal
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from jobs.local_s3 import LocalS3
from pipeline.storage import Storage
from tests.ray_head import Head, ray_head

# Tests and their child processes neither use nor fill the user's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="cvt-label-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

# Ray reads these variables at import, and some test modules import Ray: set them before collection.
# With a token in the environment, Ray writes no token into the home folder.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}

# A shell makes background processes ignore SIGINT, and child processes inherit this. Restore the default.
signal.signal(signal.SIGINT, signal.default_int_handler)

Photograph = tuple[str, bytes, int]

#: Fixtures that start a Ray shared by all tests of a worker, and the text in files that use them.
SHARED_RAY = {"ray_local", "head"}
USES_SHARED_RAY = re.compile(r"\bray_local\b|\bhead: Head\b|\bcluster: str\b")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files that share a Ray first, then by number of slow tests, so that workers finish together."""
    shares_ray = {str(item.path) for item in items if SHARED_RAY & set(getattr(item, "fixturenames", ()))}
    for item in items:
        if SHARED_RAY & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if unknown := [path for path in shares_ray if not USES_SHARED_RAY.search(Path(path).read_text())]:
        raise pytest.UsageError(f"{unknown}: USES_SHARED_RAY does not match these files")
    slow = Counter(str(item.path) for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (str(item.path) not in shares_ray, -slow[str(item.path)]))


#: The shared Rays that are running.
_RAYS = ExitStack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Iterator[None]:
    """Stops the shared Rays after the last file that uses them: an idle Ray takes a tenth of a core."""
    yield
    if nextitem is None or not USES_SHARED_RAY.search(nextitem.path.read_text()):
        _RAYS.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Runs each file on one worker, and all files that share a Ray on the same worker.

    `--dist loadgroup` has no effect in pytest-xdist 3.8 with pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = nodeid.partition("::")[0]
            return "ray" if USES_SHARED_RAY.search((config.rootpath / file).read_text()) else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """A running S3 server. During the session, the AWS variables of the environment select this server."""
    with LocalS3() as server, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3_server: LocalS3) -> str:
    """The URI of a new, empty bucket."""
    name = f"test-{secrets.token_hex(6)}"
    s3_server.create_bucket(name)
    return f"s3://{name}"


@pytest.fixture
def storage(s3_server: LocalS3) -> Storage:
    """Storage for the S3 server and local files."""
    return Storage(endpoint_url=s3_server.endpoint_url)


@pytest.fixture(scope="session")
def ray_local(s3_server: LocalS3) -> None:
    """A running local Ray whose workers have the S3 server's credentials in their environment."""
    import ray

    from pipeline.dataflow.ray_cluster import init_ray

    patch = _RAYS.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]))
    init_ray(
        "local",
        num_cpus=4,  # Ray starts one worker per CPU, even if unused
        include_dashboard=False,
        object_store_memory=300_000_000,
        logging_level="warning",
    )
    _RAYS.callback(ray.shutdown)


@pytest.fixture(scope="session")
def head(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Head:
    """A running Ray cluster that accepts jobs, with the S3 server's credentials in its environment."""
    return _RAYS.enter_context(ray_head(tmp_path_factory.mktemp("cluster")))


@pytest.fixture(scope="session")
def cluster(head: Head) -> str:
    """The address of `head`."""
    return head.address


@pytest.fixture(scope="session")
def photographs() -> list[Photograph]:
    """Real photographs: (key, JPEG, ImageNet class index), from WebDataset tars."""
    folder = os.environ.get("IMAGENET_SAMPLE_DIR")
    if not folder:
        pytest.skip("IMAGENET_SAMPLE_DIR is not set to a folder of WebDataset tars with photographs")
    found: list[Photograph] = []
    for path in sorted(Path(folder).glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        for name, data in members.items():
            stem, _, kind = name.partition(".")
            if kind == "jpg":
                found.append((stem, data, int(members[f"{stem}.cls"])))
    return found
