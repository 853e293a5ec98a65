"""The labels that the documentation queries: two models, and the Delta table of both."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.partitions import make_predictions
from tests.pipeline.publish import tables
from tests.pipeline.publish.tables import LABELS, Dataset

MODELS = ("cvt-13-1a2b3c4d", "cvt-21-4e5f6a7b")


class ExampleLabels:
    """A folder with `labels` of two models, and with their `table` if deltalake is installed.

    The first shard has only errors, others have targets or none.

    Attributes:
        embedding: type of the first model's embeddings; None for none. The second model has none.
        files: all prediction files.
        rows: rows of all prediction files, with their `model`.
    """

    def __init__(self, folder: Path, embedding: str | None = None) -> None:
        self.folder = folder
        self.embedding = embedding
        for seed, (model, kind) in enumerate(zip(MODELS, (embedding, None), strict=True)):
            dataset = Dataset(str(folder), embedding=kind)
            dataset.uri = f"{folder}/labels/model={model}"
            dataset.label(
                _with_targets(dataset, "a.tar", 30, seed),
                tables.predictions(dataset.shard("deep/no=targets.tar"), 15, 10 + seed, kind),
            )
            _publish(dataset)
            dataset.label(_errors(dataset, "Only errors.tar"), _with_targets(dataset, "z.tar", 15, 20 + seed))
            _publish(dataset)
        self.files = sorted(folder.glob("labels/model=*/predictions/**/*.parquet"))
        self.rows = [row for path in self.files for row in _rows(path)]


def _publish(dataset: Dataset) -> None:
    if importlib.util.find_spec("deltalake"):
        dataset.publish()


def _with_targets(dataset: Dataset, name: str, count: int, seed: int) -> pa.Table:
    rows = tables.predictions(dataset.shard(name), count, seed, dataset.embedding)
    column = rows.schema.get_field_index("target_id")
    targets = pa.array([row % len(LABELS) for row in range(count)], pa.int32())
    return rows.set_column(column, rows.schema.field(column), targets)


def _errors(dataset: Dataset, name: str) -> pa.Table:
    rows = make_predictions(dataset.shard(name), LABELS, [None, None])
    for column, values in {
        "key": ["../../x.jpg", "it's.jpg"],
        "error": [
            "cannot decode: image file is truncated (7 bytes)",
            "cannot decode: 12 bytes",
        ],
    }.items():
        place = rows.schema.get_field_index(column)
        rows = rows.set_column(place, rows.schema.field(place), pa.array(values))
    if dataset.embedding is None:
        return rows
    embedding = tables.predictions("", 1, embedding=dataset.embedding).schema.field("embedding")
    return rows.append_column(embedding, pa.nulls(2, embedding.type))


def _rows(path: Path) -> list[dict[str, Any]]:
    model = str(path).partition("/model=")[2].partition("/")[0]
    return [row | {"model": model} for row in pq.read_table(path, partitioning=None).to_pylist()]
