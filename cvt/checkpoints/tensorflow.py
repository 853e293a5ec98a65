"""Reads weights from the `tf_model.h5` of transformers 4's TensorFlow CvT classes.

Whether weights fit a model is checked by `cvt.checkpoints.weights.check_weights`.

Keras 2 wrote such a file: a group for each of `cvt`, `layernorm` and `classifier`, in which datasets have the
names of their variables. These are PyTorch's names except for the last part and the class token. Kernels have
the output channels last. The values are the same: the TensorFlow classes use PyTorch's epsilon of 1e-5 in all
norms (transformers 4.57, `models/cvt/modeling_tf_cvt.py`).
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

#: The name of the class token's variable, which has no groups.
_CLS_TOKEN = "cvt.encoder.stages.2.cls_token"

#: The last parts of names, and PyTorch's where they differ.
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}

#: Axes of a kernel in PyTorch's order, by its rank.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


def torch_name(name: str) -> str:
    """PyTorch's name of a variable of Keras: "a.dense.kernel" becomes "a.dense.weight"."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES.get(leaf, leaf)}"


def read_h5(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a TFCvtForImageClassification or a TFCvtModel of transformers 4.

    Returns:
        Float32 weights in PyTorch's layout, by the keys of a CvtForImageClassification.

    Raises:
        CheckpointError: a dataset cannot be a weight; names it.
        OSError: the file cannot be read as HDF5.
    """
    datasets: dict[str, np.ndarray] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, h5py.Dataset):
            datasets[name] = np.asarray(value[()])

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    weights: dict[str, Tensor] = {}
    for name, value in datasets.items():
        key = _key_of_dataset(name)
        if value.dtype.kind != "f" or key in weights:
            raise CheckpointError(f"{name} is not the dataset of a weight")
        tensor = torch.from_numpy(value).float()
        if name.endswith("/kernel:0") and tensor.ndim in TO_TORCH:
            tensor = tensor.permute(TO_TORCH[tensor.ndim])
        weights[key] = tensor.contiguous()
    return weights


def _key_of_dataset(name: str) -> str:
    """PyTorch's key, for a name such as cvt/tf_cvt_model/cvt/encoder/stages.0/.../kernel:0."""
    variable = name.removesuffix(":0")
    if variable.endswith(_CLS_TOKEN):
        return _CLS_TOKEN
    # The first two parts are the group and the model, whose name ends in a number for a second model.
    parts = variable.split("/")[2:]
    return torch_name(".".join(parts)) if len(parts) > 1 else name
