"""Training on labeled shards with Ray Train: a new model, or fine-tuning.

Ray is imported when a training starts, not with this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pipeline.config import ConfigError, TrainConfig
from pipeline.dataflow.ray_cluster import ray_cluster

if TYPE_CHECKING:
    from pipeline.train.preparation import TrainResult


def train_model(
    config: TrainConfig,
    *,
    on_epoch: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    on_progress: Callable[[Mapping[str, float]], None] = lambda progress: None,
) -> TrainResult:
    """Trains a new CvT or fine-tunes a checkpoint; resumes an interrupted training of the same name.

    Args:
        config: the configuration of the training.
        on_epoch: called after each epoch, with `epoch`, `train_loss`, `loss`, `accuracy`, `learning_rate`
            and `seconds`.
        on_progress: called about every second during an epoch, with `epoch`, `step`, `steps` (of the epoch)
            and `train_loss`.

    Returns:
        The result. `path` is the URI of the folder with the best model, which `model.path` of a labeling
        job accepts. `best` has the metrics of the best epoch.

    Raises:
        ConfigError: Ray Train is not installed, the model is not possible, the output belongs to another
            training, or too few images have a target.
        ConnectionError: no Ray cluster answers at `ray.address`.
        StorageError, NoShardsError: the images cannot be listed or read, or the output cannot be written.
        CheckpointError: the checkpoint cannot be loaded.
        ray.train.TrainingFailedError: a worker failed.
    """
    from pipeline.train.preparation import TrainResult, prepare_training  # this import takes seconds

    prepared = prepare_training(config)
    if prepared.state is not None and prepared.state["epoch"] >= config.optimization.epochs:
        return TrainResult(config.model_uri, prepared.state["best"])
    with ray_cluster(config.ray.address):
        try:
            # Ray reads environment variables when it is imported, and `ray_cluster` sets them.
            from pipeline.train import training
        except ImportError as error:
            raise ConfigError(f"training needs Ray Train: pip install 'cvt-label[train]' ({error})") from None
        return training.train(prepared, on_epoch, on_progress)
