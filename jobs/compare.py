"""Compares the labels of two models or two runs: `cvt-label compare`."""

import sys
from typing import Annotated

import typer

from jobs import console
from jobs.console import ExitStatus, print_notice
from pipeline import compare_labels
from pipeline.commit import Partition
from pipeline.compare import NoPreviousRunError
from pipeline.statistics import Comparison, limit_violations
from pipeline.storage import Storage, StorageError, encode_parquet, normalize_uri
from pipeline.text import format_percent

_LABELS = (
    "URI of a partition: OUTPUT/model=NAME-FINGERPRINT. Append @RUN, @latest or @previous to select the "
    "labels of one run. With --config, @RUN, @latest or @previous select from the partition of the job."
)


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_LABELS)],
    b: Annotated[
        str | None,
        typer.Argument(
            metavar="B", help="Labels to compare with A. Default with --config: all labels of the job."
        ),
    ] = None,
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Path or URI of a Parquet file, one row per class.")
    ] = None,
    max_psi: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Maximum PSI of the classes.")
    ] = None,
    max_js: Annotated[
        float | None,
        typer.Option(metavar="N", min=0, max=1, help="Maximum Jensen-Shannon distance of the classes."),
    ] = None,
    max_score_psi: Annotated[
        float | None, typer.Option(metavar="N", min=0, help="Maximum PSI of the scores.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(metavar="N", min=0, max=1, help="Minimum fraction of equal labels.")
    ] = None,
    drift_only: Annotated[bool, typer.Option("--drift-only", help="Read the statistics only.")] = False,
    min_images: Annotated[
        int, typer.Option(metavar="N", min=1, help="Images in A and in B that drift limits need.")
    ] = 1,
    top: Annotated[int, typer.Option(metavar="N", min=1, help="Maximum number of rows in each table.")] = 15,
) -> None:
    """Compare the labels of two models or two runs.

    Prints the drift per class as the population stability index (PSI), and the agreement on the samples that
    both have.

    More exit statuses: 0 if there is no @previous run to compare with; 7 if a limit is exceeded.
    """
    if drift_only and min_agreement is not None:
        raise typer.BadParameter(
            "cannot be combined with --drift-only, which reads no labels", param_hint="--min-agreement"
        )
    configured = None if config is None else console.resolve_partition(None, config, set)
    storage = Storage() if configured is None else configured.storage
    names = [_full_name(name, configured) for name in (a, b)]
    try:
        found = compare_labels(*names, with_agreement=not drift_only, storage=storage)
    except NoPreviousRunError as error:
        print_notice(f"cvt-label: nothing to compare: {error}")
        return
    if min_agreement is not None and (found.agreement is None or not found.agreement.compared):
        problem = f"--min-agreement cannot be checked: no sample is labeled both here and in {names[0]}"
        raise StorageError(names[1], problem)
    if output is not None:
        storage.write(normalize_uri(output), encode_parquet(found.table()))
    print_comparison(found, top)
    limits = {"max_psi": max_psi, "max_js": max_js, "max_score_psi": max_score_psi}
    broken = limit_violations(found.totals, limits | {"min_agreement": min_agreement}, min_images)
    for message in broken:
        print_notice(f"cvt-label: {message}")
    sys.exit(ExitStatus.DRIFTED if broken else ExitStatus.OK)


def _full_name(name: str | None, configured: Partition | None) -> str:
    """Adds the URI of the configured job's partition to a name that has no URI."""
    if name is not None and not name.startswith("@"):
        return name
    if configured is None:
        raise typer.BadParameter("give A and B with their URIs, or give --config")
    return f"{configured.uri}{name or ''}"


def print_comparison(found: Comparison, top: int) -> None:
    """Prints the classes that changed most, the most frequent disagreements, and a summary."""
    agreement, labels = found.agreement, found.drift.classes.labels
    _print_classes(found, top)
    if agreement is not None and (pairs := agreement.disagreements.most_common(top)):
        rows = [
            [labels[i], labels[j], f"{count:,}", format_percent(count / agreement.compared)]
            for i, j, count in pairs
        ]
        console.print_table("Most frequent disagreements", ["A", "B"], ["images", "%"], rows)
    console.print_fields({"A": found.a.name, "B": found.b.name, **found.summary("in A", "in B")})


def _print_classes(found: Comparison, top: int) -> None:
    headings = ["A", "B", "% of A", "% of B", "PSI", "PSI of scores"]
    if found.agreement is not None:
        headings.append("B agrees")
    rows = []
    for row in found.table().take(found.drift.most_changed(top)).to_pylist():
        cells = [row["label"], f"{row['count_a']:,}", f"{row['count_b']:,}"]
        cells += [format_percent(row["fraction_a"]), format_percent(row["fraction_b"]), f"{row['psi']:.4f}"]
        cells.append("-" if row["score_psi"] is None else f"{row['score_psi']:.4f}")
        if found.agreement is not None:
            cells.append(format_percent(row["same"] / row["compared_a"] if row["compared_a"] else None))
        rows.append(cells)
    console.print_table("Classes that changed most", ["label"], headings, rows)
