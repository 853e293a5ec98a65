"""Labeled images as a Ray dataset, for training."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext

from cvt.preprocessing import Preprocessor
from pipeline.dataflow.ray_executor import AttemptLimit, ShardSource
from pipeline.dataflow.stages import read_step
from pipeline.decode import decode_chunk
from pipeline.read import Chunk, ReadOptions, Shard
from pipeline.storage import Storage


def labeled_images(
    plan: Sequence[Shard],
    storage: Storage,
    read_options: ReadOptions,
    preprocessor: Preprocessor,
    max_pixels: int,
) -> ray.data.Dataset:
    """Returns the samples with a target: columns `image`, uint8 (size * size * 3), and `target`.

    Omits samples without a target and images that can't be decoded. A shard that can't be read to its end
    raises.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 128 * 1024**2  # rows are samples here, not chunks
    read = partial(read_step, storage=storage, options=read_options, max_images=512, max_bytes=64 * 1024**2)
    source = ShardSource(plan, ray.put(read), AttemptLimit(max_attempts=4))
    chunks = ray.data.read_datasource(source, num_cpus=0.25, override_num_blocks=source.tasks)
    rows: ray.data.Dataset = chunks.map_batches(
        _labeled_rows,
        batch_size=None,
        batch_format="pyarrow",
        fn_args=(preprocessor, max_pixels),
        num_cpus=0.5,
    )
    return rows


def _labeled_rows(block: pa.Table, preprocessor: Preprocessor, max_pixels: int) -> pa.Table:
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
    image = pa.FixedSizeListArray.from_arrays(values, width)
    return pa.table({"image": image, "target": pa.concat_arrays(targets)})
