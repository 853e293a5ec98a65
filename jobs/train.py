"""Trains a model on labeled shards: `cvt-label train`."""

from collections.abc import Mapping

from jobs import console
from jobs.progress import ProgressView
from pipeline import TrainConfig, load_train_config, train_model


def train(config: console.YamlOption, set: console.SetOption = None) -> None:
    """Train or fine-tune a CvT on labeled shards.

    Prints the metrics of each epoch and saves the best model so far in the format that `label` loads. Run the
    same command again to resume an interrupted training, also within an epoch.

    More exit statuses: 2 if the output belongs to another training, or too few images have a target.
    """
    loaded = load_train_config(config, set or ())
    epochs = loaded.optimization.epochs
    with ProgressView("training") as view:
        result = train_model(
            loaded,
            on_epoch=lambda metrics: console.print_line(
                f"epoch {metrics['epoch']}/{epochs}: "
                f"train loss {metrics['train_loss']:.4f}, loss {metrics['loss']:.4f}, "
                f"accuracy {metrics['accuracy']:.2%}, {metrics['seconds']:.0f} s"
            ),
            on_progress=lambda progress: view.show_progress(*describe_progress(progress, loaded)),
        )
    best = result.best
    console.print_line(
        f"best: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}; saved in {result.path}"
    )


def describe_progress(progress: Mapping[str, float], config: TrainConfig) -> tuple[str, int, float]:
    """Describes epoch, step and loss; returns also the number of images so far and the completed fraction."""
    epoch, step, steps = progress["epoch"], progress["step"], progress["steps"]
    epochs = config.optimization.epochs
    text = f"epoch {epoch}/{epochs}, step {step:,}/{steps:,}, train loss {progress['train_loss']:.4f}"
    done = (epoch - 1) * steps + step
    return text, int(done * config.images_per_step), done / (epochs * steps)
