"""The executor on a Ray cluster: Ray Data runs read tasks, decode tasks and classifier actors."""

import logging
import math
import os
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import ActorDiedError

from pipeline.attempts import Attempt, Attempts
from pipeline.config import ConfigError, RayConfig
from pipeline.dataflow.metrics import RunMetrics
from pipeline.dataflow.resources import ResourceRequest, Resources, choose_pools, matches
from pipeline.dataflow.shard_queue import ShardQueue
from pipeline.dataflow.stages import Classifier, ReadStep, Stages, call_after
from pipeline.decode import CHUNK_TIMEOUTS, DecodeOptions, decode_chunk, hide_pillow_warnings
from pipeline.decode.isolated import decode_in_child, decode_or_die
from pipeline.read import NO_SAMPLES, Chunk, Shard, failed_chunk

logger = logging.getLogger("cvt_label")

#: Maximum seconds for an execution of Ray Data to end: it may be starting a process.
_JOIN_TIMEOUT_S = 60.0
#: Maximum number of read tasks. With more shards, a task reads several, which keeps Ray's planning fast.
MAX_READ_TASKS = 10_000

#: Reads numbered shards to blocks in a read task.
ShardReader = Callable[[Sequence[tuple[int, Shard]]], Iterator[pa.Table]]


def _on_this_node() -> dict[str, Any]:
    """Returns options of an actor on the driver's node, so that the loss of another node keeps its state."""
    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}


def count_attempts(max_attempts: int) -> Any:
    """Returns an actor of `Attempts`, whose process runs until `ray.kill`."""
    remote = ray.remote(**_on_this_node(), max_restarts=-1, max_task_retries=-1)
    return remote(Attempts).remote(max_attempts)


@contextmanager
def _attempt(attempts: Any, work: str) -> Iterator[Attempt]:
    """Counts an attempt at a piece of work. Work with an error is never finished: it keeps its error."""
    worker = f"process {os.getpid()} on {ray.util.get_node_ip_address()}"
    attempt: Attempt = ray.get(attempts.start.remote(work, worker))
    yield attempt
    if attempt.error is None:
        attempts.finish.remote(work)


class ShardSource(Datasource):
    """The shards of a plan as a data source of Ray Data; each row of a block is a chunk.

    A retried read yields the same chunks: the plan is passed by value, and versions are pinned.
    """

    def __init__(self, plan: Sequence[Shard], read: ShardReader, shards_per_task: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._plan, self._read = plan, read
        self._shards_per_task = max(shards_per_task, math.ceil(len(plan) / MAX_READ_TASKS))
        self.tasks = math.ceil(len(plan) / self._shards_per_task)

    def estimate_inmemory_data_size(self) -> int | None:
        """Returns None: the size is unknown before reading."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Returns one task per `shards_per_task` shards, but at most `MAX_READ_TASKS` tasks."""
        numbered = list(enumerate(self._plan))
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        size = self._shards_per_task
        return [
            ReadTask(partial(self._read, numbered[start : start + size]), metadata)
            for start in range(0, len(numbered), size)
        ]


def _read_taken(
    own: Sequence[tuple[int, Shard]], queue: Any, pool: int, read: ShardReader
) -> Iterator[pa.Table]:
    """Reads the shards that the queue gives to this task, which the first of its own shards identifies.

    A task that waits for shards in `ray.get` keeps no CPU.
    """
    yield from read(ray.get(queue.take.remote(pool, own[0][0], len(own))))


def read_shards(
    shards: Sequence[tuple[int, Shard]], step: ray.ObjectRef[ReadStep], attempts: Any
) -> Iterator[pa.Table]:
    """Reads shards one after another. A shard that kills its workers becomes an error."""
    read = ray.get(step)
    for number, shard in shards:
        work = f"reading shard {number} of the plan"
        with _attempt(attempts, work) as attempt:
            chunks = read([(number, shard)])
            if attempt.error is not None:
                chunks = iter([failed_chunk(Chunk(number, 0, NO_SAMPLES), attempt.error)])
            for count, chunk in enumerate(_repeat_last(chunks, attempt.results), start=1):
                ray.get(attempts.add_result.remote(work, count))
                yield chunk.to_block()


def _repeat_last(chunks: Iterator[Chunk], results: int) -> Iterator[Chunk]:
    """Yields chunks, and the last one repeatedly: at least `results` chunks, and one more if it is an error.

    Ray ignores as many results of a retry as earlier attempts have delivered, but a retry can fail earlier.
    """
    for chunk in chunks:
        yield chunk
        results -= 1
    yield from [chunk] * (results + (chunk.error is not None))


def read_shards_in_turn(
    shards: Sequence[tuple[int, Shard]], step: ray.ObjectRef[ReadStep], attempts: Any
) -> Iterator[pa.Table]:
    """Yields a chunk of each shard in turn."""
    for blocks in zip_longest(*(read_shards([shard], step, attempts) for shard in shards)):
        yield from (block for block in blocks if block is not None)


def _process(
    block: pa.Table, step: Callable[[Chunk, Attempt], Chunk], attempts: Any, action: str
) -> Iterator[pa.Table]:
    """Processes a chunk. A chunk that kills its workers becomes the error of its shard."""
    for chunk in Chunk.from_block(block):
        work = f"{action} shard {chunk.shard} of the plan, from sample {chunk.start}"
        with _attempt(attempts, work) as attempt:
            if attempt.error is not None and chunk.error is None:
                chunk = failed_chunk(chunk, attempt.error)
            result = step(chunk, attempt).to_block()
        yield result


def decode_block(block: pa.Table, options: DecodeOptions, attempts: Any) -> Iterator[pa.Table]:
    """Decodes; Ray shows the name of this function in its dashboard and in process titles."""
    hide_pillow_warnings()

    def decode(chunk: Chunk, attempt: Attempt) -> Chunk:
        # After the first attempt: an image may have killed the worker.
        return decode_chunk(chunk, options, decode_or_die if attempt.number == 1 else decode_in_child)

    return _process(block, decode, attempts, "decoding")


class _ClassifierActor:
    """Holds a classifier during the run."""

    def __init__(self, stages: ray.ObjectRef[Stages], resources: Resources, attempts: Any, join: Any) -> None:
        hide_pillow_warnings()  # of the GPU decoder
        classifier = ray.get(stages).make_classifier(resources)
        self._step = partial(classify_or_die, classifier=classifier)
        self._attempts = attempts
        if join is not None:
            join(ray.get_runtime_context().get_actor_id())

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        return _process(block, self._step, self._attempts, "classifying")


def classify_or_die(chunk: Chunk, attempt: Attempt, classifier: Classifier) -> Chunk:
    """Classifies a chunk; after the timeout, logs the cause and ends this process: a model can hang."""
    if attempt.number > 1 and chunk.pixels is None:  # decoding on the GPU may have ended the worker
        chunk = decode_chunk(chunk, classifier.decode_options, decode_in_child)

    def die() -> None:
        limit = f"more than {classifier.timeout_s:g} s (classify.timeout_s)"
        logger.error("classifying a chunk of shard %d took %s; this worker ends", chunk.shard, limit)
        os._exit(1)

    with call_after(classifier.timeout_s, die):
        return classifier(chunk)


class RayExecutor:
    """Runs the stages on the connected Ray cluster."""

    def __init__(self, settings: RayConfig) -> None:
        self._settings = settings

    def resources(self, request: ResourceRequest) -> Resources:
        """Returns the resources of the stages on the current cluster."""
        selector = self._settings.label_selector
        nodes = [node for node in ray.nodes() if node["Alive"] and matches(node["Labels"], selector)]
        return choose_pools(request, nodes)

    def metrics(self, dataset: str, model: str, planned: int, batch_size: int) -> RunMetrics:
        """Returns metrics for Prometheus, which Ray's agents export."""
        return RunMetrics(dataset, model, planned, batch_size)

    def label(
        self, shards: Sequence[Shard], stages: Stages, resources: Resources
    ) -> Generator[Chunk, None, None]:
        """Yields the labeled chunks of all shards, in any order."""
        settings = self._settings
        _set_context(settings, stages)
        attempts = count_attempts(settings.task_retries + 1)
        pools = (resources, *resources.helpers)
        queue: Any = None
        if resources.helpers:
            queue = ray.remote(**_on_this_node())(ShardQueue).remote(shards, len(pools))
        labeled = []
        for number, pool in enumerate(pools):
            step = ray.put(stages.make_read_step(pool))
            join, read = None, partial(read_shards, step=step, attempts=attempts)
            if queue is not None:
                join = partial(queue.join.remote, number)
                read = partial(_read_taken, queue=queue, pool=number, read=read)
            labeled.append(_label_source(ShardSource(shards, read), stages, pool, attempts, join))
        # Prefetching would delay each result until the next one has arrived.
        blocks: Any = iter(
            reduce(Dataset.union, labeled).iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            )
        )
        try:
            for block in blocks:
                for chunk in Chunk.from_block(block):
                    uri = shards[chunk.shard].uri
                    if chunk.error is not None and not chunk.error.startswith(uri):  # the workers died
                        chunk = replace(chunk, error=f"{uri}: {chunk.error}")
                    if queue is not None and (chunk.total is not None or chunk.error is not None):
                        queue.finish.remote(chunk.shard)
                    yield chunk
        except ActorDiedError as error:  # has only the text of the exception in a classifier
            if found := re.search(rf"^\S+\.{ConfigError.__name__}: (.+)$", str(error), re.MULTILINE):
                raise ConfigError(found[1]) from error
            raise
        finally:
            blocks.close()
            _join_executions()
            ray.kill(attempts)
            if queue is not None:
                ray.kill(queue)


def _join_executions() -> None:
    """Waits for the threads of ended executions; Ray Data waits for some of them, and for two seconds.

    Ray ends the process, with exit status 1 and no message, if a thread uses Ray after `ray.shutdown`, or
    deletes a reference to an object.
    """
    for thread in threading.enumerate():
        if thread.name.startswith(("StreamingExecutor", "iter_threaded")):
            thread.join(_JOIN_TIMEOUT_S)


def _label_source(
    source: ShardSource, stages: Stages, resources: Resources, attempts: Any, join: Any
) -> Dataset:
    """Returns the labeled chunks of a source, by one pool of classifiers, each of which calls `join`."""
    chunks = ray.data.read_datasource(
        source,
        num_cpus=stages.read_options.read.num_cpus,
        concurrency=resources.readers,
        override_num_blocks=source.tasks,
        memory=resources.read_memory,
    )
    if resources.decoders:
        chunks = chunks.map_batches(
            decode_block,
            batch_size=None,
            batch_format="pyarrow",
            fn_args=(stages.decode_options, attempts),
            num_cpus=resources.decode_cpus,
            memory=resources.decode_memory,
        )
    labeled: Dataset = chunks.map_batches(
        _ClassifierActor,
        # Put once, so that the weights cross the network once per node and not once per actor.
        fn_constructor_args=(ray.put(stages), resources, attempts, join),
        batch_size=1,  # a chunk; with GPUs, Ray refuses None
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=resources.min_actors,
            max_size=resources.max_actors,
            initial_size=resources.initial_actors,
            max_tasks_in_flight_per_actor=2 * stages.classify.concurrent_chunks,
            max_concurrent_calls_per_actor=stages.classify.concurrent_chunks,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.classify_cpus,
        num_gpus=resources.classify_gpus or None,
        label_selector=dict(resources.label_selector) or None,
    )
    return labeled


def _set_context(settings: RayConfig, stages: Stages) -> None:
    context = DataContext.get_current()
    # Ray Data must not merge or split blocks: each block is one chunk.
    context.target_max_block_size = 1
    # Without dropped blocks, no label is lost in a run that succeeds.
    context.max_errored_blocks = 0
    # A chunk whose every attempt takes too long must not end the job.
    attempt = CHUNK_TIMEOUTS * stages.decode.timeout_s + stages.classify.timeout_s
    all_attempts = (settings.task_retries + 1) * attempt
    context.execution_no_progress_timeout_s = max(settings.no_progress_timeout_s, all_attempts)
    # A machine that is removed while an actor starts there must not end the job.
    context.max_consecutive_actor_init_deaths = settings.actor_start_retries
    context.execution_options.label_selector = settings.label_selector
    # The job shows its own progress.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
