"""The demo: a real S3 server, real shards, real labels, and nothing left running.

`python -m jobs.demo`, or `cvt-label demo`. It needs no configuration, no network and no GPU.
"""

import os
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

import configs
from jobs import console
from jobs.label import run
from jobs.local_s3 import LocalS3
from pipeline import Partition, load_job_config
from pipeline.dataflow import sigterm_interrupts
from pipeline.storage import Storage

_SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
_CONFIG = Path(configs.__file__).parent / "demo.yaml"


@console.exit_on_error()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that keeps a copy of the labels.")
    ] = Path("demo-output"),
) -> None:
    """Label 1,000 images of Fashion-MNIST from an S3 server that runs for the demo alone.

    Exit status: 0; 4 when the S3 server can't be started; 130 when interrupted; 1 otherwise.
    """
    with sigterm_interrupts(), LocalS3() as server:
        os.environ.update(server.environment())  # of this process, and of the Ray workers it starts
        config = load_job_config(_CONFIG)
        server.create_bucket(config.input.uri.split("/")[2])
        shards = sorted(_SAMPLE.glob("*.tar"))
        for shard in shards:
            Storage().write(f"{config.input.uri}/{shard.name}", shard.read_bytes())
        console.print_line(f"S3 server at {server.endpoint_url}: {len(shards)} shards in {config.input.uri}")
        _read_back(run(config).partition, output)


def _read_back(partition: Partition, output: Path) -> None:
    """Copies all that the run wrote to S3, reads the labels back, and shows some."""
    root = partition.uri.rpartition("/")[0]
    for info in partition.storage.list(partition.uri):
        path = output / info.uri.removeprefix(f"{root}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(partition.storage.read(info.uri))
    tables = list(partition.read_labels(["key", "label", "score", "entropy", "target_id"]))
    labels = pa.concat_tables(tables)
    table = console.make_table("Some of the labels, read back from S3", labels.column_names, [])
    for row in labels.slice(0, 5).to_pylist():
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    console.stdout.print(table)
    console.print_line(f"{labels.num_rows:,} labels in {len(tables)} Parquet files, kept in {output}/")


if __name__ == "__main__":
    console.run_command(demo)
