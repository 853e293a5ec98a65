"""Trains CvT on shards with targets, with Ray Train: data, training loop, progress and state."""

from __future__ import annotations

import io
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
import torch.nn.functional as F  # noqa: N812
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import RunConfig, ScalingConfig
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchTrainer, get_device, prepare_model
from ray.util.queue import Queue
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from cvt.checkpoints import save_checkpoint
from pipeline.config import ConfigError, OptimizationConfig, ReadConfig
from pipeline.dataflow.ray_executor import count_attempts
from pipeline.dataflow.training_images import TrainingImages
from pipeline.decode import DecodeOptions
from pipeline.read import ReadOptions
from pipeline.storage import StorageError
from pipeline.text import pluralize
from pipeline.train.preparation import PreparedTraining, TrainingModel, TrainResult, write_output

logger = logging.getLogger("cvt_label")

#: Maximum size of a worker's shuffle buffer, in bytes of pixels.
_MAX_SHUFFLE_BYTES = 1 << 30

Metrics = Mapping[str, float]


def train(
    prepared: PreparedTraining,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
    on_progress: Callable[[Metrics], None] = lambda progress: None,
    progress_interval_s: float = 1.0,
) -> TrainResult:
    """Trains a model, or resumes an interrupted training, as `train_model` does. Ray must be connected."""
    config, workers = prepared.config, prepared.config.workers
    events, attempts = Queue(actor_options={"num_cpus": 0}), count_attempts(4)
    images = {name: _load_images(prepared, name, attempts, events) for name in prepared.shards}
    if not (steps := images["train"].usable // config.images_per_step):
        raise ConfigError(
            f"train.uri: too few images with a target for a step, which needs {config.images_per_step}: add "
            "images, or reduce optimization.batch_size or workers.count"
        )
    trainer = TorchTrainer(
        cast(Any, _train_worker),  # Ray's type does not allow a result
        train_loop_config={
            "prepared": ray.put(prepared),
            "images": images,
            "steps": steps,
            "events": events,
            "progress_interval_s": progress_interval_s,
        },
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": 0.5} | ({"GPU": 1} if workers.use_gpu else {}),
        ),
        # In memory: Ray Train has nothing to store, because the first worker writes the state.
        run_config=RunConfig(
            name=config.output.name,
            storage_path="/",
            storage_filesystem=PyFileSystem(FSSpecHandler(MemoryFileSystem())),
        ),
    )
    outcome: Future[Metrics] = Future()

    def fit() -> None:
        try:
            outcome.set_result(cast(Any, trainer.fit()).return_value)
        except BaseException as error:
            outcome.set_exception(error)
        with suppress(Exception):  # after an interrupt, nobody listens
            events.put(None)

    # Not in the main thread, where Ray Train would replace the handler of Ctrl-C.
    thread = Thread(target=fit, daemon=True)
    thread.start()
    try:
        for event in iter(events.get, None):
            if isinstance(event, StorageError):
                raise event
            (on_progress if "step" in event else on_epoch)(event)
        return TrainResult(config.model_uri, outcome.result())
    finally:
        events.shutdown(force=True)  # a worker that is still running fails when it reports next
        thread.join(5)
        ray.kill(attempts)


def _load_images(prepared: PreparedTraining, name: str, attempts: Any, queue: Queue) -> TrainingImages:
    """Decodes the images of a section once, and reports which of them cannot be used.

    Raises `ConfigError` if they are too many, and `StorageError` if a shard cannot be read.
    """
    config, section = prepared.config, getattr(prepared.config, name)
    model, preprocessor, _ = prepared.model
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    images = TrainingImages(
        prepared.shards[name],
        prepared.storage,
        ReadOptions(section, ReadConfig(concurrent_fetches=1, chunk_bytes=4 * 1024**2), labels),
        DecodeOptions(preprocessor, section.max_image_pixels),
        attempts,
        queue,
    )
    logger.info("%s: decoding the images of %s", name, pluralize(len(images.shards), "shard"))
    if unreadable := images.load(config.cache):
        count = pluralize(len(unreadable), "shard")
        causes = "; ".join(unreadable[:3])
        raise StorageError(str(section.inputs), f"{count} cannot be read to the end: {causes}")
    skipped = images.skipped.total()
    total = images.usable + skipped
    reasons = "".join(f", {reason}: {count:,}" for reason, count in images.skipped.most_common())
    summary = f"{name}: {pluralize(total, 'image')}, {skipped:,} skipped{reasons}"
    if skipped > config.max_skipped_fraction * total or not images.usable:
        raise ConfigError(
            f"{summary}; the limit is {config.max_skipped_fraction:.0%} (max_skipped_fraction). Check the "
            f"labels in the shards, {name}.label_from, {name}.label_field, {name}.label_column, "
            f"{name}.target_map and the model's labels"
        )
    logger.log(logging.WARNING if skipped else logging.INFO, "%s", summary)
    return images


def _train_worker(job: dict[str, Any]) -> Metrics | None:
    """Runs the training loop of one worker; returns the metrics of the best epoch."""
    prepared: PreparedTraining = ray.get(job["prepared"])
    config, optimization = prepared.config, prepared.config.optimization
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if config.workers.count or config.workers.threads:
        threads = config.workers.threads or (os.cpu_count() or 1) // context.get_local_world_size()
        torch.set_num_threads(max(1, threads))
    trainer = _Trainer(prepared.model, optimization, job["steps"], get_device(), prepare_model, rank)
    if prepared.state is not None:
        trainer.load(prepared.state)
    reporter = _Reporter(prepared, trainer, job) if rank == 0 else None
    while trainer.epoch < optimization.epochs:
        images: Any = None
        if rank == 0:
            images = job["images"]["train"].dataset(f"{optimization.seed}:{trainer.epoch}")
        if workers > 1:
            splits = images and images.streaming_split(workers, equal=True)
            images = broadcast_from_rank_zero(splits)[rank]
        for pixels, targets in trainer.batches(images):
            trainer.train_step(pixels, targets)
            if reporter is not None:
                reporter.after_step()
        train_loss = trainer.finish_epoch()
        if reporter is not None:
            reporter.after_epoch(train_loss)
    return trainer.best


class _Reporter:
    """Reports to the driver, and writes state and model; only in the first worker."""

    def __init__(self, prepared: PreparedTraining, trainer: _Trainer, job: dict[str, Any]) -> None:
        self._prepared, self._trainer, self._job = prepared, trainer, job
        self._epoch_started = self._reported = time.monotonic()
        self._version = prepared.version
        self._write_state()  # fails now if the output cannot be written

    def after_step(self) -> None:
        """Writes the state and reports the progress, each after its interval."""
        now, trainer, config = time.monotonic(), self._trainer, self._prepared.config
        if now - self._written >= config.output.checkpoint_interval_s:
            self._write_state()
        if now - self._reported >= self._job["progress_interval_s"]:
            self._reported = now
            progress = {
                "epoch": trainer.epoch + 1,
                "step": trainer.step,
                "steps": self._job["steps"],
                "train_loss": trainer.loss,
            }
            self._job["events"].put(progress)

    def after_epoch(self, train_loss: float) -> None:
        """Evaluates the model, writes the model if it is the best, and writes the state."""
        trainer, started = self._trainer, self._epoch_started
        metrics = {"epoch": trainer.epoch, "train_loss": train_loss}
        metrics |= trainer.evaluate(self._job["images"]["validation"].dataset())
        self._epoch_started = time.monotonic()
        metrics |= {"learning_rate": trainer.learning_rate, "seconds": self._epoch_started - started}
        if trainer.best is None or metrics["accuracy"] > trainer.best["accuracy"]:
            trainer.best = metrics
            self._write_model()
        self._write_state()
        self._job["events"].put(metrics)

    def _write_model(self) -> None:
        """Replaces the best model, so that its folder can be loaded at any moment.

        The models of a training differ in their weights only, which are written last, in one atomic step.
        """
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(self._trainer.model, self._prepared.model.preprocessor, Path(folder))
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.suffix == ".safetensors"):
                self._write(f"{self._prepared.config.model_uri}/{file.name}", file.read_bytes())

    def _write_state(self) -> None:
        content = io.BytesIO()
        torch.save({"settings": dict(self._prepared.settings), **self._trainer.state()}, content)
        self._write(self._prepared.config.state_uri, content.getvalue())
        self._written = time.monotonic()

    def _write(self, uri: str, content: bytes) -> None:
        try:
            self._version = write_output(self._prepared, self._version, uri, content)
        except StorageError as error:
            self._job["events"].put(error)
            raise


class _Trainer:
    """The model, optimizer, learning rate schedule and position (finished epochs and steps) of one worker."""

    def __init__(
        self,
        model: TrainingModel,
        optimization: OptimizationConfig,
        steps_per_epoch: int,
        device: torch.device,
        prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
        rank: int = 0,
    ) -> None:
        self.epoch, self.step, self.best = 0, 0, cast(Metrics | None, None)
        self._optimization, self._steps_per_epoch, self._rank = optimization, steps_per_epoch, rank
        self.model, self._preprocessor, _ = model
        self._device, self._loss_sum = device, torch.zeros((), device=device)
        self._parallel = prepare(self.model)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
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

    @property
    def loss(self) -> float:
        """Mean training loss of the current epoch so far."""
        return self._loss_sum.item() / max(1, self.step)

    def batches(self, images: ray.data.Dataset | ray.data.DataIterator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the augmented batches of the current epoch, after those of finished steps.

        They depend on seed, epoch, step and worker only: a resumed epoch continues with the same batches.
        """
        settings, size = self._optimization, self._preprocessor.size
        shuffled = images.iter_batches(
            batch_size=settings.batch_size,
            batch_format="pyarrow",
            drop_last=True,  # all workers take the same number of steps
            local_shuffle_buffer_size=min(settings.shuffle_buffer, _MAX_SHUFFLE_BYTES // (size * size * 3)),
            local_shuffle_seed=settings.seed + self.epoch,
        )
        augmentation = partial(augment, flip=settings.horizontal_flip, shift=settings.max_shift)
        for step, batch in enumerate(islice(shuffled, self.step, self._steps_per_epoch), self.step):
            seed = random.Random(f"{settings.seed}:{self.epoch}:{step}:{self._rank}").getrandbits(63)
            torch.manual_seed(seed)
            yield self._tensors(batch, augmentation)

    def train_step(self, pixels: Tensor, targets: Tensor) -> None:
        """Updates the model with normalized pixels (n, 3, size, size) and targets (n,)."""
        self.model.train()
        logits = self._parallel(pixels).logits
        loss = F.cross_entropy(logits, targets, label_smoothing=self._optimization.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._optimization.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        self._loss_sum += loss.detach()
        self.step += 1

    def finish_epoch(self) -> float:
        """Starts the next epoch; returns the mean training loss of the finished one."""
        loss = self.loss
        self._loss_sum.zero_()
        self.epoch, self.step = self.epoch + 1, 0
        return loss

    @torch.inference_mode()
    def evaluate(self, images: ray.data.Dataset) -> dict[str, float]:
        """Returns loss and top-1 accuracy over all images."""
        self.model.eval()
        loss = correct = count = 0.0
        for batch in images.iter_batches(batch_size=256, batch_format="pyarrow"):
            pixels, targets = self._tensors(batch)
            logits = self.model(pixels).logits
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += (logits.argmax(dim=1) == targets).sum().item()
            count += len(targets)
        return {"loss": loss / count, "accuracy": correct / count}

    def state(self) -> dict[str, Any]:
        """Returns the state with which a training continues from the current step."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self._loss_sum.item(),
            "best": self.best,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continues from a result of `state`."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self._loss_sum.fill_(state["loss_sum"])

    def _tensors(
        self, batch: pa.Table, augment: Callable[[Tensor], Tensor] = lambda pixels: pixels
    ) -> tuple[Tensor, Tensor]:
        """Returns normalized pixels (n, 3, size, size) in channels-last memory, and targets (n,)."""
        size, device = self._preprocessor.size, self._device
        mean = torch.tensor(self._preprocessor.mean, device=device).view(-1, 1, 1)
        std = torch.tensor(self._preprocessor.std, device=device).view(-1, 1, 1)
        flat = batch["image"].combine_chunks().flatten().to_numpy()
        pixels = torch.from_numpy(flat.reshape(-1, size, size, 3).copy()).to(device)
        targets = torch.from_numpy(batch["target"].to_numpy().astype(np.int64)).to(device)
        augmented = augment(pixels.permute(0, 3, 1, 2))
        return (augmented * self._preprocessor.rescale_factor - mean) / std, targets


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
