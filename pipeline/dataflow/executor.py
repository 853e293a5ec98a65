"""Executors: what runs the stages of a labeling run, on Ray or in threads of this process."""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pipeline.config import IN_PROCESS, ConfigError, RayConfig
from pipeline.dataflow.ray_cluster import ray_cluster
from pipeline.dataflow.resources import Cluster, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import Classifier, Stages
from pipeline.read import Chunk, Shard

if TYPE_CHECKING:
    from pipeline.dataflow.metrics import RunMetrics


#: Results that may wait for whoever takes them.
_WAITING_RESULTS = 2
#: Seconds that a run that is given up waits for its threads in all; each of them finishes its chunk.
_JOIN_S = 5.0


class Executor(Protocol):
    """Runs the stages of a labeling run."""

    def resources(self, request: ResourceRequest) -> Resources:
        """What each stage gets of the CPUs and GPUs there are.

        Raises:
            ConfigError: the request does not fit.
        """

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, without pixels, in any order."""

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> RunMetrics | None:
        """Live metrics of a run that labels `planned` shards; None where they are not collected."""


class LocalExecutor:
    """Runs the stages in threads of this process.

    Each thread reads a chunk, decodes it, classifies it, and takes the next one. Memory holds one chunk per
    thread, and a few results. An image that crashes the process ends the run.
    """

    def resources(self, request: ResourceRequest) -> Resources:
        """One classifier with all CPUs or one GPU; readers and decoders as Ray would have on this machine."""
        cpus = usable_cpus()
        gpus = 0
        if request.classify.device != "cpu":
            import torch

            gpus = min(1, torch.cuda.device_count())
        if request.classify.device == "cuda" and not gpus:
            raise ConfigError("classify.device: 'cuda', but PyTorch finds no GPU on this machine")
        classify = request.classify.model_copy(update={"min_actors": 1, "max_actors": 1})
        return choose_resources(replace(request, classify=classify), Cluster(cpus, gpus, cpus))

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, in any order."""
        readers = min(resources.readers, max(1, len(shards)))
        count = readers + resources.decoders + resources.chunks_at_once
        decode = stages.decoding if resources.decoders else None
        classify, classifying = Classifier(stages, resources), threading.Semaphore(resources.chunks_at_once)
        # Readers share the shards; a reader reads for one thread at a time.
        numbered = queue.SimpleQueue[tuple[int, Shard] | None]()
        for item in (*enumerate(shards), *[None] * readers):
            numbered.put(item)
        read = stages.reading(resources)
        free = queue.SimpleQueue[Iterator[Chunk] | None]()
        for _ in range(readers):
            free.put(read(iter(numbered.get, None)))
        ended = itertools.count(1)

        def label_next() -> Chunk | None:
            """Labels the next chunk of the first reader that is free; returns None after the last chunk."""
            while (reader := free.get()) is not None:
                chunk = next(reader, None)
                if chunk is None:
                    if next(ended) == readers:
                        break
                    continue
                free.put(reader)
                chunk = replace(chunk, retries={})  # this process counts them itself
                decoded = chunk if decode is None else decode(chunk)
                with classifying:
                    return classify(decoded)
            free.put(None)  # for the other threads
            return None

        pool = ThreadPoolExecutor(count, "stages")
        running = {pool.submit(label_next) for _ in range(count + _WAITING_RESULTS)}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if (labeled := future.result()) is not None:
                        running.add(pool.submit(label_next))
                        yield labeled
        finally:
            free.put(None)  # a failed thread may have lost its reader
            pool.shutdown(wait=False, cancel_futures=True)
            wait(running, timeout=_JOIN_S)

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> None:
        """None are collected."""


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: by its affinity, and by the quota of its container (cgroup 1 or 2)."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # ValueError: "max", which is no quota
            quota, period = (int(value) for name in names for value in (cgroup / name).read_text().split())
            if quota > 0:
                return max(1, min(cpus, quota // period))
    return cpus


@contextmanager
def open_executor(settings: RayConfig) -> Iterator[Executor]:
    """Makes the executor that `ray.address` selects; connects to Ray for the length of the block if need be.

    Raises:
        ClusterError: no cluster answers at the address.
    """
    if settings.address == IN_PROCESS:
        yield LocalExecutor()
        return
    with ray_cluster(settings.address):
        # Only now, when its environment is set, is Ray imported.
        from pipeline.dataflow.ray_executor import RayExecutor

        yield RayExecutor(settings)
