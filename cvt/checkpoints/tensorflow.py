"""Reads weights from the `tf_model.h5` of the TensorFlow CvT classes in transformers 4.

The file has the format of Keras 2: one dataset per variable, in a group for each of `cvt`, `layernorm` and
`classifier`. The names are PyTorch's, except for the last part and the class token. Kernels have the output
channels last. The classes are those of transformers 4.57, `models/cvt/modeling_tf_cvt.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cvt.errors import CheckpointError

try:
    import h5py
except ModuleNotFoundError as error:
    raise ImportError("reading tf_model.h5 needs h5py: pip install 'cvt-label[keras]'") from error

#: Name of the class token. Its dataset is not in a nested group.
_CLS_TOKEN = "cvt.encoder.stages.2.cls_token"

#: Last parts of names in Keras that differ from PyTorch.
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

#: Maximum number of groups and datasets. CvT-W24 has about 1,400.
_MAX_OBJECTS = 10_000

#: Permutation of the axes of a variable to PyTorch's order, by rank. Kernels have rank 2 or 4.
TO_TORCH = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}


def read_h5(path: Path) -> dict[str, Tensor]:
    """Returns the weights in float32 with PyTorch's axes, by the names in CvtForImageClassification."""
    weights: dict[str, Tensor] = {}
    remaining, objects = path.stat().st_size, 0

    def visit(name: str, value: object) -> None:
        nonlocal remaining, objects
        objects += 1
        if objects > _MAX_OBJECTS:
            raise CheckpointError(f"more than {_MAX_OBJECTS:,} groups and datasets")
        if not isinstance(value, h5py.Dataset):
            return
        key = _key_of_dataset(name)
        # Values of a string or an object may share one place in the file.
        if value.dtype.kind != "f" or value.ndim not in TO_TORCH or key in weights:
            raise CheckpointError(f"{name}: not the dataset of a weight")
        remaining -= value.nbytes
        is_part_of_file = value.id.get_storage_size() >= value.nbytes and not value.external
        if remaining < 0 or value.chunks or not is_part_of_file:
            raise CheckpointError(
                f"{name}: the file does not contain the {value.nbytes:,} bytes of this dataset: write it"
                " without compression, chunks and references to other data"
            )
        tensor = torch.from_numpy(value[()]).float()
        weights[key] = tensor.permute(TO_TORCH[value.ndim]).contiguous()

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return weights


def _key_of_dataset(name: str) -> str:
    """Returns PyTorch's name for a dataset such as cvt/tf_cvt_model/cvt/encoder/stages.0/.../kernel:0."""
    variable = name.removesuffix(":0")
    if variable.endswith(_CLS_TOKEN):
        return _CLS_TOKEN
    # The first two parts are the group and the model. Keras adds a number to the name of a second model.
    *modules, leaf = variable.split("/")[2:] or [name]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)]) if modules else name
