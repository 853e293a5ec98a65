"""Trains a model on labeled shards: `python -m jobs.train --config FILE`, or `cvt-label train`."""

from collections.abc import Mapping
from datetime import timedelta

from jobs import console
from jobs.progress import ProgressView
from pipeline import load_train_config, train_model


@console.exit_on_error()
def train(
    config: console.YamlOption,
    set: console.SetOption = None,
) -> None:
    """Train or fine-tune a CvT on labeled shards.

    Prints the metrics of each epoch and saves the best model so far in the format that `label` loads. Run the
    same command again to resume an interrupted training, also within an epoch.

    More exit statuses: 2 if the output belongs to another training, or too few images have a target.
    """
    loaded = load_train_config(config, set or ())
    epochs = loaded.optimization.epochs
    console.log_to_stderr()
    with ProgressView("training") as view:
        result = train_model(
            loaded,
            on_epoch=lambda metrics: console.print_line(
                f"epoch {metrics['epoch']}/{epochs}: "
                f"train loss {metrics['train_loss']:.4f}, loss {metrics['loss']:.4f}, "
                f"accuracy {metrics['accuracy']:.2%}, {metrics['seconds']:.0f} s"
            ),
            on_progress=lambda progress: view.show_progress(*describe_progress(progress, epochs)),
        )
    best = result.best
    console.print_line(
        f"best: epoch {best['epoch']}, accuracy {best['accuracy']:.2%}; saved in {result.path}"
    )


def describe_progress(progress: Mapping[str, float], epochs: int) -> tuple[str, float]:
    """Describes epoch, step, loss, rate and remaining time; returns also the completed fraction."""
    epoch, step, steps = progress["epoch"], progress["step"], progress["steps"]
    text = (
        f"epoch {epoch}/{epochs}, step {step:,}/{steps:,}, train loss {progress['train_loss']:.4f}, "
        f"{progress['images_per_s']:,.1f} images/s, remaining "
        f"{timedelta(seconds=round(progress['remaining_s']))}"
    )
    return text, ((epoch - 1) * steps + step) / (epochs * steps)


if __name__ == "__main__":
    console.run_command(train)
