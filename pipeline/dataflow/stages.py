"""What each stage does to a chunk: read, decode, classify. Every executor runs these.

    shards -> read_step -> decode_step -> Classifier -> labeled chunks

Nothing here knows which executor runs it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from cvt.preprocessing import Preprocessor
from pipeline.classify import Thumbnails, classify
from pipeline.dataflow.resources import Resources
from pipeline.decode import decode_chunk
from pipeline.predictions import PredictionOptions
from pipeline.read import Chunk, ReadOptions, Shard, read_samples, split_into_chunks
from pipeline.statistics import CLASSIFY, DECODE, STORAGE, StageMetrics, StageTimer
from pipeline.storage import Storage, retry_counts

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint
    from cvt.inference import Engine
    from pipeline.decode.gpu import GpuDecoder

logger = logging.getLogger("cvt_label")

#: Seconds between two samples of how busy a GPU is.
_GPU_INTERVAL = 0.5

#: Yields the chunks of numbered shards, one shard after the other.
ReadStep = Callable[[Iterable[tuple[int, Shard]]], Iterator[Chunk]]
DecodeStep = Callable[[Chunk], Chunk]


def read_step(
    shards: Iterable[tuple[int, Shard]],
    *,
    storage: Storage,
    options: ReadOptions,
    max_images: int,
    max_bytes: int,
) -> Iterator[Chunk]:
    """Reads numbered shards in chunks of so many images and encoded bytes at most.

    Pure: versions are pinned, so that a second attempt yields the same chunks.
    """
    meter, before = StageTimer(), retry_counts()
    for number, shard in shards:
        chunks = split_into_chunks(read_samples(storage, shard, options), number, max_images, max_bytes)
        while True:
            with meter:
                chunk = next(chunks, None)
            if chunk is None:
                break
            now = retry_counts()
            metrics = meter.collect(chunk.samples.num_rows, chunk.encoded_bytes)
            yield replace(chunk, retries=now - before, metrics={STORAGE: metrics})
            before = now


def decode_step(chunk: Chunk, *, preprocessor: Preprocessor, max_pixels: int, fast: bool = False) -> Chunk:
    """Decodes a chunk on the CPU; see `decode_chunk`."""
    meter = StageTimer()
    with meter:
        decoded = decode_chunk(chunk, preprocessor, max_pixels, fast)
    return _metered(meter, chunk, decoded)


def _metered(meter: StageTimer, chunk: Chunk, decoded: Chunk) -> Chunk:
    """The decoded chunk with what the meter measured of its decoding."""
    assert decoded.pixels is not None
    metrics = meter.collect(chunk.samples["error"].null_count, decoded.pixels.nbytes)
    metrics += decoded.metrics.get(DECODE, StageMetrics())
    return replace(decoded, metrics={**decoded.metrics, DECODE: metrics})


@dataclass(frozen=True)
class Stages:
    """What the stages of a labeling run need to know.

    Attributes:
        max_image_pixels: larger images are an error.
        fast_decoding: decode large JPEGs at a fraction of their size.
        gallery: images of each class that get thumbnails, at each end; 0 for no thumbnails.
        thumbnail_side: pixels of a thumbnail's longest side.
    """

    storage: Storage
    read_options: ReadOptions
    checkpoint: Checkpoint
    predictions: PredictionOptions
    max_image_pixels: int
    fast_decoding: bool
    precision: str
    runtime: str
    gallery: int
    thumbnail_side: int

    def reading(self, resources: Resources) -> ReadStep:
        """The first stage."""
        return partial(
            read_step,
            storage=self.storage,
            options=self.read_options,
            max_images=resources.chunk_images,
            max_bytes=resources.chunk_bytes,
        )

    @property
    def decoding(self) -> DecodeStep:
        """The second stage, where the CPU decodes."""
        return partial(
            decode_step,
            preprocessor=self.checkpoint.preprocessor,
            max_pixels=self.max_image_pixels,
            fast=self.fast_decoding,
        )


class Classifier:
    """The last stage: holds the model on its device; also decodes where its GPU does. Thread-safe."""

    def __init__(self, stages: Stages, resources: Resources) -> None:
        checkpoint, options = stages.checkpoint, stages.predictions
        self._options = options
        self._decoder: GpuDecoder | None = None
        if not resources.decoders:  # before the engine, which may take a minute to get ready
            from pipeline.decode.gpu import GpuDecoder

            threads = max(2, int(resources.classify_cpus))
            self._decoder = GpuDecoder(
                checkpoint.preprocessor, stages.max_image_pixels, resources.device, threads=threads
            )
            self._decode_meter = StageTimer()
        self._engine = warm_engine(checkpoint, stages.precision, stages.runtime, resources)
        self._thumbnails = None
        if stages.gallery:
            self._thumbnails = Thumbnails(stages.gallery, stages.thumbnail_side)
        self._gpu_meter = GpuMeter() if resources.device == "cuda" else None
        self._meter = StageTimer()

    def __call__(self, chunk: Chunk) -> Chunk:
        """The chunk with prediction columns, and without pixels."""
        decoded = chunk
        if self._decoder is not None:
            with self._decode_meter:
                decoded = self._decoder(chunk)
            decoded = _metered(self._decode_meter, chunk, decoded)
        with self._meter:
            classified = classify(decoded, self._engine, self._options)
            if self._thumbnails is not None:
                classified = self._thumbnails.add_column(decoded, classified)
        metrics = self._meter.collect(decoded.samples["error"].null_count, classified.samples.nbytes)
        if self._gpu_meter is not None:
            metrics += self._gpu_meter.collect()
        return replace(classified, metrics={**decoded.metrics, CLASSIFY: metrics})


class GpuMeter:
    """Asks the driver twice a second how busy this process's GPU is (needs nvidia-ml-py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: list[float] = []
        threading.Thread(target=self._sample, name="gpu-meter", daemon=True).start()

    def collect(self) -> StageMetrics:
        """Sum and number of the samples since the last call."""
        with self._lock:
            shares, self._shares = self._shares, []
        return StageMetrics(gpu_busy=sum(shares), gpu_samples=len(shares))

    def _sample(self) -> None:
        import torch

        while True:
            try:
                share = torch.cuda.utilization() / 100
            except Exception as error:  # of three kinds at least; labelling goes on without
                logger.warning("GPU utilisation is not measured: %s", error)
                return
            with self._lock:
                self._shares.append(share)
            time.sleep(_GPU_INTERVAL)


def warm_engine(checkpoint: Checkpoint, precision: str, runtime: str, resources: Resources) -> Engine:
    """The engine of a classifier, ready for its first chunk."""
    from cvt.inference.engine import Engine  # with torch, which readers and decoders don't need

    engine = Engine(
        checkpoint.model,
        checkpoint.preprocessor,
        device=resources.device,
        precision=precision,
        runtime=runtime,
        batch_size=resources.batch_size,
        threads=resources.threads,
    )
    engine.warm_up()
    return engine
