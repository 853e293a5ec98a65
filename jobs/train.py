"""Trains a model on labeled shards: `python -m jobs.train --config FILE`, or `cvt-label train`."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from jobs import console
from jobs.label import LOG_INTERVAL
from pipeline import load_train_config, train_model

logger = logging.getLogger("cvt_label")


@console.exit_on_error()
def train(
    config: Annotated[
        Path,
        typer.Option(
            "--config", "-c", metavar="FILE", help="YAML file, such as configs/fashion_mnist_train.yaml."
        ),
    ],
    set: console.SetOption = None,
) -> None:
    """Train or fine-tune a CvT on labeled shards.

    Prints the metrics of each epoch and saves the best model so far in the format that `label` loads. Run the
    same command again to resume an interrupted training, also within an epoch.

    Exit status: 0 on success; 2 if the configuration is not valid, the output belongs to another training, or
    too few images have a target; 4 if the data or the model cannot be loaded, or the output cannot be
    written; 130 if interrupted; 1 otherwise.
    """
    loaded = load_train_config(config, set or ())
    epochs = loaded.optimization.epochs
    console.log_to_stderr()
    with ProgressView(epochs) as view:
        result = train_model(
            loaded,
            on_epoch=lambda metrics: console.print_line(
                f"epoch {metrics['epoch']}/{epochs}: "
                f"train loss {metrics['train_loss']:.4f}, loss {metrics['loss']:.4f}, "
                f"accuracy {metrics['accuracy']:.2%}, {metrics['seconds']:.0f} s"
            ),
            on_progress=view.show,
        )
    best = result.best
    console.print_line(
        f"best: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}; saved in {result.path}"
    )


class ProgressView(Progress):
    """Shows the progress: a bar on a terminal, else a line in the log at regular intervals."""

    def __init__(self, epochs: int, interval: float = LOG_INTERVAL) -> None:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=20)
        is_terminal = console.stderr.is_terminal
        super().__init__(
            *columns,
            console=console.stderr,
            transient=True,
            disable=not is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._epochs, self._interval, self._logged = epochs, interval, time.monotonic()
        self._task = self.add_task("starting", total=None)

    def show(self, progress: Mapping[str, float]) -> None:
        """Shows epoch, step, loss, rate and remaining time."""
        steps = progress["steps"]
        text = (
            f"epoch {progress['epoch']}/{self._epochs}, step {progress['step']:,}/{steps:,}, train loss "
            f"{progress['train_loss']:.4f}, {progress['images_per_s']:,.1f} images/s, remaining "
            f"{timedelta(seconds=round(progress['remaining_s']))}"
        )
        done = (progress["epoch"] - 1) * steps + progress["step"]
        self.update(self._task, description=text, completed=done, total=self._epochs * steps)
        if self.disable and time.monotonic() - self._logged >= self._interval:
            self._logged = time.monotonic()
            logger.info("%s", text)


if __name__ == "__main__":
    console.run_command(train)
