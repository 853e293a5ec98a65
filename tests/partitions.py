"""Creates partitions from predictions, without a model and without Ray."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any

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

RUN = "20260101T000000.000000Z-{:06x}"


def make_predictions(
    shard: str,
    labels: Sequence[str],
    given: Sequence[int | None],
    targets: Sequence[int | None] | None = None,
    scores: Sequence[float] | None = None,
    error: str = "unsupported format: the file starts with b'<html>'",
) -> pa.Table:
    """Returns the prediction rows of a shard; a sample whose class is None has an error."""
    count = len(given)
    scores = [0.75] * count if scores is None else scores
    is_bad = [label is None for label in given]
    columns = {
        "shard": [shard] * count,
        "key": [f"k{i}" for i in range(count)],
        "index": list(range(count)),
        "label": [None if i is None else labels[i] for i in given],
        "label_id": list(given),
        "score": [None if bad else s for bad, s in zip(is_bad, scores, strict=True)],
        "topk_label_ids": [None if i is None else [i] for i in given],
        "topk_scores": [None if bad else [s] for bad, s in zip(is_bad, scores, strict=True)],
        "entropy": [None if bad else 0.5 for bad in is_bad],
        "target_id": [None] * count if targets is None else list(targets),
        "width": [8] * count,
        "height": [8] * count,
        "error": [error if bad else None for bad in is_bad],
        **{name: [None] * count for name in ("uri", "version", "offset", "size")},
    }
    return pa.table(columns, schema=prediction_schema())


def manifest_rows(manifest: Manifest) -> list[ManifestRow]:
    """Returns all rows of a manifest."""
    names = [field.name for field in fields(ManifestRow)]
    return [ManifestRow(**row) for row in manifest.read(names).to_pylist()]


def write_partition(
    storage: Storage,
    uri: str,
    labels: Sequence[str],
    runs: Sequence[Mapping[str, pa.Table]],
    record: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes the files of a partition: prediction files, manifest, statistics, records; returns the run ids.

    Args:
        storage: Storage of the partition.
        uri: URI of the partition.
        labels: Class names.
        runs: Predictions by shard, for each run.
        record: Additional fields of each run's record.
        versions: Versions of shards; the default is "v1".
    """
    manifest = Manifest(storage, uri, len(labels))
    ids = []
    for number, shards in enumerate(runs):
        ids.append(RUN.format(number))
        rows = {}
        for shard, table in shards.items():
            footer = Footer(
                shard=shard,
                version=(versions or {}).get(shard, "v1"),
                format="webdataset",
                size=1,
                fingerprint="f" * 64,
                rows=table.num_rows,
                errors=table.num_rows - table["error"].null_count,
                duplicate_keys=0,
                unmatched_targets=0,
                statistics=serialize_table(ClassStatistics.from_predictions(table, len(labels)).to_partial()),
            )
            output = f"predictions/{prediction_path(shard)}"
            version = storage.write(f"{uri}/{output}", encode_predictions(table, footer)).version
            row = ManifestRow.of_file(footer, output, version)
            rows[shard] = replace(row, run=ids[-1], committed_at=datetime(2026, 1, 1, tzinfo=UTC))
        manifest.update(rows)
        values = {"run": ids[-1], "status": "complete", "config": {"output": {"topk": 1}}} | dict(
            record or {}
        )
        storage.write(f"{uri}/runs/{ids[-1]}.json", json.dumps(values).encode())
    file = io.BytesIO()
    pq.write_table(class_table(manifest.fold_statistics(), labels, 1), file)
    storage.write(f"{uri}/class_stats.parquet", file.getvalue())
    return ids


def random_given(count: int, weights: Sequence[float], seed: int = 0) -> list[int]:
    """Returns random class ids with these weights."""
    p = np.array(weights) / np.sum(weights)
    found: list[int] = np.random.default_rng(seed).choice(len(p), count, p=p).tolist()
    return found
