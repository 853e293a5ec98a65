"""Compares the labels of two models, or of two runs: `python -m jobs.compare A B`, or `cvt-label compare`."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated

import pyarrow.parquet as pq
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from jobs.console import Exit, err, exit_status, out, plain, run_alone
from pipeline.storage import Storage
from pipeline.text import percent, printable

if TYPE_CHECKING:
    from pipeline.statistics import Comparison

_SIDE = "URI of a model's labels, .../model=NAME-FINGERPRINT; of one run with @RUN, @latest or @previous."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Likewise, what is compared with it.")],
    output: Annotated[
        str | None, typer.Option(help="Path or URI of a Parquet file for it: a row a class.")
    ] = None,
    max_psi: Annotated[float | None, typer.Option(min=0, help="Of the classes.")] = None,
    max_js: Annotated[
        float | None, typer.Option(min=0, max=1, help="Jensen-Shannon distance of the classes.")
    ] = None,
    max_score_psi: Annotated[float | None, typer.Option(min=0, help="Of the scores.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the samples with the same class.")
    ] = None,
    drift_only: Annotated[
        bool, typer.Option("--drift-only", help="Read statistics alone, not every label.")
    ] = False,
    min_images: Annotated[
        int, typer.Option(min=1, help="Hold drift to its limits only where both sides have so many images.")
    ] = 1,
    most: Annotated[int, typer.Option(min=1, help="Rows of each table, at most.")] = 15,
) -> None:
    """Compare two models' labels, or two runs': drift by class, and agreement on the same samples.

    Exit status: 0, also when @previous is asked for and the labels are of one run alone, so that nothing is
    compared, and nothing written; 2 when an option can't be used; 4 when a side can't be read, or holds no
    label; 7 when a limit is broken.
    """
    if drift_only and min_agreement is not None:
        raise typer.BadParameter("needs every label, and not --drift-only", param_hint="--min-agreement")
    with exit_status():
        from pipeline.compare import LabelSet, NoPreviousRunError
        from pipeline.compare import compare as compare_sides
        from pipeline.statistics import Limits
        from pipeline.storage import StorageError

        storage = Storage()
        try:
            first, second = LabelSet.open(storage, a), LabelSet.open(storage, b)
        except NoPreviousRunError as error:
            err.print(
                f"cvt-label: nothing is compared: {printable(str(error))}", markup=False, highlight=False
            )
            return
        with err.status("reading statistics") as status:  # in a terminal only
            found = compare_sides(
                first,
                second,
                not drift_only,
                on_progress=lambda shards: status.update(f"comparing labels: {shards:,} shards"),
            )
        if min_agreement is not None and (found.agreement is None or not found.agreement.compared):
            raise StorageError(b, f"nothing to measure agreement on: no sample is labelled there and in {a}")
        if output is not None:
            file = io.BytesIO()
            pq.write_table(found.table(), file, compression="zstd")
            storage.write(output, file.getvalue())
    print_comparison(found, most)
    limits = Limits(max_psi, max_js, max_score_psi, min_agreement, min_images)
    broken = limits.broken(found.totals)
    for message in broken:
        err.print(f"cvt-label: {message}", markup=False, highlight=False)
    sys.exit(Exit.DRIFTED if broken else Exit.OK)


def print_comparison(found: Comparison, most: int) -> None:
    """Prints the figures, the classes that changed most, and the most frequent disagreements."""
    agreement, classes = found.agreement, found.drift.classes
    grid = Table.grid(padding=(0, 2))
    for name, value in {"A": found.a.name, "B": found.b.name, **found.facts("in A", "in B")}.items():
        grid.add_row(name, value)
    out.print(_class_table(found, most))
    if agreement is not None and (pairs := agreement.disagreements.top(most)):
        table = _table("Most frequent disagreements", ["A", "B"], ["images", "share"])
        for i, j, count in pairs:
            names = [plain(classes.labels[k]) for k in (i, j)]
            table.add_row(*names, f"{count:,}", percent(count / agreement.compared))
        out.print(table)
    out.print(grid, soft_wrap=True, markup=False)


def _class_table(found: Comparison, most: int) -> Table:
    drift, agreement = found.drift, found.agreement
    headings = ["A", "B", "share A", "share B", "PSI", "PSI of scores"]
    if agreement is not None:
        headings.append("B agrees")
    table = _table("Classes that changed most", ["label"], headings)
    parts, scores, a, b = drift.psi_parts, drift.class_score_psi, drift.fraction_a, drift.fraction_b
    for i in drift.most_changed(most):
        cells = [f"{drift.count_a[i]:,}", f"{drift.count_b[i]:,}", percent(a[i]), percent(b[i])]
        cells += [f"{parts[i]:.4f}", "-" if scores[i] != scores[i] else f"{scores[i]:.4f}"]
        if agreement is not None:
            given = int(agreement.given_a[i])
            cells.append(percent(int(agreement.same[i]) / given if given else None))
        table.add_row(plain(drift.classes.labels[i]), *cells)
    return table


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in texts:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


if __name__ == "__main__":
    run_alone(compare)
