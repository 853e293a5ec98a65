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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from cvt.preprocessing import Preprocessor
from pipeline.chunks import Chunk, cut_into_chunks
from pipeline.classifying import PredictionOptions, classify
from pipeline.config import Config, ConfigError, RayConfig
from pipeline.decoding import decode_chunk
from pipeline.gallery import Thumbnails
from pipeline.reading import ReadOptions, read_samples
from pipeline.retrying import faults
from pipeline.shards import Shard
from pipeline.stages import CLASSIFY, DECODE, STORAGE, GpuMeter, Meter
from pipeline.storage import Storage, StorageError

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint
    from cvt.engine import Engine
    from pipeline.gpu_decoding import GpuDecoder

#: Most read tasks of a run: beyond, a task reads several shards, and planning stays small.
MAX_READ_TASKS = 10_000

# Multiply-accumulates of a chunk, by what classifies it.
_CHUNK_MACS = {"cpu": 600_000_000_000, "cuda": 4_800_000_000_000}
_CHUNK_PIXEL_BYTES = 160_000_000
_LEAST_CHUNK_IMAGES, _MOST_CHUNK_IMAGES = 16, 4096

# Of a batch, in which CvT-13 at 224 pixels has 64 images; a small model is a sixth faster with 256.
_BATCH_MACS = 300_000_000_000
_LEAST_BATCH, _MOST_BATCH = 64, 256


@dataclass(frozen=True)
class Resources:
    """What each stage gets of the cluster; decided once, and written to the run record.

    The stages' CPUs are fractions that fit together with room to spare, and readers are capped: a
    reader that waits for room downstream keeps its CPU, and must not starve the stage it waits for.
    `decoders` is how many decode tasks find room beside all others, none where classifiers decode;
    memory is in bytes.
    """

    device: str
    chunk_images: int
    batch_size: int
    read_cpus: float
    read_memory: int
    readers: int
    decode_cpus: float
    decode_memory: int
    decoders: int
    classify_cpus: float
    classify_gpus: float
    min_actors: int
    max_actors: int
    threads: int | None


@dataclass(frozen=True)
class Cluster:
    """CPUs and GPUs of a cluster, CPUs of its largest node, and bytes of memory of its smallest."""

    cpus: float
    gpus: float
    node_cpus: float
    node_memory: float = math.inf


def choose_resources(config: Config, cluster: Cluster, macs: int, size: int) -> Resources:
    """Fills in what the configuration leaves to the cluster.

    Args:
        config: the job's configuration.
        cluster: that it is to run on.
        macs: multiply-accumulates of one image.
        size: of the model's images, in pixels.

    Raises:
        ConfigError: the actors don't fit into the cluster, and `max_actors` doesn't say that it grows.
    """
    classify, read, decode = config.classify, config.read, config.decode
    readers = read.concurrency or max(1, min(32, int(cluster.cpus // 4) or int(cluster.cpus // 2)))
    on_gpu = classify.device == "cuda" or (
        cluster.gpus > 0 and classify.device == "auto" and classify.runtime != "openvino"  # which is for CPUs
    )
    decodes_apart = decode.resolved_device(classify.device) == "cpu"
    decode_cpus = (decode.num_cpus or _decode_cpus(cluster.node_cpus)) if decodes_apart else 0.0
    cpus_left = cluster.cpus - decode_cpus - readers * read.num_cpus
    if on_gpu:
        actor_gpus = classify.num_gpus or 1.0
        actor_cpus = classify.num_cpus or (1.0 if decodes_apart else 2.0)  # what the GPU leaves to it
        room = math.floor(min(cluster.gpus / actor_gpus, cpus_left / actor_cpus))
    else:
        actor_gpus = 0.0
        actor_cpus = classify.num_cpus or _share_of_node(cluster.node_cpus, decode_cpus + read.num_cpus)
        room = math.floor(cpus_left / actor_cpus)
    if classify.max_actors is None and room < classify.min_actors:
        raise ConfigError(
            f"classify.min_actors: {classify.min_actors} classifiers don't fit beside readers and decoders "
            f"into the cluster's {cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs "
            "(a cluster that grows needs classify.max_actors)"
        )
    max_actors = classify.max_actors or room
    threads = classify.threads
    if not on_gpu and threads is None:
        # A classifier that is alone on its machine gets all of it: decoding is a small part.
        threads = int(cluster.node_cpus) if max_actors == 1 else math.ceil(actor_cpus)
    chunk_images = read.chunk_images or _chunk_images(macs, size, on_gpu)
    room_for_decoders = cpus_left + decode_cpus - min(max_actors, room) * actor_cpus
    most_memory = cluster.node_memory / 4  # so that a slot of each stage fits into any node
    return Resources(
        device="cuda" if on_gpu else "cpu",
        chunk_images=chunk_images,
        batch_size=classify.batch_size or _power_of_two(_BATCH_MACS // macs, _LEAST_BATCH, _MOST_BATCH),
        read_cpus=read.num_cpus,
        # A chunk as samples, as a table, and as what Ray writes; and what is read ahead.
        read_memory=read.memory
        or int(min(3 * read.chunk_bytes + (read.fetches + 1) * 8 * 1024**2, most_memory)),
        readers=readers,
        decode_cpus=decode_cpus,
        # The chunk's pixels as they are made and as Ray writes them, and one large photograph.
        decode_memory=decode.memory or int(min(2 * chunk_images * size**2 * 3 + 256 * 1024**2, most_memory)),
        decoders=max(1, math.floor(room_for_decoders / decode_cpus)) if decodes_apart else 0,
        classify_cpus=actor_cpus,
        classify_gpus=actor_gpus,
        min_actors=classify.min_actors,
        max_actors=max_actors,
        threads=threads,
    )


def _decode_cpus(node_cpus: float) -> float:
    """CPUs of a decode task, by those of the largest machine."""
    if node_cpus >= 4:
        return 1.0
    return 0.5 if node_cpus >= 2 else 0.25


def _chunk_images(macs: int, size: int, on_gpu: bool) -> int:
    """Images in a chunk: so many that Ray's own work, some 20 ms a chunk, is little beside the classifier's.

    128 of CvT-13's at 224 pixels on a CPU, which takes seconds for them, and 1024 on a GPU. A chunk of the
    largest models must still be done in a minute, and pixels must not fill the object store.
    """
    work = _CHUNK_MACS["cuda" if on_gpu else "cpu"]
    fitting = min(work // macs, _CHUNK_PIXEL_BYTES // (size**2 * 3))
    return _power_of_two(fitting, _LEAST_CHUNK_IMAGES, _MOST_CHUNK_IMAGES)


def _power_of_two(number: int, least: int, most: int) -> int:
    """The largest power of two up to a number, or the nearest of the bounds, which are such."""
    return max(least, min(most, 1 << number.bit_length() >> 1))


def _share_of_node(node_cpus: float, spare: float) -> float:
    """CPUs of a classifier on a CPU: about half of a machine, at the most eight.

    However many of them a machine holds, `spare` is left, for a reader and a decoder: they must find room
    on any machine, for when the others are lost, the actors of those come to it and never make room again.
    """
    actors = max(1, int(node_cpus // min(8.0, max(0.5, node_cpus // 2))))
    while actors > 1 and (node_cpus - spare) / actors <= spare:  # else one more would fit into the rest
        actors -= 1
    return max(0.25, math.floor((node_cpus - spare) / actors * 100) / 100)


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
    from cvt.engine import Engine  # with torch, which readers and decoders don't need

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
            from pipeline.gpu_decoding import GpuDecoder

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


def labelled_images(
    plan: Sequence[Shard],
    storage: Storage,
    read_options: ReadOptions,
    preprocessor: Preprocessor,
    max_pixels: int,
) -> ray.data.Dataset:
    """The samples that have a target, for training: `image`, uint8 (size * size * 3), and `target`.

    Samples without a target, and images that can't be decoded, are left out. A shard that can't be
    read to its end raises.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 128 * 1024**2  # here rows are samples, not chunks
    source = ShardSource(plan, storage, ray.put(read_options), max_images=512, max_bytes=64 * 1024**2)
    chunks = ray.data.read_datasource(source, num_cpus=0.25, override_num_blocks=source.tasks)
    return chunks.map_batches(
        _labelled_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"preprocessor": preprocessor, "max_pixels": max_pixels},
        num_cpus=0.5,
    )


def _labelled_rows(block: pa.Table, preprocessor: Preprocessor, max_pixels: int) -> pa.Table:
    width = preprocessor.size**2 * 3
    images, targets = [np.empty((0, width), np.uint8)], [pa.array([], pa.int32())]
    for chunk in Chunk.from_block(block):
        if chunk.error is not None:
            raise ValueError(chunk.error)
        decoded = decode_chunk(chunk, preprocessor, max_pixels)
        assert isinstance(decoded.pixels, np.ndarray)
        good = decoded.samples.filter(pc.is_null(decoded.samples["error"]))
        has_target = pc.is_valid(good["target"])
        images.append(decoded.pixels.reshape(-1, width)[has_target.to_numpy()])
        targets.append(good["target"].filter(has_target).combine_chunks())
    values = pa.array(np.concatenate(images).reshape(-1))
    return pa.table(
        {
            "image": pa.FixedSizeListArray.from_arrays(values, width),
            "target": pa.concat_arrays(targets),
        }
    )


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
