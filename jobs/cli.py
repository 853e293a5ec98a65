"""The console command `cvt-label`: a thin layer over the modules beside it."""

from __future__ import annotations

from jobs.benchmark import benchmark
from jobs.console import make_app
from jobs.demo import demo
from jobs.label import label
from jobs.plan import plan
from jobs.stats import stats
from jobs.train import train


def main() -> None:
    """Runs `cvt-label`."""
    app = make_app()
    for command in (label, plan, stats, train, demo, benchmark):
        app.command()(command)
    app()


if __name__ == "__main__":
    main()
