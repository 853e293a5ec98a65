"""Label the same images with two models, and show where the models disagree.

    python examples/compare_models.py INPUT OUTPUT microsoft/cvt-13 microsoft/cvt-21

The labels of each model have their own partition under OUTPUT. Classes are matched by name.
"""

import argparse

from pipeline import compare_labels, label, load_job_config


def main() -> None:
    """Labels the input twice and prints the comparison."""
    parser = argparse.ArgumentParser(description="Label images with two models and compare the labels.")
    parser.add_argument("input", help="folder or URI of the images")
    parser.add_argument("output", help="folder or URI for the labels")
    parser.add_argument("model_a", help="Hub id or path of the first checkpoint")
    parser.add_argument("model_b", help="Hub id or path of the second checkpoint")
    arguments = parser.parse_args()

    partitions = []
    for model in (arguments.model_a, arguments.model_b):
        fields = {"input.uri": arguments.input, "output.uri": arguments.output, "model.path": model}
        overrides = [f"{field}={value}" for field, value in fields.items()]
        result = label(load_job_config(None, [*overrides, "ray.address=in-process"]))
        partitions.append(result.partition.uri)
        print(f"{model}: {partitions[-1]}")

    totals = compare_labels(*partitions).totals
    print(f"images that both models labeled: {totals['compared']}")
    if totals["compared"]:
        print(f"agreement: {totals['agreement']:.1%} of the images have the same label")
    if totals["kappa"] is not None:
        print(f"Cohen's kappa: {totals['kappa']:.3f} (agreement beyond chance; 1 is perfect)")
    print(f"population stability index of the classes: {totals['psi']:.3f}")
    for pair in totals["disagreements"][:5]:
        print(f"{pair['count']:>8}  {pair['a']} -> {pair['b']}")


if __name__ == "__main__":
    main()
