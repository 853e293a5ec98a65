"""Connecting to the Ray that runs the job: a given one, the submitted job's own, or a local one."""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import IN_PROCESS, ConfigError
from pipeline.dataflow.stopping import interrupts_deferred, sigterm_interrupts

#: Defaults for the environment. Ray reports no usage, and leaves the terminal to the job's own progress:
#: errors are raised, and the logs are in Ray's session folder. A local Ray keeps idle workers for a minute,
#: instead of starting a process per chunk.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}

_CONNECT_SECONDS = 10
#: The directory that holds this program's packages.
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("cvt", "pipeline", "jobs", "configs")


class ClusterError(ConnectionError):
    """No cluster answers at an address, or it refuses what it is asked for."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connects for the length of the block, and stops a local Ray that it started.

    Args:
        address: of a running cluster; None takes `RAY_ADDRESS`, which `ray job submit` sets, and
            starts a Ray on this machine where there is none. A process that is connected stays so.

    Raises:
        ClusterError: no cluster answers at the address.
        ConfigError: the address is `in-process`, which is for labeling only.
    """
    if address == IN_PROCESS:
        raise ConfigError(f"ray.address: {IN_PROCESS!r} is for labeling only")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if address == "local" and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Ray's own token is a file in the home folder, which every later Ray of the machine would ask for.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with interrupts_deferred():  # an interrupted import leaves a broken module
        import ray  # reads its variables of the environment now, and never again

    if ray.is_initialized():
        yield
        return
    local = {"include_dashboard": False} if address == "local" else {}
    check_reachable(address)
    # A Ray that is interrupted while it starts or stops leaves processes behind.
    try:
        with interrupts_deferred() if local else nullcontext():
            init_ray(address, logging_level=logging.ERROR, log_to_driver=False, **local)
        import ray.data  # resets the level of its logs

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with sigterm_interrupts():  # ray.init has set a handler of its own
            yield
    finally:
        with interrupts_deferred():
            ray.shutdown()


def init_ray(address: str, **options: Any) -> None:
    """Calls `ray.init`; workers import this program's packages whatever the working directory holds.

    A local Ray that does not start in time, which happens on a busy machine, is started a second time.
    """
    import ray

    # A Ray Client's driver runs on the cluster, not in this working directory.
    if not address.startswith("ray://") and _is_shadowed():
        # Such workers start later than those of a Ray without a runtime environment: only where needed.
        options["runtime_env"] = {"worker_process_setup_hook": _import_of_own_packages(str(_ROOT), _PACKAGES)}
    try:
        ray.init(address=address, **options)
    except Exception as error:  # Ray has no narrower type for this error
        if address != "local" or "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        ray.init(address=address, **options)


def _is_shadowed() -> bool:
    """Whether a directory that Ray puts first on the workers' `sys.path` holds other packages of our names.

    Ray puts the driver's working directory there, and the script's where it is on the driver's `sys.path`.
    """
    script = str(Path(sys.argv[0]).resolve().parent)
    directories = {str(Path.cwd()), *({script} & set(sys.path))}
    found = (PathFinder.find_spec(name, [path]) for path in directories for name in _PACKAGES)
    origins = [Path(spec.origin).resolve() for spec in found if spec is not None and spec.origin]
    return any(origin.parents[1] != _ROOT for origin in origins)


def _import_of_own_packages(root: str, packages: Sequence[str]) -> Callable[[], None]:
    """A function that a worker calls before Ray puts the driver's directories first on its `sys.path`."""

    # Nested, so that Ray pickles it by value: by reference, it would have to be imported first.
    def import_packages() -> None:
        import importlib
        import sys
        from contextlib import suppress

        sys.path.append(root)  # where the packages are not installed
        with suppress(ImportError):  # a node without them, whose code comes in another way
            for name in packages:
                importlib.import_module(name)
        sys.path.pop()

    return import_packages


def check_reachable(address: str) -> None:
    """Checks that something listens at an address with a port; Ray's clients would retry for minutes.

    Raises:
        ClusterError: nothing does.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise ClusterError(f"{address}: not an address: its port is no number") from None
    if not parts.hostname or port is None:  # such as "auto"
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from None
