"""Labels sample images from a local S3 server, without a network: `cvt-label demo`."""

import os
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

import configs
from jobs import console
from jobs.label import run
from jobs.local_s3 import LocalS3
from pipeline import load_job_config
from pipeline.storage import Storage
from pipeline.text import pluralize

_SAMPLE_FOLDER = Path(__file__).parent / "data" / "fashion-mnist"
_CONFIG = Path(configs.__file__).parent / "demo.yaml"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for a copy of the labels.")
    ] = Path("demo-output"),
) -> None:
    """Label 1,000 images of Fashion-MNIST from a local S3 server.

    The S3 server runs only during the demo.
    """
    with LocalS3() as server:
        os.environ.update(server.environment())  # Ray workers inherit them
        config = load_job_config(_CONFIG)
        uri = str(config.input.inputs)
        server.create_bucket(uri.split("/")[2])
        shards = sorted(_SAMPLE_FOLDER.glob("*.tar"))
        for shard in shards:
            Storage().write(f"{uri}/{shard.name}", shard.read_bytes())
        console.print_line(f"S3 server at {server.endpoint_url}: {pluralize(len(shards), 'shard')} in {uri}")
        partition = run(config).partition
        root = partition.uri.rpartition("/")[0]
        for info in partition.storage.list(partition.uri):
            path = output / info.uri.removeprefix(f"{root}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(partition.storage.read(info.uri))
        tables = list(partition.read_labels(["key", "label", "score", "entropy", "target_id"]))
        labels = pa.concat_tables(tables)
        rows = [
            [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()]
            for row in labels.slice(0, 5).to_pylist()
        ]
        console.print_table("First labels, read from S3", labels.column_names, [], rows)
        files = pluralize(len(tables), "Parquet file")
        console.print_line(f"{pluralize(labels.num_rows, 'label')} in {files}, copied to {output}/")
        # The S3 server ends with the demo, so the path in the summary above can't be opened.
        console.print_line(f"report: {output}/{partition.name}/report.html")
