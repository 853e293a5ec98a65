"""Creates tf-tiny: a checkpoint of transformers' TFCvtForImageClassification, and its outputs.

Needs transformers 4 and TensorFlow 2. The fixture was created with Python 3.11, transformers 4.57.6,
TensorFlow 2.19.1 and tf_keras 2.19.0. Run in the root of the repository:

    python tests/cvt/data/make_tf_fixture.py tests/cvt/data/tf-tiny

Writes config.json, tf_model.h5 and outputs.npz: pixel_values (2, 3, 40, 48), labels (2,), logits (2, 4),
last_hidden_state (2, 24, 3, 3), and losses (2,), one per image.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from transformers import CvtConfig, TFCvtForImageClassification


def main(folder: Path) -> None:
    random = np.random.default_rng(0)
    labels = ["ant", "bee", "cat", "dog"]
    config = CvtConfig(
        embed_dim=[8, 16, 24],
        num_heads=[1, 2, 3],
        depth=[1, 2, 3],
        mlp_ratio=[2.0, 2.0, 2.0],
        qkv_bias=[True, False, True],
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        image_size=48,  # required: the class raises an error without image_size
    )
    model = TFCvtForImageClassification(config)
    pixels = random.normal(size=(2, 3, 40, 48)).astype(np.float32)
    model(pixels)
    for variable in model.weights:
        name, shape = variable.name, variable.shape
        if name.endswith("kernel:0"):
            value = random.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
        elif name.endswith(("gamma:0", "moving_variance:0")):
            value = random.uniform(0.5, 1.5, shape)
        else:
            value = random.normal(0, 0.2, shape)
        variable.assign(value.astype(np.float32))
    classes = np.array([3, 1])
    outputs = model(pixels, labels=tf.constant(classes), output_hidden_states=True)
    model.save_pretrained(folder, safe_serialization=False)
    np.savez_compressed(
        folder / "outputs.npz",
        pixel_values=pixels,
        labels=classes,
        logits=outputs.logits.numpy(),
        last_hidden_state=outputs.hidden_states[-1].numpy(),
        losses=outputs.loss.numpy(),
    )
    print(outputs.logits.numpy(), outputs.loss.numpy())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
