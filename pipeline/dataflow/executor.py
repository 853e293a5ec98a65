"""Executors run the stages of a labeling run, on Ray or in this process, behind one interface."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from pipeline.config import IN_PROCESS, RayConfig
from pipeline.dataflow.ray_cluster import LOCAL, ray_address, ray_cluster
from pipeline.dataflow.resources import ResourceRequest, Resources
from pipeline.dataflow.stages import Stages
from pipeline.read import Chunk, Shard

if TYPE_CHECKING:
    from pipeline.dataflow.metrics import RunMetrics


class Executor(Protocol):
    """Runs the stages of a labeling run."""

    def resources(self, request: ResourceRequest) -> Resources:
        """Returns the CPUs, GPUs and memory of each stage.

        Raises:
            ConfigError: the request does not fit the available resources.
        """

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, without pixels, in any order."""

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> RunMetrics | None:
        """Returns the live metrics of a run that labels `planned` shards; None if there are none."""


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
