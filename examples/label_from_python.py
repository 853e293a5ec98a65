"""Label a folder of images from Python, then read the labels.

    python examples/label_from_python.py INPUT OUTPUT --model microsoft/cvt-13

INPUT is a folder or a URI with WebDataset tars, Parquet files or image files. The labels are written to
`OUTPUT/model=<name>-<fingerprint>/`. Run the command again to label only new and changed shards.
"""

import argparse
from collections import Counter

from pipeline import label, load_job_config


def main() -> None:
    """Labels the input and prints a summary."""
    parser = argparse.ArgumentParser(description="Label images, then read the labels.")
    parser.add_argument("input", help="folder or URI of the images")
    parser.add_argument("output", help="folder or URI for the labels")
    parser.add_argument("--model", default="fashion-mnist", help="Hub id or path of the checkpoint")
    arguments = parser.parse_args()

    config = load_job_config(
        None,  # or the path of a YAML file; the fields below override the values of the file
        [
            f"input.uri={arguments.input}",
            f"output.uri={arguments.output}",
            f"model.path={arguments.model}",
            "ray.address=in-process",  # no Ray: suitable for small datasets
        ],
    )
    result = label(config)
    print(f"images: {result.totals.images}, shards: {result.totals.shards}")
    print(f"labels: {result.partition.uri}")

    counts: Counter[str] = Counter()
    errors: list[str] = []
    for table in result.partition.read_labels(["key", "label", "error"]):  # one table per shard
        for row in table.to_pylist():
            if row["error"] is None:
                counts[row["label"]] += 1
            else:
                errors.append(f"{row['key']}: {row['error']}")
    for name, count in counts.most_common(5):
        print(f"{count:>8}  {name}")
    print(f"errors: {len(errors)}", *errors[:5], sep="\n    ")


if __name__ == "__main__":
    main()
