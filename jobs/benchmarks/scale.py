"""Measures how far one driver scales: `cvt-label benchmark scale`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from jobs import console
from jobs.benchmarks import figures
from jobs.benchmarks.sections import OK, SectionResult, run_section

_MODULE = "jobs.benchmarks.driver_scale"
#: Maximum seconds of a measurement in addition to its steady state: start of Ray and of all processes.
_OTHER_S, _PLANNING_TIMEOUT_S = 300.0, 1800.0


def scale(
    context: typer.Context,
    classifiers: Annotated[
        str, typer.Option(metavar="N,...", help="Numbers of simulated classifiers, or none.")
    ] = "1,8,64,512",
    shards: Annotated[str, typer.Option(metavar="N,...", help="Numbers of shards to plan, or none.")] = (
        "10000,1000000"
    ),
    chunk_images: Annotated[int, typer.Option(metavar="N", min=1, help="Images in a chunk.")] = 1024,
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, help="Maximum number of processes, which share the classifiers equally."
        ),
    ] = 64,
    seconds: Annotated[
        float, typer.Option(metavar="N", min=1, help="Duration of the steady state of each measurement.")
    ] = 30,
    output: figures.OutputOption = None,
) -> None:
    """Measure the limits of one driver.

    Simulated classifiers return stored results for synthetic shards, with and without decode tasks. Ray Data,
    the committer and the manifest are real. The rows of all committed shards are counted.

    More exit statuses: 1 if a measurement failed, or an image is missing.
    """
    counts, sizes = _numbers(classifiers, "--classifiers"), _numbers(shards, "--shards")
    results = list[SectionResult]()
    for count in counts:
        for decode_tasks in (False, True):
            name = f"{count} classifiers{', decode tasks' if decode_tasks else ''}"
            settings: dict[str, Any] = {"classifiers": count, "decode_tasks": decode_tasks}
            settings |= {"processes": processes, "chunk_images": chunk_images, "seconds": seconds}
            results.append(_measure("driver", name, settings, seconds + _OTHER_S))
    for size in sizes:
        results.append(_measure("planning", f"{size} shards", {"shards": size}, _PLANNING_TIMEOUT_S))
    tables: dict[str, list[dict[str, Any]]] = {}
    for table, field in (("driver", "classifiers"), ("planning", "step")):
        if rows := [row for result in results for row in result.rows if field in row]:
            tables[table] = rows
    figures.print_results(context, output, **tables)
    if failed := [result for result in results if result.status != OK]:
        raise figures.BenchmarkError("; ".join(f"{each.section}: {each.reason}" for each in failed))


def _measure(section: str, name: str, settings: dict[str, Any], timeout: float) -> SectionResult:
    console.print_notice(name)
    result = run_section(_MODULE, section, settings, timeout)
    result.section = name
    return result


def _numbers(text: str, option: str) -> list[int]:
    if text == "none":
        return []
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise typer.BadParameter("expected numbers from 1, separated by commas, or none", param_hint=option)
    return numbers
