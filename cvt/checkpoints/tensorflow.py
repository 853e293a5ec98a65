"""Weights in the `tf_model.h5` of transformers 4's TensorFlow CvT classes, read and written.

Whether weights fit a model is checked by `cvt.checkpoints.weights.check_weights`.

Keras 2 wrote such a file: a group for each of `cvt`, `layernorm` and `classifier`, in which datasets have the
names of their variables. These are PyTorch's names except for the last part and the class token. Kernels have
the output channels last. The values are the same: the TensorFlow classes use PyTorch's epsilon of 1e-5 in all
norms (transformers 4.57, `models/cvt/modeling_tf_cvt.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cvt.errors import CheckpointError

try:
    import h5py
except ModuleNotFoundError as error:
    raise ImportError("reading and writing tf_model.h5 needs h5py: pip install 'cvt-label[keras]'") from error

#: The name of the class token's variable, whatever its stage.
_CLS_TOKEN = "cvt.encoder.stages.2.cls_token"

_LEAVES = {"weight": "kernel", "running_mean": "moving_mean", "running_var": "moving_variance"}
_LEAVES_OF_NORMS = _LEAVES | {"weight": "gamma", "bias": "beta"}
_LEAVES_OF_TORCH = {theirs: ours for leaves in (_LEAVES, _LEAVES_OF_NORMS) for ours, theirs in leaves.items()}
_NORMS = {"normalization", "layernorm", "layernorm_before", "layernorm_after"}

#: Axes of a kernel in the order of the other framework, by its rank.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_TO_TENSORFLOW = {2: (1, 0), 4: (2, 3, 1, 0)}

_STAGE = re.compile(r"cvt\.encoder\.stages\.(\d+)\.")


def torch_name(name: str) -> str:
    """PyTorch's name of a variable of Keras: "a.dense.kernel" becomes "a.dense.weight"."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES_OF_TORCH.get(leaf, leaf)}"


def read_h5(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a TFCvtForImageClassification or a TFCvtModel of transformers 4.

    Returns:
        Float32 weights in PyTorch's layout, by the keys of a CvtForImageClassification. The class token is
        the last stage's: files do not name its stage, and the TensorFlow classes have no other.

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
    if _CLS_TOKEN in weights:
        weights[_last_cls_token(weights)] = weights.pop(_CLS_TOKEN)
    return weights


def _key_of_dataset(name: str) -> str:
    """PyTorch's key, for a name such as cvt/tf_cvt_model/cvt/encoder/stages.0/.../kernel:0."""
    variable = name.removesuffix(":0")
    if variable.endswith(_CLS_TOKEN):
        return _CLS_TOKEN
    # The first two parts are the group and the model, whose name ends in a number for a second model.
    parts = variable.split("/")[2:]
    return torch_name(".".join(parts)) if len(parts) > 1 else name


def _last_cls_token(keys: Iterable[str]) -> str:
    last = max((int(match[1]) for match in map(_STAGE.match, keys) if match), default=0)
    return f"cvt.encoder.stages.{last}.cls_token"


def write_h5(state: Mapping[str, Tensor], config: PreTrainedConfig, path: Path) -> None:
    """Writes weights as transformers 4's TFCvtForImageClassification or TFCvtModel would.

    Args:
        state: the state dict of a CvtForImageClassification; without `layernorm` and `classifier`, the file
            is a TFCvtModel's. `num_batches_tracked` is left out.
        config: the model's. Those classes need an `image_size` (any) in config.json.
        path: the file, usually named `tf_model.h5`; replaced if it exists.

    Raises:
        CheckpointError: those classes cannot have such weights.
    """
    lacks = "transformers' TensorFlow classes have no"
    if set(config.qkv_projection_method) != {"dw_bn"}:
        raise CheckpointError(f"{path}: {lacks} qkv_projection_method other than 'dw_bn'")
    if any(config.cls_token[:-1]):
        raise CheckpointError(f"{path}: {lacks} class token before the last stage")
    if "layernorm.weight" in state and config.num_labels == 0:
        raise CheckpointError(f"{path}: {lacks} classification without labels")
    model = "tf_cvt_for_image_classification" if "classifier.weight" in state else "tf_cvt_model"
    groups: dict[str, dict[str, Tensor]] = {}
    # Keras also reads weights by their order: all that is trained, then the rest.
    for key in sorted(state, key=lambda key: ".running_" in key):
        if key.endswith(".num_batches_tracked"):
            continue
        variable = _CLS_TOKEN if key.endswith(".cls_token") else f"{model}/{_path_of_variable(key)}"
        tensor = state[key].detach().cpu().float()
        if variable.endswith("/kernel"):
            tensor = tensor.permute(_TO_TENSORFLOW[tensor.ndim])
        groups.setdefault(key.split(".")[0], {})[f"{variable}:0"] = tensor.contiguous()
    with h5py.File(path, "w") as file:
        file.attrs["backend"] = "tensorflow"
        file.attrs["keras_version"] = "2.19.0"
        file.attrs["layer_names"] = list(groups)
        for name, variables in groups.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = list(variables)
            for variable, tensor in variables.items():
                group.create_dataset(variable, data=tensor.numpy())
        file.create_group("top_level_model_weights").attrs["weight_names"] = []


def _path_of_variable(key: str) -> str:
    """The variable of a key, such as cvt/encoder/stages.0/layers.1/output/dense/bias."""
    module, _, leaf = key.rpartition(".")
    leaves = _LEAVES_OF_NORMS if module.rpartition(".")[2] in _NORMS else _LEAVES
    # The number of an entry belongs to the list's name.
    return re.sub(r"\.(?!\d)", "/", f"{module}.{leaves.get(leaf, leaf)}")
