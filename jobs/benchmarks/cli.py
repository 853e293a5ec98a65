"""The group `cvt-label benchmark`: `run`, `model` and `bookkeeping`."""

from __future__ import annotations

from jobs.benchmarks.benchmark import benchmark
from jobs.benchmarks.bookkeeping import bookkeeping
from jobs.benchmarks.model import benchmark_model
from jobs.console import make_app

app = make_app()
app.command("run")(benchmark)
app.command("model")(benchmark_model)
app.command("bookkeeping")(bookkeeping)


@app.callback()
def _describe() -> None:
    """Measure the product, its stages and its model against other ways to do the same."""
