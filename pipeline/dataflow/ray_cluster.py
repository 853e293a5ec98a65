"""Connects to the Ray that runs the job: a given cluster, the one of the submitted job, or a local Ray."""

import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config import IN_PROCESS, ConfigError
from pipeline.dataflow.stopping import interrupts_deferred, sigterm_interrupts

#: Address of a Ray that this process starts on its machine.
LOCAL = "local"

#: Default environment variables. Ray reports no usage statistics. Ray's core does not log to the terminal,
#: which shows the progress of the job: errors are raised, and the logs are in Ray's session folder. A local
#: Ray keeps idle workers for a minute, instead of starting a process per chunk.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}

#: Part of the line that Ray's core logs whenever RAY_BACKEND_LOG_LEVEL is set, whatever the level.
_LOG_LEVEL_LINE = b"Set ray log level from environment variable"

_CONNECT_TIMEOUT_S = 10
#: The directory that contains the packages of this project.
_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("cvt", "pipeline", "jobs", "configs")


class ClusterError(ConnectionError):
    """No Ray cluster answers at an address, or the cluster refuses a request."""


@contextmanager
def ray_cluster(address: str | None) -> Iterator[None]:
    """Connects to Ray inside the block, and stops a local Ray afterwards; keeps an existing connection.

    Args:
        address: see `ray_address`.

    Raises:
        ClusterError: no cluster answers at the address.
        ConfigError: the address is `in-process`, which only labeling supports.
    """
    if address == IN_PROCESS:
        raise ConfigError(f"ray.address: only labeling supports {IN_PROCESS!r}; use null or 'local'")
    address = ray_address(address)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == LOCAL and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Otherwise Ray writes a token to the home folder, and every later Ray on this machine requires it.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with interrupts_deferred():  # an interrupted import leaves a broken module
        import ray  # reads its environment variables once, during this import

    if ray.is_initialized():
        yield
        return
    local = {"include_dashboard": False} if address == LOCAL else {}
    check_reachable(address)
    # An interrupt while Ray starts or stops would leave processes behind.
    try:
        with interrupts_deferred() if local else nullcontext():
            init_ray(address, logging_level=logging.ERROR, log_to_driver=False, **local)
        import ray.data  # sets the log level of Ray Data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with sigterm_interrupts():  # ray.init has set another handler
            yield
    finally:
        with interrupts_deferred():
            ray.shutdown()


def ray_address(address: str | None) -> str:
    """Returns the address of the cluster that runs the job.

    Args:
        address: address of a running cluster; None for `RAY_ADDRESS`, which `ray job submit` sets, else
            `local`, which starts a Ray on this machine.
    """
    return address or os.environ.get("RAY_ADDRESS") or LOCAL


def init_ray(address: str, **options: Any) -> None:
    """Calls `ray.init`, so that workers import this project's packages from any working directory.

    On a busy machine, a local Ray may not start in time. Then it is started a second time.
    """
    import ray

    # With Ray Client, the driver runs on the cluster, not in this working directory.
    if not address.startswith("ray://") and _is_shadowed():
        # A runtime environment delays the start of workers, so it is set only where needed.
        options["runtime_env"] = {"worker_process_setup_hook": _make_import_hook(str(_ROOT), _PACKAGES)}
    with _log_level_line_removed():
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray has no narrower type for this error
            if address != LOCAL or "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            ray.init(address=address, **options)


@contextmanager
def _log_level_line_removed() -> Iterator[None]:
    """Removes the line about Ray's log level from standard error.

    Ray has no option for this. Ray's core writes to the file descriptor, so the output is captured there; all
    other lines are written at the end of the block. Python's `sys.stderr` still writes to the terminal.
    """
    # Not closed here: the thread of a progress bar may still hold the stream. Its last reference closes it.
    stream = os.fdopen(os.dup(2), "w", buffering=1)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            with redirect_stderr(stream):
                yield
        finally:
            os.dup2(stream.fileno(), 2)
            captured.seek(0)
            for line in captured:
                if _LOG_LEVEL_LINE not in line:
                    os.write(2, line)


def _is_shadowed() -> bool:
    """Returns whether workers would import other packages of the same names.

    Ray puts the working directory of the driver first on `sys.path` of workers, and the script's directory if
    it is on the driver's `sys.path`.
    """
    script = str(Path(sys.argv[0]).resolve().parent)
    directories = {str(Path.cwd()), *({script} & set(sys.path))}
    found = (PathFinder.find_spec(name, [path]) for path in directories for name in _PACKAGES)
    origins = [Path(spec.origin).resolve() for spec in found if spec is not None and spec.origin]
    return any(origin.parents[1] != _ROOT for origin in origins)


def _make_import_hook(root: str, packages: Sequence[str]) -> Callable[[], None]:
    """Returns a function that a worker calls before Ray changes its `sys.path`."""

    # Nested, so that Ray pickles the function by value: by reference, workers would have to import it first.
    def import_packages() -> None:
        import importlib
        import sys
        from contextlib import suppress

        sys.path.append(root)  # if the packages are not installed
        with suppress(ImportError):  # a node that gets the code in another way
            for name in packages:
                importlib.import_module(name)
        sys.path.pop()

    return import_packages


def check_reachable(address: str) -> None:
    """Checks that a server listens at an address with a port; Ray's clients would retry for minutes.

    Raises:
        ClusterError: no server listens.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise ClusterError(f"{address}: not an address: the port is not a number") from None
    if not parts.hostname or port is None:  # for example "auto"
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from None
