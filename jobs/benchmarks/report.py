"""What the benchmark's figures are, as JSON and on the terminal."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from jobs.console import out

if TYPE_CHECKING:
    from jobs.benchmarks.contenders import Run
    from jobs.benchmarks.data import Dataset
    from jobs.benchmarks.decoding import Decoding


_OF_A_RUN = ("stages", "bound_by", "gpu_utilisation", "decoder")


def summary(
    dataset: Dataset,
    alone: list[dict[str, float]],
    runs: Mapping[str, list[Run]],
    price_per_hour: float | None,
) -> dict[str, Any]:
    """All figures of a benchmark, as its JSON holds them.

    Args:
        dataset: what was labelled.
        alone: images/s of each stage alone, a round each.
        runs: of each contender, ours first; of one that failed, the last one says why.
        price_per_hour: of the machine, in any currency.
    """
    from jobs.benchmarks.contenders import OURS
    from jobs.benchmarks.peers import PEERS

    ours = runs[OURS]
    records = [run.record or {} for run in ours]
    slowest = [min(rates.values()) for rates in alone]
    titles = {name: peer.title for name, peer in PEERS.items()} | {OURS: "this pipeline"}
    return {
        "data": {name: value for name, value in asdict(dataset).items() if name not in ("tars", "files")},
        "price_per_hour": price_per_hour,
        "alone": alone,
        "contenders": {
            name: _contender(titles[name], dataset, theirs, ours, price_per_hour)
            for name, theirs in runs.items()
        },
        "of_engine": [run.rate / rates["engine"] for run, rates in zip(ours, alone, strict=True)],
        "of_slowest_stage": [run.rate / rate for run, rate in zip(ours, slowest, strict=True)],
        "first_commit": [run.first_commit for run in ours],
        "timings": [record.get("seconds") for record in records],
    } | {name: [record.get(name) for record in records] for name in _OF_A_RUN}


def _contender(
    title: str, dataset: Dataset, runs: Sequence[Run], ours: Sequence[Run], price_per_hour: float | None
) -> dict[str, Any]:
    failure = runs[-1].failure
    done = [run for run in runs if run.failure is None]
    rates = [run.rate for run in done]
    rate = statistics.median(rates) if done and failure is None else None
    return {
        "name": f"{title} (S3)" if runs[-1].in_s3 else title,
        "failure": failure,
        "images": dataset.images if done else 0,
        "seconds": [run.seconds for run in done],
        "first_labels": [run.first_labels for run in done],
        "rates": rates,
        "rate": rate,
        "ratios": [mine.rate / run.rate for mine, run in zip(ours, done, strict=False)],
        "cost_per_million": None if rate is None else cost_per_million(price_per_hour, rate),
    }


def cost_per_million(price_per_hour: float | None, rate: float) -> float | None:
    """What labelling a million images costs at `rate` images/s; None without a price."""
    return None if price_per_hour is None else price_per_hour / (rate * 3600) * 1e6


def print_figures(figures: Mapping[str, Any]) -> None:
    """Prints what `summary` has made."""
    data = figures["data"]
    repeated = f" ({data['distinct']:,} of them different)" if data["distinct"] < data["images"] else ""
    left_out = f"; {data['left_out']:,} that can't be decoded are left out" if data["left_out"] else ""
    megabytes = f"{data['bytes'] / 1e6:,.0f} MB"
    _say(f"{data['images']:,} images{repeated} in {data['shards']:,} tars, {megabytes}{left_out}")
    _print_contenders(figures)
    _say(
        f"our first shard was committed {statistics.median(figures['first_commit']):,.1f} s after the command"
    )
    table = Table("stage alone", "images/s", "least", "most")
    for stage in figures["alone"][0]:
        table.add_row(stage, *_spread([rates[stage] for rates in figures["alone"]]))
    out.print(table)
    _say(
        f"end to end to the engine alone: {_ratio(figures['of_engine'])}; "
        f"to the slowest stage alone: {_ratio(figures['of_slowest_stage'])}"
    )
    _print_last_run({name: figures[name][-1] for name in _OF_A_RUN})


def _print_contenders(figures: Mapping[str, Any]) -> None:
    priced = figures["price_per_hour"] is not None
    headings = ["images", "s in all", "first labels after s", "images/s", "least", "most", "ours to theirs"]
    headings += ["a million costs"] if priced else []
    table = Table(Column("whole job", no_wrap=True), *headings)
    for one in figures["contenders"].values():
        if one["rate"] is None:
            _say(f"{one['name']}: {one['failure']}")
            continue
        cells = [f"{one['images']:,}"]
        cells += [f"{statistics.median(one[name]):,.1f}" for name in ("seconds", "first_labels")]
        cells += [*_spread(one["rates"]), f"{statistics.median(one['ratios']):.2f}"]
        table.add_row(one["name"], *cells, *([f"{one['cost_per_million']:,.2f}"] if priced else []))
    out.print(table)


def _print_last_run(last: Mapping[str, Any]) -> None:
    """What the last run's record says."""
    if last["stages"]:
        _print_stages(last["stages"])
    if last["bound_by"]:
        _say(f"bound by: {last['bound_by']}")
    if last["decoder"]:
        _say(f"decoded by: {last['decoder']}")
    if last["gpu_utilisation"] is not None:
        _say(f"GPU utilisation: {last['gpu_utilisation']:.0%}")


def _print_stages(stages: Mapping[str, Mapping[str, Any]]) -> None:
    headings = (
        "stage in the last run",
        "images",
        "busy s",
        "wait s",
        "MB",
        "workers",
        "busy",
        "images/s busy",
    )
    table = Table(*headings)
    for name, stage in stages.items():
        busy = stage["busy_s"]
        table.add_row(
            name,
            f"{stage['images']:,}",
            f"{busy:,.1f}",
            f"{stage['wait_s']:,.1f}",
            f"{stage['bytes'] / 1e6:,.0f}",
            f"{stage['workers']:g}",
            f"{stage['share_busy']:.0%}",
            f"{stage['images'] * stage['workers'] / busy:,.1f}" if busy else "-",
        )
    out.print(table)


def print_decoding(measured: Sequence[Decoding]) -> None:
    """Prints how decoders compare."""
    headings = ["decoded by", "images/s", "least", "most", "ratio"]
    for images, ways in itertools.groupby(measured, lambda one: f"{one.count:,} images, {one.images}"):
        table = Table(*headings, "same label", "grey levels off", "worst image", title=images)
        for one in ways:
            cells = [*_spread(one.rates), f"{statistics.median(one.ratios):.2f}", f"{one.same_label:.2%}"]
            table.add_row(one.way, *cells, f"{one.mean_difference:.2f}", f"{one.worst_difference:.2f}")
        out.print(table)


def _ratio(values: list[float]) -> str:
    median, least, most = _spread(values)
    return f"{median} ({least} to {most})"


def _spread(values: list[float]) -> list[str]:
    return [f"{value:,.2f}" for value in (statistics.median(values), min(values), max(values))]


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False)
