"""The executor on a Ray cluster: Ray Data runs the stages.

    read tasks -> decode tasks -> classifier actors -> labeled chunks, to the driver

Whatever is set of Ray Data is set here.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.config import RayConfig
from pipeline.dataflow.metrics import RunMetrics
from pipeline.dataflow.resources import ClusterCapacity, ResourceRequest, Resources, choose_resources
from pipeline.dataflow.stages import Classifier, DecodeStep, ReadStep, Stages
from pipeline.read import Chunk, Shard

#: Most read tasks of a run: beyond, a task reads several shards, and planning stays small.
MAX_READ_TASKS = 10_000


class ChunkError(RuntimeError):
    """Workers died again and again while they worked on the same chunk or shard."""


class _Attempts:
    """Counts the attempts at each piece of work, since Ray Data repeats the work of dead workers for ever."""

    def __init__(self) -> None:
        self._started: Counter[str] = Counter()

    def start(self, work: str) -> int:
        """Counts an attempt; returns how many there are."""
        self._started[work] += 1
        return self._started[work]

    def finish(self, work: str) -> None:
        """Forgets work that is done."""
        del self._started[work]


class AttemptLimit:
    """Ends the run where a piece of work has killed too many workers; Ray must be connected."""

    def __init__(self, most: int) -> None:
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._attempts: Any = remote(_Attempts).remote()
        self._most = most

    def close(self) -> None:
        """Ends the counter's process."""
        ray.kill(self._attempts)

    @contextmanager
    def attempt(self, work: str) -> Iterator[None]:
        """Does a piece of work; raises `ChunkError` where that was attempted too often."""
        if ray.get(self._attempts.start.remote(work)) > self._most:
            raise ChunkError(f"{work}: {self._most} workers died at it; ray.task_retries limits the attempts")
        yield
        self._attempts.finish.remote(work)


class ShardSource(Datasource):
    """The shards of a plan as Ray Data's source, one row of a block a chunk.

    Pure: the plan comes by value, versions pinned, so that a retried read yields the same chunks.
    """

    def __init__(self, plan: Sequence[Shard], step: ray.ObjectRef[ReadStep], limit: AttemptLimit) -> None:
        """`step` is put once: with 22,000 class names it is too large for each task."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        self._read = functools.partial(_read_shards, step=step, limit=limit)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before reading."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """One task a shard, or a few shards where there are very many."""
        numbered = list(enumerate(self._plan))
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        each = math.ceil(len(numbered) / MAX_READ_TASKS)
        return [
            ReadTask(functools.partial(self._read, numbered[at : at + each]), metadata)
            for at in range(0, len(numbered), each)
        ]

    @property
    def tasks(self) -> int:
        """Number of read tasks."""
        return math.ceil(len(self._plan) / math.ceil(len(self._plan) / MAX_READ_TASKS))


def _read_shards(
    shards: Sequence[tuple[int, Shard]], step: ray.ObjectRef[ReadStep], limit: AttemptLimit
) -> Iterator[pa.Table]:
    with limit.attempt(f"reading {shards[0][1].uri}"):
        for chunk in ray.get(step)(shards):
            yield chunk.to_block()


def _process(
    block: pa.Table, step: Callable[[Chunk], Chunk], limit: AttemptLimit, doing: str
) -> Iterator[pa.Table]:
    for chunk in Chunk.from_block(block):
        with limit.attempt(f"{doing} shard {chunk.shard} of the plan, from sample {chunk.start}"):
            result = step(chunk).to_block()
        yield result


def _decode_block(block: pa.Table, step: DecodeStep, limit: AttemptLimit) -> Iterator[pa.Table]:
    """Decodes; Ray shows this name in its dashboard and in the titles of processes."""
    return _process(block, step, limit, "decoding")


class _ClassifierActor:
    """Holds a classifier for as long as the run lasts."""

    def __init__(self, stages: ray.ObjectRef[Stages], resources: Resources, limit: AttemptLimit) -> None:
        self._classify = Classifier(ray.get(stages), resources)
        self._limit = limit

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return _process(block, self._classify, self._limit, "classifying")


class RayExecutor:
    """Runs the stages on the Ray that this process is connected to."""

    def __init__(self, settings: RayConfig) -> None:
        self._settings = settings

    def resources(self, request: ResourceRequest) -> Resources:
        """What the stages get of the cluster as it is now."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cluster = ClusterCapacity(
            cpus=sum(node.get("CPU", 0.0) for node in nodes),
            gpus=sum(node.get("GPU", 0.0) for node in nodes),
            node_cpus=max(node.get("CPU", 0.0) for node in nodes),
            node_memory=min(node.get("memory", math.inf) for node in nodes),
        )
        return choose_resources(request, cluster)

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> RunMetrics:
        """Metrics for Prometheus, which Ray's agents export."""
        return RunMetrics(dataset, model, planned, batch_size)

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, in any order."""
        settings = self._settings
        _set_context(settings)
        limit = AttemptLimit(settings.task_retries + 1)
        source = ShardSource(shards, ray.put(stages.reading(resources)), limit)
        chunks = ray.data.read_datasource(
            source,
            num_cpus=resources.read_cpus,
            concurrency=resources.readers,
            override_num_blocks=source.tasks,
            memory=resources.read_memory,
        )
        if resources.decoders:
            chunks = chunks.map_batches(
                _decode_block,
                batch_size=None,
                batch_format="pyarrow",
                fn_args=(stages.decoding, limit),
                num_cpus=resources.decode_cpus,
                memory=resources.decode_memory,
            )
        classified = chunks.map_batches(
            _ClassifierActor,
            # Put once, so that the weights cross the network once a node, and not once an actor.
            fn_constructor_args=(ray.put(stages), resources, limit),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=resources.min_actors,
                max_size=resources.max_actors,
                max_tasks_in_flight_per_actor=max(settings.chunks_in_flight, resources.concurrent_chunks),
                max_concurrent_calls_per_actor=resources.concurrent_chunks,
                enable_true_multi_threading=True,
            ),
            num_cpus=resources.classify_cpus,
            num_gpus=resources.classify_gpus or None,
        )
        # Prefetching would hold each result back until the next one is there.
        try:
            for block in classified.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from Chunk.from_block(block)
        finally:
            limit.close()


def _set_context(settings: RayConfig) -> None:
    context = DataContext.get_current()
    # Every block that a stage yields stays the block that the next stage sees: one chunk.
    context.target_max_block_size = 1
    # A dropped block would be labels lost while the job succeeds.
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = settings.no_progress_timeout_s
    context.override_object_store_memory_limit_fraction = settings.object_store_fraction
    context.downstream_capacity_backpressure_ratio = settings.backpressure_ratio
    # A machine that is taken away while an actor starts there is no reason to end the job.
    context.max_consecutive_actor_init_deaths = settings.actor_start_retries
    # The job shows its own progress, by what is committed.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
