"""Fine-tune a checkpoint on labeled shards, then label other images with the result.

    python examples/fine_tune_then_label.py TRAIN VALIDATION INPUT OUTPUT --classes cat dog

TRAIN and VALIDATION contain WebDataset tars with `.cls` files, or Parquet files with a label column. Training
runs on a local Ray and needs `pip install -c constraints.txt '.[train]'`. Run the command again to resume.
"""

import argparse
import json
from collections.abc import Mapping

from pipeline import label, load_job_config, load_train_config, train_model


def show_epoch(metrics: Mapping[str, float]) -> None:
    """Prints the metrics of one epoch."""
    print(f"epoch {metrics['epoch']}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}")


def main() -> None:
    """Trains, labels, and prints where the results are."""
    parser = argparse.ArgumentParser(description="Fine-tune a checkpoint, then label images with the result.")
    parser.add_argument("train", help="folder or URI of the labeled images for training")
    parser.add_argument("validation", help="folder or URI of the labeled images for validation")
    parser.add_argument("input", help="folder or URI of the images to label")
    parser.add_argument("output", help="folder or URI for the model and the labels")
    parser.add_argument("--classes", nargs="+", required=True, help="names of the classes, by class index")
    parser.add_argument("--model", default="fashion-mnist", help="Hub id or path of the checkpoint")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the images (default: 10)")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step (default: 32)")
    arguments = parser.parse_args()

    training = [
        f"train.uri={arguments.train}",
        f"validation.uri={arguments.validation}",
        f"model.pretrained={arguments.model}",
        f"model.labels={json.dumps(arguments.classes)}",
        f"output.uri={arguments.output}/training",
        f"optimization.epochs={arguments.epochs}",
        f"optimization.batch_size={arguments.batch_size}",
        "optimization.learning_rate=1e-4",
        "workers.count=0",  # in this process
    ]
    trained = train_model(load_train_config(None, training), on_epoch=show_epoch)
    print(f"model: {trained.path}, accuracy {trained.best['accuracy']:.1%}")

    labeling = [
        f"input.uri={arguments.input}",
        f"output.uri={arguments.output}/labels",
        f"model.path={trained.path}",
        "ray.address=in-process",
    ]
    result = label(load_job_config(None, labeling))
    print(f"labels of {result.totals.images} images: {result.partition.uri}")


if __name__ == "__main__":
    main()
