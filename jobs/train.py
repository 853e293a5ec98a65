"""Trains a model on labeled shards: `python -m jobs.train --config FILE`, or `cvt-label train`."""

from pathlib import Path
from typing import Annotated

import typer

from jobs import console
from pipeline import load_train_config, train_model


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

    Prints the metrics of each epoch and saves the best model in the format that `label` loads. Run the same
    command again to resume an interrupted training.

    Exit status: 0 on success; 2 if the configuration is not valid; 4 if the data or the model cannot be
    loaded; 130 if interrupted; 1 otherwise.
    """
    loaded = load_train_config(config, set or ())
    result = train_model(
        loaded,
        on_epoch=lambda metrics: console.print_line(
            f"epoch {metrics['epoch']}/{loaded.optimization.epochs}: "
            f"train loss {metrics['train_loss']:.4f}, loss {metrics['loss']:.4f}, "
            f"accuracy {metrics['accuracy']:.2%}, {metrics['seconds']:.0f} s"
        ),
    )
    best = result.best
    console.print_line(
        f"best: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}; saved in {result.path}"
    )


if __name__ == "__main__":
    console.run_command(train)
