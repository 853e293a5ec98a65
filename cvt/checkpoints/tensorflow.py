"""Reads weights from the `tf_model.h5` of the TensorFlow CvT classes in transformers 4.

The file has the format of Keras 2: one dataset per variable, in a group for each of `cvt`, `layernorm` and
`classifier`. The names are PyTorch's, except for the last part and the class token. Kernels have the output
channels last. The classes are those of transformers 4.57, `models/cvt/modeling_tf_cvt.py`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
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

#: Permutation of the axes of a kernel to PyTorch's order, by rank.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def torch_name(name: str) -> str:
    """Converts the name of a Keras variable to PyTorch: "a.dense.kernel" becomes "a.dense.weight"."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES.get(leaf, leaf)}"


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
        if value.dtype.kind != "f" or key in weights:
            raise CheckpointError(f"{name}: not the dataset of a weight")
        remaining -= value.nbytes
        is_part_of_file = value.id.get_storage_size() >= value.nbytes and not value.external
        if remaining < 0 or value.chunks or not is_part_of_file:
            raise CheckpointError(
                f"{name}: the file does not contain the {value.nbytes:,} bytes of this dataset: write it"
                " without compression, chunks and references to other data"
            )
        tensor = torch.from_numpy(np.asarray(value[()])).float()
        if name.endswith("/kernel:0") and tensor.ndim in TO_TORCH:
            tensor = tensor.permute(TO_TORCH[tensor.ndim])
        weights[key] = tensor.contiguous()

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return weights


def _key_of_dataset(name: str) -> str:
    """Returns PyTorch's name for a dataset such as cvt/tf_cvt_model/cvt/encoder/stages.0/.../kernel:0."""
    variable = name.removesuffix(":0")
    if variable.endswith(_CLS_TOKEN):
        return _CLS_TOKEN
    # The first two parts are the group and the model. Keras adds a number to the name of a second model.
    parts = variable.split("/")[2:]
    return torch_name(".".join(parts)) if len(parts) > 1 else name
