"""Trains a model on labeled shards: `python -m jobs.train --config FILE`, or `cvt-label train`."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.console import ConfigOption, SetOption, exit_status, out, run_alone
from pipeline.config import ConfigError, TrainConfig, load_config
from pipeline.dataflow.ray_cluster import ray_cluster


def train(config: ConfigOption, set: SetOption = None) -> None:
    """Train a new CvT, or fine-tune a checkpoint, on shards with labels.

    Prints the metrics of each epoch. A rerun resumes an interrupted training. The best model is saved in the
    format that `label` loads.

    Exit status: 0; 2 when the configuration can't be used; 4 when data or model can't be used; 130
    when interrupted; 1 otherwise.
    """
    with exit_status():
        loaded = load_config(TrainConfig, config, set or ())
        with ray_cluster(loaded.ray.address):
            try:
                from pipeline.train import training  # imports Ray, whose environment is set now
            except ImportError as error:
                raise ConfigError(
                    f"training needs Ray Train: pip install 'cvt-label[train]' ({error})"
                ) from None
            result = training.train(loaded, lambda metrics: _print_epoch(metrics, loaded.schedule.epochs))
    out.print(
        f"best: epoch {result.best['epoch']}, accuracy {result.best['accuracy']:.2%}; saved in {result.path}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_epoch(metrics: Mapping[str, float], epochs: int) -> None:
    out.print(
        f"epoch {metrics['epoch']}/{epochs}: train loss {metrics['train_loss']:.4f}, "
        f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.2%}, {metrics['seconds']:.0f} s",
        highlight=False,
    )


if __name__ == "__main__":
    run_alone(train)
