"""A partition with random labels, for benchmarks that need neither images nor a model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.commit import Manifest, ManifestRow
from pipeline.predictions import (
    Footer,
    encode_predictions,
    prediction_path,
    prediction_schema,
    serialize_table,
)
from pipeline.statistics import ClassStatistics, class_table
from pipeline.storage import Storage

_CLASSES, _TOPK, _WRITERS = 1000, 5, 16
_ERRORS = 0.001  # fraction of rows with an error
LABELS = [f"class {number}" for number in range(_CLASSES)]


@dataclass(frozen=True)
class SyntheticLabels:
    """Writes the prediction files and the manifest of a partition.

    Attributes:
        uri: the URI of the partition.
        rows: rows of each shard.
        embedding: values of an embedding; 0 for no embeddings.
    """

    uri: str
    rows: int
    embedding: int = 0

    def shard(self, number: int) -> str:
        """Returns the URI of a shard."""
        return f"s3://synthetic/train/{number:07d}.tar"

    def write(self, start: int, stop: int, seed: int) -> None:
        """Writes shards from `start` to before `stop`, or replaces them; other seeds make other labels."""
        storage = Storage()
        table = self.predictions(start, seed)
        classes = ClassStatistics.from_predictions(table, _CLASSES)
        # All shards have the statistics of the first one: publishing does not read them.
        statistics = serialize_table(classes.to_partial())

        def write(number: int) -> ManifestRow:
            rows = self.predictions(number, seed)
            shard = self.shard(number)
            footer = Footer(
                shard=shard,
                version=f"etag-{seed}",
                format="webdataset",
                size=10**9,
                fingerprint="0" * 64,
                rows=len(rows),
                errors=len(rows) - rows["error"].null_count,
                duplicate_keys=0,
                unmatched_targets=0,
                statistics=statistics,
            )
            output = f"predictions/{prediction_path(shard)}"
            version = storage.write(f"{self.uri}/{output}", encode_predictions(rows, footer)).version
            return replace(ManifestRow.of_file(footer, output, version), run=f"run-{seed}")

        with ThreadPoolExecutor(_WRITERS) as pool:
            rows = {row.uri: row for row in pool.map(write, range(start, stop))}
        Manifest(storage, self.uri, _CLASSES).update(rows)
        file = io.BytesIO()
        pq.write_table(class_table(classes, LABELS, _TOPK), file)
        storage.write(f"{self.uri}/class_stats.parquet", file.getvalue())
        record = {"run": f"run-{seed}", "config": {"input": {"uri": "s3://synthetic/train"}}}
        storage.write(f"{self.uri}/runs/run-{seed}.json", json.dumps(record).encode())

    def predictions(self, number: int, seed: int) -> pa.Table:
        """Returns the prediction rows of a shard, with all columns of the product."""
        random, count = np.random.default_rng([number, seed]), self.rows
        is_bad = random.random(count) < _ERRORS
        label = random.integers(0, _CLASSES, count)
        topk = (label[:, None] + np.arange(_TOPK)) % _CLASSES
        score = random.uniform(0.2, 1, count).astype(np.float32)
        scores = score[:, None] * (1 / np.arange(1, _TOPK + 1, dtype=np.float32))
        index = np.arange(count)
        kind = "float16" if self.embedding else "none"
        values = dict[str, pa.Array](
            shard=pa.repeat(self.shard(number), count),
            key=pa.array([f"{number:07d}/{i:06d}" for i in range(count)]),
            index=pa.array(index),
            label=pa.array([LABELS[i] for i in label], mask=is_bad),
            label_id=pa.array(label, mask=is_bad),
            score=pa.array(score, mask=is_bad),
            topk_label_ids=_lists(topk, is_bad),
            topk_scores=_lists(scores, is_bad),
            entropy=pa.array(random.uniform(0, 5, count).astype(np.float32), mask=is_bad),
            target_id=pa.array(random.integers(0, _CLASSES, count)),
            width=pa.array(random.integers(200, 4000, count)),
            height=pa.array(random.integers(200, 4000, count)),
            error=pa.array(["cannot decode: unexpected end of data"] * count, mask=~is_bad),
            offset=pa.array(index * 110_592 + 512),
            size=pa.array(random.integers(50_000, 110_000, count)),
        )
        if self.embedding:
            embedding = random.standard_normal((count, self.embedding), np.float32).astype(np.float16)
            flat = pa.array(embedding.reshape(-1))
            values["embedding"] = pa.FixedSizeListArray.from_arrays(
                flat, self.embedding, mask=pa.array(is_bad)
            )
        schema = prediction_schema(kind, self.embedding)
        empty = pa.nulls(count)
        return pa.table(
            [values.get(name, empty).cast(schema.field(name).type) for name in schema.names], schema
        )


def _lists(values: np.ndarray, is_null: np.ndarray) -> pa.Array:
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), mask=pa.array(is_null))


def portions(shards: int, count: int) -> Iterator[range]:
    """Yields ranges of at most `count` numbers of shards."""
    for start in range(0, shards, count):
        yield range(start, min(start + count, shards))
