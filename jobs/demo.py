"""The demo: a real S3 server, real shards, real labels, and nothing left running.

`python -m jobs.demo`, or `cvt-label demo`. It needs no configuration, no network and no GPU.
"""

import os
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from rich.table import Table

import configs
from jobs.console import exit_status, out, run_alone
from jobs.label import run
from jobs.local_s3 import LocalS3
from pipeline.commit import Partition
from pipeline.config import Config, load_config
from pipeline.dataflow import sigterm_interrupts
from pipeline.storage import Storage

_SAMPLE = Path(__file__).parent / "data" / "fashion-mnist"
_CONFIG = Path(configs.__file__).parent / "demo.yaml"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that keeps a copy of the labels.")
    ] = Path("demo-output"),
) -> None:
    """Label 1,000 images of Fashion-MNIST from an S3 server that runs for the demo alone.

    Exit status: 0; 4 when the S3 server can't be started; 130 when interrupted; 1 otherwise.
    """
    with exit_status(), sigterm_interrupts(), LocalS3() as server:
        _label(server, output)


def _label(server: LocalS3, output: Path) -> None:
    os.environ.update(server.environment())  # of this process, and of the Ray workers it starts
    config = load_config(Config, _CONFIG)
    bucket = config.input.uri.split("/")[2]
    server.create_bucket(bucket)
    storage = Storage()
    shards = sorted(_SAMPLE.glob("*.tar"))
    for shard in shards:
        storage.write(f"{config.input.uri}/{shard.name}", shard.read_bytes())
    out.print(f"S3 server at {server.endpoint_url}: {len(shards)} shards in {config.input.uri}")
    _read_back(run(config).partition, output)


def _read_back(partition: Partition, output: Path) -> None:
    """Reads the labels back from S3, shows some, and copies all that the run wrote."""
    root = partition.uri.rpartition("/")[0]
    for info in partition.storage.list(partition.uri):
        path = output / info.uri.removeprefix(f"{root}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(partition.storage.read(info.uri))
    tables = list(partition.read_labels())
    labels = pa.concat_tables(tables)
    table = Table(title="Some of the labels, read back from S3", title_justify="left")
    shown = ("key", "label", "score", "entropy", "target_id")
    for name in shown:
        table.add_column(name)
    for row in labels.slice(0, 5).to_pylist():
        table.add_row(*(f"{row[n]:.3f}" if isinstance(row[n], float) else str(row[n]) for n in shown))
    out.print(table)
    out.print(f"{labels.num_rows:,} labels in {len(tables)} Parquet files, kept in {output}/", markup=False)


if __name__ == "__main__":
    run_alone(demo)
