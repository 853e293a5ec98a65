"""The stages that process a chunk, with every executor: `read_step`, `decode_chunk`, `Classifier`."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.classify import Thumbnails, classify
from pipeline.config import ClassifyConfig, ConfigError, DecodeConfig, ReportConfig
from pipeline.dataflow.gpu_meter import GpuMeter
from pipeline.dataflow.resources import Resources
from pipeline.decode import DecodeOptions
from pipeline.predictions import PredictionOptions
from pipeline.read import Chunk, ReadOptions, Shard, read_samples, split_into_chunks
from pipeline.statistics import CLASSIFY, STORAGE, StageTimer
from pipeline.storage import Storage, retry_counts

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint
    from cvt.inference import Engine
    from pipeline.decode.gpu import GpuDecoder

#: Yields the chunks of numbered shards, one shard after another.
ReadStep = Callable[[Iterable[tuple[int, Shard]]], Iterator[Chunk]]


def read_step(
    storage: Storage,
    options: ReadOptions,
    max_images: int,
    shards: Iterable[tuple[int, Shard]],
) -> Iterator[Chunk]:
    """Reads shards, given with their index in the plan, in chunks of limited images and encoded bytes.

    A retry yields the same chunks, because the versions of the shards are pinned.
    """
    timer, before = StageTimer(), retry_counts()
    for number, shard in shards:
        samples = read_samples(storage, shard, options)
        chunks = split_into_chunks(samples, number, max_images, options.read.chunk_bytes, shard.uri)
        while True:
            with timer:
                chunk = next(chunks, None)
            if chunk is None:
                break
            now = retry_counts()
            metrics = timer.collect(chunk.samples.num_rows, chunk.encoded_bytes)
            yield replace(chunk, retries=now - before, metrics={STORAGE: metrics})
            before = now


@dataclass(frozen=True)
class Stages:
    """The settings of the stages of a labeling run."""

    storage: Storage
    read_options: ReadOptions
    checkpoint: Checkpoint
    predictions: PredictionOptions
    precision: str
    decode: DecodeConfig
    classify: ClassifyConfig
    report: ReportConfig

    def make_read_step(self, resources: Resources) -> ReadStep:
        """Returns the first stage."""
        return partial(read_step, self.storage, self.read_options, resources.chunk_images)

    def make_classifier(self, resources: Resources) -> Classifier:
        """Returns the last stage, with its model loaded."""
        return Classifier(self, resources)

    @property
    def decode_options(self) -> DecodeOptions:
        """How the second stage decodes."""
        max_pixels, is_fast = self.read_options.input.max_image_pixels, self.decode.quality == "fast"
        return DecodeOptions(self.checkpoint.preprocessor, max_pixels, is_fast, self.decode.timeout_s)


class Classifier:
    """The last stage: holds the model on its device; with GPU decoding, decodes chunks without pixels."""

    def __init__(self, stages: Stages, resources: Resources) -> None:
        # Without a reference to the checkpoint: the engine has a copy of the weights.
        self.decode_options = stages.decode_options
        self.timeout_s = stages.classify.timeout_s
        self._predictions = stages.predictions
        self._decoder: GpuDecoder | None = None
        if not resources.decoders:  # before the engine, whose warm-up may take a minute
            from pipeline.decode.gpu import GpuDecoder

            threads = max(2, int(resources.classify_cpus))
            share = stages.decode.cpu_share
            self._decoder = GpuDecoder(
                self.decode_options, resources.device, threads=threads, cpu_share=share
            )
        self._engine = warm_engine(stages.checkpoint, stages.precision, resources)
        gallery, side = stages.report.gallery, stages.report.thumbnail_side
        self._thumbnails = Thumbnails(gallery, side) if gallery else None
        self._gpu_meter = GpuMeter() if resources.device == "cuda" else None
        self._timer = StageTimer()

    def __call__(self, chunk: Chunk) -> Chunk:
        """Returns the chunk with prediction columns and without pixels."""
        decoded = chunk
        if self._decoder is not None and chunk.pixels is None:
            decoded = self._decoder(chunk)
        with self._timer:
            classified = classify(decoded, self._engine, self._predictions)
            if self._thumbnails is not None:
                classified = self._thumbnails.add_column(decoded, classified)
        metrics = self._timer.collect(decoded.samples["error"].null_count, classified.samples.nbytes)
        if self._gpu_meter is not None:
            metrics += self._gpu_meter.collect()
        return replace(
            classified, runtime=self._engine.runtime, metrics={**decoded.metrics, CLASSIFY: metrics}
        )


@contextmanager
def call_after(seconds: float, action: Callable[[], None]) -> Iterator[None]:
    """Calls a function in another thread if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, action)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def warm_engine(checkpoint: Checkpoint, precision: str, resources: Resources) -> Engine:
    """Returns the warmed-up engine of a classifier; raises `ConfigError` if the runtime fails here."""
    from cvt.inference.engine import Engine  # imports torch, which readers and decoders do not need

    try:
        engine = Engine(
            checkpoint.model,
            checkpoint.preprocessor,
            device=resources.device,
            precision=precision,
            runtime=resources.runtime,
            batch_size=resources.batch_size,
            threads=resources.threads,
        )
    except (ImportError, ValueError) as error:
        if resources.runtime == "torch":
            raise
        remedy = f"all nodes must support {resources.runtime}, or set classify.runtime: torch"
        raise ConfigError(f"classify.runtime: on the node {platform.node()}: {error}; {remedy}") from error
    engine.warm_up()
    return engine
