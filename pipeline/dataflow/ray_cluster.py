"""Connecting to the Ray that runs the job: a given one, the submitted job's own, or a local one."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from pipeline.dataflow.stopping import interrupts_deferred, sigterm_interrupts

#: Set unless the environment says otherwise: nothing is reported to anybody, and the terminal is left to
#: the job's own progress (what fails is raised, and Ray keeps its logs in its session folder). A local Ray
#: keeps workers that wait for the next chunk: it would end them after a second, and start anew for each.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}

_CONNECT_SECONDS = 10


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
    """
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if address == "local" and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # Ray's own token is a file in the home folder, which every later Ray of the machine would ask for.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with interrupts_deferred():  # one that comes between leaves half a module, which the process trips over
        import ray  # reads its variables of the environment now, and never again

    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    check_reachable(address)
    # A Ray that is interrupted while it starts or stops leaves processes behind.
    try:
        with interrupts_deferred() if local else nullcontext():
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
        import ray.data  # sets the level of its logs anew

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with sigterm_interrupts():  # ray.init has set a handler of its own
            yield
    finally:
        with interrupts_deferred():
            ray.shutdown()


def check_reachable(address: str) -> None:
    """Makes sure that something listens at an address, where that tells a port: Ray's clients would try for
    many minutes, or without an end.

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
