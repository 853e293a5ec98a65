"""The dataflow: how reading, decoding and classifying are laid over a Ray cluster by Ray Data.

    read tasks -> decode tasks -> classifier actors -> results of chunks, to the driver

The stages are functions of chunks that know nothing of Ray; here they are given their resources.
Whatever is set of Ray Data is set here.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from cvt.preprocessing import Preprocessor
from pipeline.classify import Thumbnails, classify
from pipeline.config import Config, RayConfig
from pipeline.dataflow.gpu_meter import GpuMeter
from pipeline.dataflow.resources import Cluster, Resources, choose_resources
from pipeline.decode import decode_chunk
from pipeline.predictions import PredictionOptions
from pipeline.read import Chunk, ReadOptions, Shard, cut_into_chunks, read_samples
from pipeline.statistics import CLASSIFY, DECODE, STORAGE, Meter
from pipeline.storage import Storage, StorageError, faults

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint
    from cvt.inference import Engine
    from pipeline.decode.gpu import GpuDecoder


#: Most read tasks of a run: beyond, a task reads several shards, and planning stays small.
MAX_READ_TASKS = 10_000


def cluster_resources(config: Config, checkpoint: Checkpoint) -> Resources:
    """`choose_resources` for the Ray that this process is connected to."""
    from cvt.counting import count_macs

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cluster = Cluster(
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        node_cpus=max(node.get("CPU", 0.0) for node in nodes),
        node_memory=min(node.get("memory", math.inf) for node in nodes),
    )
    size = checkpoint.preprocessor.size
    return choose_resources(config, cluster, count_macs(checkpoint.model.config, size, size), size)


class ShardSource(Datasource):
    """The shards of a plan as Ray Data's source, one row of a block a chunk.

    Pure: the plan comes by value, versions pinned, so that a retried read yields the same chunks.
    """

    def __init__(
        self,
        plan: Sequence[Shard],
        storage: Storage,
        options: ray.ObjectRef,
        max_images: int,
        max_bytes: int,
    ) -> None:
        """`options` are ReadOptions, put once: with 22,000 class names they are too large for each task."""
        super().__init__()
        self._plan = plan
        self._read = functools.partial(
            _read_shards,
            storage=storage,
            options=options,
            max_images=max_images,
            max_bytes=max_bytes,
        )

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
    shards: Sequence[tuple[int, Shard]],
    *,
    storage: Storage,
    options: ray.ObjectRef,
    max_images: int,
    max_bytes: int,
) -> Iterator[pa.Table]:
    known: ReadOptions = ray.get(options)
    with suppress(StorageError):  # what reads the shard meets it again, and says so
        storage.connect(shards[0][1].uri)
    meter, before = Meter(STORAGE), faults()
    for number, shard in shards:
        chunks = cut_into_chunks(read_samples(storage, shard, known), number, max_images, max_bytes)
        while True:
            with meter:
                chunk = next(chunks, None)
            if chunk is None:
                break
            now = faults()
            read = pc.sum(pc.binary_length(chunk.samples["image"])).as_py() or 0
            spent = meter.taken(images=chunk.samples.num_rows, bytes=read)
            yield replace(chunk, faults=now - before, spent=spent).to_block()
            before = now


def _decode_block(
    block: pa.Table, preprocessor: Preprocessor, max_pixels: int, fast: bool
) -> Iterator[pa.Table]:
    meter = Meter(DECODE)
    for chunk in Chunk.from_block(block):
        with meter:
            decoded = decode_chunk(chunk, preprocessor, max_pixels, fast)
        yield replace(decoded, spent={**chunk.spent, **_decoding(meter, chunk, decoded)}).to_block()


def _decoding(meter: Meter, chunk: Chunk, decoded: Chunk) -> dict[str, float]:
    assert decoded.pixels is not None
    return meter.taken(images=chunk.samples["error"].null_count, bytes=decoded.pixels.nbytes)


def warm_engine(checkpoint: Checkpoint, config: Config, resources: Resources) -> Engine:
    """The engine of a classifier, ready for its first chunk."""
    from cvt.inference.engine import Engine  # with torch, which readers and decoders don't need

    engine = Engine(
        checkpoint.model,
        checkpoint.preprocessor,
        device=resources.device,
        precision=config.model.precision,
        runtime=config.classify.runtime,
        batch_size=resources.batch_size,
        threads=resources.threads,
    )
    engine.warm_up()
    return engine


class _ClassifierActor:
    """Holds the model on its device, for as long as the run lasts."""

    def __init__(
        self,
        checkpoint: ray.ObjectRef,
        options: PredictionOptions,
        config: Config,
        resources: Resources,
    ) -> None:
        loaded: Checkpoint = ray.get(checkpoint)
        self._options = options
        self._decoder: GpuDecoder | None = None
        if not resources.decoders:  # before the engine, which may take a minute to get ready
            from pipeline.decode.gpu import GpuDecoder

            self._decoder = GpuDecoder(
                loaded.preprocessor,
                config.input.max_image_pixels,
                resources.device,
                threads=max(2, int(resources.classify_cpus)),
            )
            self._decode_meter = Meter(DECODE)
        self._engine = warm_engine(loaded, config, resources)
        self._thumbnails = None
        if config.report.gallery:
            self._thumbnails = Thumbnails(
                config.report.gallery, config.report.thumbnail_side, len(options.labels)
            )
        self._gpu_meter = GpuMeter() if resources.device == "cuda" else None
        self._meter = Meter(CLASSIFY)

    def __call__(self, block: pa.Table) -> Iterator[pa.Table]:
        for chunk in Chunk.from_block(block):
            decoded, spent = chunk, {}
            if self._decoder is not None:
                with self._decode_meter:
                    decoded = self._decoder(chunk)
                spent = _decoding(self._decode_meter, chunk, decoded)
            images = decoded.samples["error"].null_count
            with self._meter:
                classified = classify(decoded, self._engine, self._options)
                if self._thumbnails is not None:
                    classified = self._thumbnails.added(decoded, classified)
            spent |= decoded.spent
            spent |= self._meter.taken(images=images, bytes=classified.samples.nbytes)
            if self._gpu_meter is not None:
                spent |= self._gpu_meter.taken()
            yield replace(classified, spent=spent).to_block()


def label_chunks(
    plan: Sequence[Shard],
    storage: Storage,
    read_options: ReadOptions,
    checkpoint: Checkpoint,
    options: PredictionOptions,
    config: Config,
    resources: Resources,
) -> Generator[Chunk, None, None]:
    """Labels the plan's shards; yields their chunks as they are done, in any order, without pixels."""
    _set_context(config.ray)
    source = ShardSource(
        plan, storage, ray.put(read_options), resources.chunk_images, config.read.chunk_bytes
    )
    chunks = ray.data.read_datasource(
        source,
        num_cpus=resources.read_cpus,
        concurrency=resources.readers,
        override_num_blocks=source.tasks,
        memory=resources.read_memory,
        ray_remote_args={"max_retries": config.ray.task_retries},
    )
    if resources.decoders:
        chunks = chunks.map_batches(
            _decode_block,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={
                "preprocessor": checkpoint.preprocessor,
                "max_pixels": config.input.max_image_pixels,
                "fast": config.decode.quality == "fast",
            },
            num_cpus=resources.decode_cpus,
            memory=resources.decode_memory,
            max_retries=config.ray.task_retries,
        )
    # Put once, so that the weights cross the network once a node, and not once an actor.
    reference = ray.put(checkpoint)
    classified = chunks.map_batches(
        _ClassifierActor,
        fn_constructor_args=(reference, options, config, resources),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=resources.min_actors,
            max_size=resources.max_actors,
            max_tasks_in_flight_per_actor=max(config.ray.chunks_in_flight, config.classify.chunks_at_once),
            max_concurrent_calls_per_actor=config.classify.chunks_at_once,
            enable_true_multi_threading=True,
        ),
        num_cpus=resources.classify_cpus,
        num_gpus=resources.classify_gpus or None,
        # A chunk that kills its actor must end the job, not restart it for ever.
        max_task_retries=config.ray.actor_task_retries,
    )
    # Prefetching would hold each result back until the next one is there.
    for block in classified.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from Chunk.from_block(block)


# `max_retries` and `max_task_retries` have no other way into Ray Data yet; its own default is for ever.
warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")


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
