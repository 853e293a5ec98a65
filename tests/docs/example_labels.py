"""The labels that the documentation queries: two models, and tables of both formats with their labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.publish import publish_labels
from tests.docs.pages import blocks_of
from tests.partitions import make_predictions
from tests.pipeline.publish import tables
from tests.pipeline.publish.tables import FORMATS, LABELS, Dataset

MODELS = ("cvt-13-1a2b3c4d", "cvt-21-4e5f6a7b")
PUBLISH_PAGE = "docs/how-to/publish.md"


class ExampleLabels:
    """A folder with `labels` of two models, and tables with them if the packages are installed.

    The tables are the Delta table `table` and the Iceberg table `vision.labels` in the catalog `lake`. Each
    model is published twice. The second publication replaces a shard, removes one and adds two. The first
    added shard has only errors, others have targets or none.

    Attributes:
        embedding: type of the first model's embeddings; None for none. The second model has none.
        files: all prediction files.
        rows: rows of all prediction files, with their `model`.
        earlier: the same at the first publication, which is version 1 and the first snapshot of the tables.
        formats: the formats whose packages are installed.
    """

    def __init__(self, folder: Path, embedding: str | None = None) -> None:
        self.folder = folder
        self.embedding = embedding
        self.formats = [name for name in FORMATS if all(map(importlib.util.find_spec, FORMATS[name]))]
        self.earlier: list[dict[str, Any]] = []
        with pytest.MonkeyPatch.context() as patch:
            self.enter(patch)
            for seed, (model, kind) in enumerate(zip(MODELS, (embedding, None), strict=True)):
                dataset = Dataset(str(folder), embedding=kind)
                dataset.uri = f"{folder}/labels/model={model}"
                dataset.label(
                    _with_targets(dataset, "a.tar", 30, seed),
                    tables.predictions(dataset.shard("deep/no=targets.tar"), 15, 10 + seed, kind),
                    tables.predictions(dataset.shard("gone.tar"), 5, 30 + seed, kind),
                )
                self.publish(dataset)
                self.earlier = self.earlier or _rows_of(model, folder)
                dataset.label(
                    _errors(dataset, "Only errors.tar"),
                    _with_targets(dataset, "a.tar", 28, 40 + seed),
                    _with_targets(dataset, "z.tar", 15, 20 + seed),
                    remove=["gone.tar"],
                )
                self.publish(dataset)
        self.files = sorted(folder.glob("labels/model=*/predictions/**/*.parquet"))
        self.rows = [row for model in MODELS for row in _rows_of(model, folder)]

    def enter(self, patch: pytest.MonkeyPatch) -> None:
        """Makes the folder the working directory, with the catalogs of the documentation."""
        patch.chdir(self.folder)
        patch.setenv("PYICEBERG_HOME", str(self.folder))
        [block] = [block for block in blocks_of("yaml", page=PUBLISH_PAGE) if "catalog:" in block.text]
        Path(self.folder, ".pyiceberg.yaml").write_text(block.text.replace("/data", str(self.folder)))
        if "iceberg" in self.formats:
            tables.reload_catalogs()

    def publish(self, dataset: Dataset) -> None:
        """Publishes the labels to all tables."""
        targets = {"delta": "delta:table", "iceberg": "iceberg:lake.vision.labels"}
        for name in self.formats:
            publish_labels(dataset.partition, targets[name])


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


def _rows_of(model: str, folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"labels/model={model}/predictions/**/*.parquet"))
    found = [row for path in files for row in pq.read_table(path, partitioning=None).to_pylist()]
    return [row | {"model": model} for row in found]
