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
        typer.Option("--config", "-c", help="YAML file, such as configs/fashion_mnist_train.yaml."),
    ],
    set: console.SetOption = None,
) -> None:
    """Train a new CvT, or fine-tune a checkpoint, on shards with labels.

    Prints the metrics of each epoch. A rerun resumes an interrupted training. The best model is saved in the
    format that `label` loads.

    Exit status: 0; 2 when the configuration can't be used; 4 when data or model can't be used; 130
    when interrupted; 1 otherwise.
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
