"""Executors run the stages of a labeling run, on Ray or in this process, behind one interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from pipeline.config import IN_PROCESS, RayConfig
from pipeline.dataflow.ray_cluster import LOCAL, ray_address, ray_cluster

if TYPE_CHECKING:
    from pipeline.dataflow.local_executor import LocalExecutor
    from pipeline.dataflow.ray_executor import RayExecutor

#: Runs the stages of a labeling run.
Executor: TypeAlias = "LocalExecutor | RayExecutor"


def without_cluster(settings: RayConfig) -> bool:
    """Returns whether the settings leave it open where to run, and no Ray is running for this process."""
    is_connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    return settings.address is None and ray_address(None) == LOCAL and not is_connected


@contextmanager
def open_executor(settings: RayConfig) -> Iterator[Executor]:
    """Returns the executor that `ray.address` selects; stays connected to Ray inside the block.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    if settings.address == IN_PROCESS:
        from pipeline.dataflow.local_executor import LocalExecutor

        yield LocalExecutor()
        return
    with ray_cluster(settings.address):
        # `ray_cluster` sets the environment that Ray reads when it is imported.
        from pipeline.dataflow.ray_executor import RayExecutor

        yield RayExecutor(settings)
