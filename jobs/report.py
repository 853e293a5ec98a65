"""Makes the report of a model's labels anew: `python -m jobs.report URI`, or `cvt-label report URI`."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.console import exit_status, out, run_alone
from pipeline.storage import Storage


def report(
    uri: Annotated[
        str, typer.Argument(help="URI of a model's labels: .../model=NAME-FINGERPRINT.", show_default=False)
    ],
    run: Annotated[
        str | None, typer.Option("--run", help="The run that it is of (the last one that labelled).")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Labels to compare with, as in `compare`. May be repeated."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Path or URI (report.html beside the labels).")
    ] = None,
) -> None:
    """Make the report of a model's labels from what is stored, also against another model's labels.

    Exit status: 0; 4 when labels can't be read, or the page can't be written.
    """
    with exit_status():
        from pipeline.commit import Partition
        from pipeline.compare import LabelSet, RunPair, compare
        from pipeline.report import make_report, read_gallery
        from pipeline.storage import StorageError

        storage = Storage()
        partition = Partition.open(storage, uri)
        run = run or next(iter((partition.manifest.runs() or partition.records())[-1:]), None)
        record = None if run is None else partition.record(run)
        if run is None or record is None:
            raise StorageError(
                partition.uri, f"has no record of {'any run' if run is None else f'run {run}'}"
            )
        others = [LabelSet.open(storage, name) for name in against or ()]
        comparisons = [compare(other, LabelSet(partition)) for other in others]
        runs = RunPair.find(partition, record.get("config", {}).get("input", {}).get("uri"), run)
        stats, previous = runs.compare()
        gallery = read_gallery(storage, partition.uri)
        page = make_report(partition, record, stats, previous, *comparisons, gallery=gallery)
        target = output or f"{partition.uri}/report.html"
        storage.write(target, page.encode())
    out.print(f"{target}: {len(page.encode()):,} bytes", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_alone(report)
