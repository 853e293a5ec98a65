"""Trains CvT on shards with targets, with Ray Train: model, data, training loop and checkpoints.

Shards are read and preprocessed as for labeling. The saved model has the format that labeling loads.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.nn.functional as F  # noqa: N812
from ray.train import Checkpoint, CheckpointConfig, DataConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from cvt.checkpoints import save_checkpoint
from cvt.modeling import CvtForImageClassification
from pipeline.config import InputConfig, OptimizationConfig, TrainConfig, make_storage
from pipeline.dataflow.training_images import labeled_images
from pipeline.read import ReadOptions, list_input_shards
from pipeline.storage import Storage
from pipeline.train.preparation import TrainingModel, make_training_model

_STATE_FILE = "training_state.pt"

#: Maximum size of a worker's shuffle buffer, in samples and in bytes of pixels.
_MAX_SHUFFLE_SAMPLES = 20_000
_MAX_SHUFFLE_BYTES = 1 << 30


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Attributes:
        path: path or URI of the folder with the best model, in the format that labeling loads.
        best: metrics of the best model's epoch.
    """

    path: str
    best: Mapping[str, float]


def train(config: TrainConfig, on_epoch: Callable[[Mapping[str, float]], None]) -> TrainResult:
    """Trains a model, or resumes an interrupted training. Ray must be connected.

    Args:
        config: the configuration of the training.
        on_epoch: called from another thread with the metrics of each epoch.

    Raises:
        StorageError, NoShardsError: the images cannot be listed.
        CheckpointError, ConfigError: the model cannot be loaded or created.
        ray.train.TrainingFailedError: a worker failed.
    """
    model, storage = make_training_model(config), make_storage(config.storage)
    sections = {"train": config.train, "validation": config.validation}
    data = {name: _dataset(storage, section, name, model) for name, section in sections.items()}
    if config.cache:
        data = {name: dataset.materialize() for name, dataset in data.items()}
    workers, epoch_metrics = config.workers, Queue()

    def report_epochs() -> None:
        for metrics in iter(epoch_metrics.get, None):
            on_epoch(metrics)

    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": config,
            "model": ray.put(model),
            "epoch_metrics": epoch_metrics,
            "steps_per_epoch": data["train"].count() // (workers.count * config.optimization.batch_size),
        },
        datasets=cast(dict[str, Any], data),
        # The first worker evaluates the whole validation set.
        dataset_config=DataConfig(datasets_to_split=["train"]),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": 0.5} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=config.output.name,
            storage_path=config.output.uri,
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="accuracy"),
        ),
    )
    listener = Thread(target=report_epochs, daemon=True)
    listener.start()
    try:
        result = trainer.fit()
    finally:
        epoch_metrics.put(None)
        listener.join()
    return _save_best(result, storage, f"{config.output.uri}/{config.output.name}/model")


def _dataset(storage: Storage, section: InputConfig, name: str, model: TrainingModel) -> ray.data.Dataset:
    names = model.model.config.id2label
    options = ReadOptions.from_config(section, [names[i] for i in range(len(names))])
    shards = list_input_shards(storage, section, f"{name}.uri")
    return labeled_images(shards, storage, options, model.preprocessor, section.max_image_pixels)


def _train_worker(arguments: dict[str, Any]) -> None:
    """Runs the training loop of one worker; reports metrics and a checkpoint after each epoch."""
    config: TrainConfig = arguments["config"]
    context = ray.train.get_context()
    threads = config.workers.threads or (os.cpu_count() or 1) // context.get_local_world_size()
    torch.set_num_threads(max(1, threads))
    optimization, finished_epochs = config.optimization, 0
    trainer = _Trainer(
        ray.get(arguments["model"]), optimization, arguments["steps_per_epoch"], get_device(), prepare_model
    )
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            finished_epochs = trainer.load(Path(folder))
    images = ray.train.get_dataset_shard("train")
    for epoch in range(finished_epochs, optimization.epochs):
        started = time.monotonic()
        torch.manual_seed(optimization.seed + epoch)
        metrics = {"epoch": epoch + 1, "train_loss": trainer.train_epoch(images, epoch)}
        if context.get_world_rank() == 0:
            metrics |= trainer.evaluate(ray.train.get_dataset_shard("validation"))
            metrics |= {"learning_rate": trainer.learning_rate, "seconds": time.monotonic() - started}
            arguments["epoch_metrics"].put(metrics)
            with tempfile.TemporaryDirectory() as folder:
                trainer.save(Path(folder), epoch + 1)
                ray.train.report(metrics, Checkpoint.from_directory(folder))
        else:
            ray.train.report(metrics)


class _Trainer:
    """The model, optimizer and learning rate schedule of one worker."""

    def __init__(
        self,
        model: TrainingModel,
        optimization: OptimizationConfig,
        steps_per_epoch: int,
        device: torch.device,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        if steps_per_epoch < 1:
            raise ValueError(
                "the section train has fewer images with targets per worker than optimization.batch_size: "
                "add images, or reduce optimization.batch_size or workers.count"
            )
        self._optimization = optimization
        # The optimizer state depends on these settings. A training can resume only with the same values.
        self._settings = optimization.model_dump(
            include={"batch_size", "learning_rate", "weight_decay", "warmup_epochs"}
        )
        self._model, self._preprocessor = model
        self._device = device
        self._parallel = prepare(self._model)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        # Weight decay applies to matrices and filters, not to biases and normalization layers.
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optimization.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=optimization.learning_rate)
        warmup, total = (
            epochs * steps_per_epoch for epochs in (optimization.warmup_epochs, optimization.epochs)
        )
        self._scheduler = get_cosine_schedule_with_warmup(self._optimizer, int(warmup), total)

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    def train_epoch(self, images: ray.data.DataIterator, epoch: int) -> float:
        """Trains for one epoch; returns the mean loss."""
        optimization = self._optimization
        self._parallel.train()
        losses = []
        max_samples = _MAX_SHUFFLE_BYTES // (self._preprocessor.size**2 * 3)
        buffer = max(optimization.batch_size, min(_MAX_SHUFFLE_SAMPLES, max_samples))
        for pixels, targets in self._batches(
            images,
            optimization.batch_size,
            partial(augment, flip=optimization.horizontal_flip, shift=optimization.max_shift),
            drop_last=True,  # all workers take the same number of steps
            local_shuffle_buffer_size=buffer,
            local_shuffle_seed=optimization.seed + epoch,
        ):
            logits = self._parallel(pixels).logits
            loss = F.cross_entropy(logits, targets, label_smoothing=optimization.label_smoothing)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), optimization.max_grad_norm)
            self._optimizer.step()
            self._scheduler.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean().item()

    @torch.inference_mode()
    def evaluate(self, images: ray.data.DataIterator) -> dict[str, float]:
        """Returns loss and top-1 accuracy over all images."""
        self._model.eval()
        loss = correct = count = 0.0
        for pixels, targets in self._batches(images, 256):
            logits = self._model(pixels).logits
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += (logits.argmax(dim=1) == targets).sum().item()
            count += len(targets)
        if not count:
            raise ValueError(
                "the section validation has no image with a target: check validation.uri and its label field"
            )
        return {"loss": loss / count, "accuracy": correct / count}

    def save(self, folder: Path, finished_epochs: int) -> None:
        """Writes the model and the training state after `finished_epochs` epochs."""
        save_checkpoint(self._model, self._preprocessor, folder)
        state = {
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "settings": self._settings,
            "epoch": finished_epochs,
        }
        torch.save(state, folder / _STATE_FILE)

    def load(self, folder: Path) -> int:
        """Loads the files that `save` wrote; returns the number of finished epochs."""
        saved = CvtForImageClassification.from_pretrained(folder, dtype=torch.float32)
        self._model.load_state_dict(saved.state_dict())
        state = torch.load(folder / _STATE_FILE, weights_only=True, map_location=self._device)
        if state["settings"] != self._settings:
            raise ValueError(
                f"the training of this name was started with {state['settings']}, not {self._settings}: "
                "use the same settings, or another output.name"
            )
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        return int(state["epoch"])

    def _batches(
        self,
        images: ray.data.DataIterator,
        batch_size: int,
        augment: Callable[[Tensor], Tensor] = lambda pixels: pixels,
        **options: Any,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalized pixels (n, 3, size, size) in channels-last memory, and targets (n,)."""
        size, device = self._preprocessor.size, self._device
        mean = torch.tensor(self._preprocessor.mean, device=device).view(-1, 1, 1)
        std = torch.tensor(self._preprocessor.std, device=device).view(-1, 1, 1)
        batches = images.iter_batches(batch_size=batch_size, batch_format="pyarrow", **options)
        for batch in cast(Iterable[pa.Table], batches):
            flat = batch["image"].combine_chunks().flatten().to_numpy()
            pixels = torch.from_numpy(flat.reshape(-1, size, size, 3).copy()).to(device)
            targets = torch.from_numpy(batch["target"].to_numpy().astype(np.int64)).to(device)
            augmented = augment(pixels.permute(0, 3, 1, 2))
            yield (augmented * self._preprocessor.rescale_factor - mean) / std, targets


def augment(images: Tensor, *, flip: bool, shift: int) -> Tensor:
    """Flips half of the images (n, c, h, w) horizontally, and shifts each by up to `shift` pixels per axis.

    Uncovered pixels are black.
    """
    n, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + torch.randint(0, 2 * shift + 1, (n, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(0, 2 * shift + 1, (n, 1), device=device)
    if flip:
        is_flipped = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(is_flipped, columns.flip(1), columns)
    padded = F.pad(images, (shift, shift, shift, shift))
    sample = torch.arange(n, device=device).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)


def _save_best(result: ray.train.Result, storage: Storage, uri: str) -> TrainResult:
    """Copies the best checkpoint, without the training state, to the folder `uri`."""
    assert result.best_checkpoints  # every epoch reports one
    best, metrics = max(result.best_checkpoints, key=lambda pair: pair[1]["accuracy"])
    with best.as_directory() as folder:
        for file in sorted(Path(folder).iterdir()):
            if file.name != _STATE_FILE:
                storage.write(f"{uri}/{file.name}", file.read_bytes())
    return TrainResult(uri, metrics)
