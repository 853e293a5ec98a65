"""Labeled images as Ray datasets, for training."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset
from ray.util.queue import Queue

from pipeline.dataflow.ray_executor import ShardSource, decode_block, read_shards_in_turn
from pipeline.dataflow.stages import read_step
from pipeline.decode import DecodeOptions
from pipeline.read import Chunk, ReadOptions, Shard
from pipeline.storage import Storage

#: Maximum number of shards from which a read task takes chunks in turn, and number of images of a chunk.
_SHARDS_PER_READ, _CHUNK_IMAGES = 16, 32


@dataclass
class TrainingImages:
    """The samples with a target of some shards: columns `image`, uint8 (size * size * 3), and `target`.

    Attributes:
        attempts: an actor of `count_attempts`.
        counts: an empty queue, which is empty again after `load`.
        block_images: number of images of a block, the unit in which cached images are shuffled.
        usable: number of samples in the datasets.
        skipped: number of samples that are not in the datasets, by reason.
    """

    shards: Sequence[Shard]
    storage: Storage
    read_options: ReadOptions
    decode_options: DecodeOptions
    attempts: Any
    counts: Queue
    block_images: int = 512
    usable: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    _cached: Dataset | None = None

    def load(self, cache: bool) -> list[str]:
        """Decodes all images and counts the samples; keeps the images in Ray's object store if `cache`.

        Returns:
            The errors of the shards that cannot be read to their end.
        """
        dataset = self._decode("", self.counts)
        if cache:
            self._cached = dataset.materialize()
        else:
            dataset.count()
        # By chunk, because a retried task counts its chunks again.
        results = dict(self.counts.get_nowait_batch(self.counts.qsize())).values()
        self.skipped = sum((skipped for _, skipped, _ in results), Counter())
        self.usable = sum(usable for usable, _, _ in results)
        return sorted(error for *_, error in results if error is not None)

    def dataset(self, seed: str = "") -> Dataset:
        """Returns all images, in an order that depends on the seed only."""
        if self._cached is None:
            return self._decode(seed)
        return self._cached.randomize_block_order(seed=random.Random(seed).getrandbits(32))

    def _decode(self, seed: str, counts: Queue | None = None) -> Dataset:
        """Returns the images of the shuffled shards; each read task takes chunks of its shards in turn."""
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.target_max_block_size = self.block_images * self.decode_options.preprocessor.size**2 * 3
        context.execution_options.preserve_order = True
        read = partial(read_step, self.storage, self.read_options, _CHUNK_IMAGES)
        shards = random.Random(seed).sample(self.shards, len(self.shards))
        per_task = math.ceil(len(shards) / math.ceil(len(shards) / _SHARDS_PER_READ))
        source = ShardSource(
            shards, partial(read_shards_in_turn, step=ray.put(read), attempts=self.attempts), per_task
        )
        # Reading is fast compared to decoding, and each concurrent task is a process.
        readers = min(source.tasks, max(2, int(ray.cluster_resources().get("CPU", 1)) // 4))
        with DataContext.current(context):
            chunks = ray.data.read_datasource(
                source, num_cpus=0.25, concurrency=readers, override_num_blocks=source.tasks
            )
            rows: Dataset = chunks.map_batches(
                _labeled_rows,
                batch_size=None,
                batch_format="pyarrow",
                fn_args=(self.decode_options, self.attempts, counts),
                num_cpus=0.5,
            )
        return rows


def _labeled_rows(block: pa.Table, options: DecodeOptions, attempts: Any, counts: Queue | None) -> pa.Table:
    """Decodes chunks; raises if a shard cannot be read, unless `counts` gets the error."""
    size = options.preprocessor.size
    images, targets = [np.empty((0, size, size, 3), np.uint8)], [pa.array([], pa.int32())]
    for chunk in chain.from_iterable(map(Chunk.from_block, decode_block(block, options, attempts))):
        if chunk.error is not None and counts is None:
            raise ValueError(chunk.error)
        assert isinstance(chunk.pixels, np.ndarray)
        errors = chunk.samples["error"]
        good = chunk.samples.filter(pc.is_null(errors))
        has_target = pc.is_valid(good["target"])
        images.append(chunk.pixels[has_target.to_numpy()])
        targets.append(good["target"].filter(has_target).combine_chunks())
        if counts is not None:
            skipped = Counter(error.partition(":")[0] for error in errors.drop_null().to_pylist())
            unmatched = len(good) - good["unmatched"].null_count
            no_target = good["target"].null_count - unmatched
            skipped += Counter({"no target": no_target, "target is no class": unmatched})
            skipped += Counter({"rest of a damaged shard": int(chunk.damage is not None)})
            counts.put(((chunk.shard, chunk.start), (len(targets[-1]), skipped, chunk.error)))
    values = pa.array(np.concatenate(images).reshape(-1))
    image = pa.FixedSizeListArray.from_arrays(values, size * size * 3)
    return pa.table({"image": image, "target": pa.concat_arrays(targets)})
