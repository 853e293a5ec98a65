"""The executor without Ray: each thread of this process reads, decodes and classifies one chunk at a time.

An image that crashes its decoder ends the run, and a hung decoder stops its thread.
"""

import os
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.dataflow.resources import ClusterCapacity, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import Stages, call_after
from pipeline.decode import decode_chunk
from pipeline.read import Chunk, Shard

#: Maximum number of results that wait for the consumer.
_MAX_PENDING_RESULTS = 2
#: Total seconds that a stopped run waits for its threads; each thread finishes its chunk.
_JOIN_TIMEOUT_S = 5.0


class LocalExecutor:
    """Runs the stages in threads of this process."""

    def resources(self, request: ResourceRequest) -> Resources:
        """Returns resources for one classifier, on all CPUs or one GPU; readers and decoders as with Ray."""
        cpus = usable_cpus()
        gpus = 0
        if request.classify.device != "cpu":
            import torch

            gpus = min(1, torch.cuda.device_count())
        if request.classify.device == "cuda" and not gpus:
            raise ConfigError(
                "classify.device: 'cuda', but PyTorch finds no GPU on this machine; set 'auto' or 'cpu'"
            )
        classify = request.classify.model_copy(update={"min_actors": 1, "max_actors": 1, "pools": []})
        return choose_resources(replace(request, classify=classify), ClusterCapacity(cpus, gpus, cpus))

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, in any order."""
        yield from _Run(shards, stages, resources).chunks()

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> None:
        """Returns None: metrics need Ray."""


class _Run:
    """The threads of one run."""

    def __init__(self, shards: Sequence[Shard], stages: Stages, resources: Resources) -> None:
        readers = min(resources.readers, max(1, len(shards)))
        count = readers + resources.decoders + stages.classify.concurrent_chunks
        self._decode_options = stages.decode_options if resources.decoders else None
        self._classify = stages.make_classifier(resources)
        self._timeout_s = stages.classify.timeout_s
        self._classifying = threading.Semaphore(stages.classify.concurrent_chunks)
        # Readers share the shards.
        numbered = queue.SimpleQueue[tuple[int, Shard] | None]()
        for item in (*enumerate(shards), *[None] * readers):
            numbered.put(item)
        read = stages.make_read_step(resources)
        self._readers = [(threading.Lock(), read(iter(numbered.get, None))) for _ in range(readers)]
        self._stopped = False
        self._results = queue.Queue[Chunk | BaseException | None](_MAX_PENDING_RESULTS)
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"stages-{i}", daemon=True)
            for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def chunks(self) -> Iterator[Chunk]:
        """Yields labeled chunks until all threads have ended; raises the first exception of a thread."""
        running = len(self._threads)
        try:
            while running:
                result = self._results.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    running -= 1
                else:
                    yield result
        finally:  # each thread finishes its chunk, whose result is discarded
            self._stopped = True
            deadline = time.monotonic() + _JOIN_TIMEOUT_S
            while any(thread.is_alive() for thread in self._threads) and time.monotonic() < deadline:
                with suppress(queue.Empty):
                    self._results.get(timeout=0.05)

    def _work(self, number: int) -> None:
        try:
            for chunk in self._read(number):
                if self._decode_options is not None:
                    chunk = decode_chunk(chunk, self._decode_options)
                with self._classifying, call_after(self._timeout_s, self._report_timeout):
                    classified = self._classify(chunk)
                self._results.put(classified)
        except BaseException as error:
            self._results.put(error)
        self._results.put(None)

    def _report_timeout(self) -> None:
        message = f"classifying a chunk took more than {self._timeout_s:g} s (classify.timeout_s)"
        self._results.put(TimeoutError(message))

    def _read(self, number: int) -> Iterator[Chunk]:
        """Yields chunks of one reader, and then of the others; one thread at a time uses a reader."""
        first = number % len(self._readers)
        for lock, reader in self._readers[first:] + self._readers[:first]:
            while True:
                with lock:
                    chunk = None if self._stopped else next(reader, None)
                if chunk is None:
                    break
                yield replace(chunk, retries={})  # `retry_counts` of this process has them already


def usable_cpus(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Returns the CPUs that the affinity and the quota of a container allow this process."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # ValueError: "max" means no quota
        quota, period = map(int, quota_file.read_text().split())
        return max(1, min(cpus, quota // period))
    return cpus
