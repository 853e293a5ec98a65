"""The executor on a Ray cluster: Ray Data runs the stages.

    read tasks -> decode tasks -> classifier actors -> labeled chunks, to the driver

All settings of Ray Data are in this module.
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

#: Maximum number of read tasks. With more shards, a task reads several, which keeps Ray's planning fast.
MAX_READ_TASKS = 10_000


class ChunkError(RuntimeError):
    """Too many workers died while they processed the same chunk or shard."""


class _Attempts:
    """Counts the attempts per piece of work, because Ray Data retries the work of dead workers forever."""

    def __init__(self) -> None:
        self._started: Counter[str] = Counter()

    def start(self, work: str) -> int:
        """Counts an attempt; returns the number of attempts."""
        self._started[work] += 1
        return self._started[work]

    def finish(self, work: str) -> None:
        """Removes finished work."""
        del self._started[work]


class AttemptLimit:
    """Ends the run if a piece of work has killed too many workers; needs a connection to Ray."""

    def __init__(self, max_attempts: int) -> None:
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
        self._attempts: Any = remote(_Attempts).remote()
        self._max_attempts = max_attempts

    def close(self) -> None:
        """Stops the process of the counter."""
        ray.kill(self._attempts)

    @contextmanager
    def attempt(self, work: str) -> Iterator[None]:
        """Counts an attempt at a piece of work; raises `ChunkError` after too many attempts."""
        if ray.get(self._attempts.start.remote(work)) > self._max_attempts:
            raise ChunkError(
                f"{work}: {self._max_attempts} workers died; ray.task_retries limits the attempts"
            )
        yield
        self._attempts.finish.remote(work)


class ShardSource(Datasource):
    """The shards of a plan as a data source of Ray Data; each row of a block is a chunk.

    A retried read yields the same chunks: the plan is passed by value, and versions are pinned.
    """

    def __init__(self, plan: Sequence[Shard], step: ray.ObjectRef[ReadStep], limit: AttemptLimit) -> None:
        """Creates the source; `step` is a reference, as 22,000 class names are too large for each task."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan = plan
        self._read = functools.partial(_read_shards, step=step, limit=limit)

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns None: the size is unknown before reading."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Returns one task per shard, or per group of shards if there are more than `MAX_READ_TASKS`."""
        numbered = list(enumerate(self._plan))
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        size = math.ceil(len(numbered) / MAX_READ_TASKS)
        return [
            ReadTask(functools.partial(self._read, numbered[start : start + size]), metadata)
            for start in range(0, len(numbered), size)
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
    block: pa.Table, step: Callable[[Chunk], Chunk], limit: AttemptLimit, action: str
) -> Iterator[pa.Table]:
    for chunk in Chunk.from_block(block):
        with limit.attempt(f"{action} shard {chunk.shard} of the plan, from sample {chunk.start}"):
            result = step(chunk).to_block()
        yield result


def _decode_block(block: pa.Table, step: DecodeStep, limit: AttemptLimit) -> Iterator[pa.Table]:
    """Decodes; Ray shows the name of this function in its dashboard and in process titles."""
    return _process(block, step, limit, "decoding")


class _ClassifierActor:
    """Holds a classifier during the run."""

    def __init__(self, stages: ray.ObjectRef[Stages], resources: Resources, limit: AttemptLimit) -> None:
        self._classify = Classifier(ray.get(stages), resources)
        self._limit = limit

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return _process(block, self._classify, self._limit, "classifying")


class RayExecutor:
    """Runs the stages on the connected Ray cluster."""

    def __init__(self, settings: RayConfig) -> None:
        self._settings = settings

    def resources(self, request: ResourceRequest) -> Resources:
        """Returns the resources of the stages on the current cluster."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cluster = ClusterCapacity(
            cpus=sum(node.get("CPU", 0.0) for node in nodes),
            gpus=sum(node.get("GPU", 0.0) for node in nodes),
            node_cpus=max(node.get("CPU", 0.0) for node in nodes),
            node_memory=min(node.get("memory", math.inf) for node in nodes),
        )
        return choose_resources(request, cluster)

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> RunMetrics:
        """Returns metrics for Prometheus, which Ray's agents export."""
        return RunMetrics(dataset, model, planned, batch_size)

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, in any order."""
        settings = self._settings
        _set_context(settings)
        limit = AttemptLimit(settings.task_retries + 1)
        source = ShardSource(shards, ray.put(stages.make_read_step(resources)), limit)
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
                fn_args=(stages.make_decode_step(), limit),
                num_cpus=resources.decode_cpus,
                memory=resources.decode_memory,
            )
        classified = chunks.map_batches(
            _ClassifierActor,
            # Put once, so that the weights cross the network once per node and not once per actor.
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
        # Prefetching would delay each result until the next one has arrived.
        try:
            for block in classified.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                yield from Chunk.from_block(block)
        finally:
            limit.close()


def _set_context(settings: RayConfig) -> None:
    context = DataContext.get_current()
    # Ray Data must not merge or split blocks: each block is one chunk.
    context.target_max_block_size = 1
    # Without dropped blocks, no label is lost in a run that succeeds.
    context.max_errored_blocks = 0
    context.execution_no_progress_timeout_s = settings.no_progress_timeout_s
    context.override_object_store_memory_limit_fraction = settings.object_store_fraction
    context.downstream_capacity_backpressure_ratio = settings.backpressure_ratio
    # A machine that is removed while an actor starts there must not end the job.
    context.max_consecutive_actor_init_deaths = settings.actor_start_retries
    # The job shows its own progress.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
