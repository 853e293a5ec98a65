"""Weights of transformers 4's TensorFlow CvT classes, in their `tf_model.h5`, to PyTorch's and back.

Such a file is one that Keras 2 wrote: a group for each of `cvt`, `layernorm` and `classifier`, in
which datasets lie under the names of their variables. Names are PyTorch's but for the last part and
the class token; kernels have the output channels last. Values are the same: the TensorFlow classes
normalise with an epsilon of 1e-5 everywhere, in batch norm as in layer norm, which is PyTorch's
default and not Keras', so that there is nothing to correct (transformers 4.57,
`models/cvt/modeling_tf_cvt.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvt.errors import CheckpointError, some

try:
    import h5py
except ModuleNotFoundError as error:
    raise ImportError("reading and writing tf_model.h5 needs h5py: pip install 'cvt-label[keras]'") from error


#: The name of the class token's variable, whatever its stage and its model.
_CLS_TOKEN = "cvt.encoder.stages.2.cls_token"


_LEAVES = {
    "weight": "kernel",
    "bias": "bias",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}

_LEAVES_OF_NORMS = _LEAVES | {"weight": "gamma", "bias": "beta"}

_LEAVES_OF_TORCH = {theirs: ours for leaves in (_LEAVES, _LEAVES_OF_NORMS) for ours, theirs in leaves.items()}


#: Axes of a kernel, by its rank, in the other's order; of other ranks there are none, which models refuse.
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}

_TO_TENSORFLOW = {2: (1, 0), 4: (2, 3, 1, 0)}


_LAYER_NORMS = ("layernorm_before", "layernorm_after")

_HEAD = ("layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias")

_QKV = ("query", "key", "value")

_BIAS_OF_QKV = re.compile(r"projection_(query|key|value)\.bias")

_LAYER = re.compile(r"cvt\.encoder\.stages\.(\d+)\.layers\.(\d+)\.")


def variable_name(key: str) -> str:
    """The name of a parameter or buffer in Keras: "a.dense.weight" becomes "a.dense.kernel"."""
    module, _, leaf = key.rpartition(".")
    is_norm = module.rpartition(".")[2] in {"normalization", "layernorm", *_LAYER_NORMS}
    return f"{module}.{(_LEAVES_OF_NORMS if is_norm else _LEAVES).get(leaf, leaf)}"


def torch_name(name: str) -> str:
    """The reverse of `variable_name`."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES_OF_TORCH.get(leaf, leaf)}"


def _keys_of_layer(prefix: str, qkv_bias: bool) -> Iterator[str]:
    for part in _QKV:
        projection = f"{prefix}attention.attention.convolution_projection_{part}.convolution_projection."
        yield f"{projection}convolution.weight"
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            yield f"{projection}normalization.{leaf}"
    for part in _QKV:
        yield f"{prefix}attention.attention.projection_{part}.weight"
        if qkv_bias:
            yield f"{prefix}attention.attention.projection_{part}.bias"
    for module in ("attention.output.dense", "intermediate.dense", "output.dense", *_LAYER_NORMS):
        yield from (f"{prefix}{module}.{leaf}" for leaf in ("weight", "bias"))


def _expected(found: Iterable[str]) -> list[str]:
    """What a complete state dict holds, in PyTorch's order, going by the layers that some keys name."""
    found = set(found)
    depths: dict[int, int] = {0: 1}
    biased = set()
    for key in found:
        if match := _LAYER.match(key):
            stage, layer = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), layer + 1)
            if _BIAS_OF_QKV.search(key):
                biased.add(stage)
    keys = []
    for stage in range(max(depths) + 1):
        prefix = f"cvt.encoder.stages.{stage}."
        if f"{prefix}cls_token" in found:
            keys.append(f"{prefix}cls_token")
        for module in ("projection", "normalization"):
            keys += [
                f"{prefix}embedding.convolution_embeddings.{module}.{leaf}" for leaf in ("weight", "bias")
            ]
        for layer in range(depths.get(stage, 1)):
            keys += _keys_of_layer(f"{prefix}layers.{layer}.", stage in biased)
    return keys + (list(_HEAD) if found.intersection(_HEAD) else [])


def check_keys(found: Iterable[str], expected: Iterable[str], reason: str) -> None:
    """Refuses keys of weights that are not those expected.

    Raises:
        CheckpointError: gives the reason, and names the keys.
    """
    found, expected = set(found), set(expected)
    faults = {"missing": expected - found, "unknown": found - expected}
    if any(faults.values()):
        listed = "; ".join(f"{what}: {some(keys)}" for what, keys in faults.items() if keys)
        raise CheckpointError(f"{reason}: {listed}")


def read_h5(path: Path) -> dict[str, Tensor]:
    """Reads the weights of a TFCvtForImageClassification or a TFCvtModel of transformers 4.

    Args:
        path: a `tf_model.h5`.

    Returns:
        What `CvtForImageClassification.load_state_dict` takes, in float32 and PyTorch's layouts;
        without `num_batches_tracked`, and without `layernorm` and `classifier` for a TFCvtModel. The
        class token is the last stage's: files don't tell its stage, which is the last in all
        models that the TensorFlow classes can classify with.

    Raises:
        CheckpointError: the file can't be read, or holds other datasets than these models have;
            names them. The shapes, only a model can check.
    """
    datasets: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, h5py.Dataset):
            datasets[name] = np.asarray(value[()])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read as HDF5: {error}") from error

    names: dict[str, str] = {}
    for name, value in datasets.items():
        key = _key_of_dataset(name)
        # What can't be a weight, or is there twice, has no key but its own name, and is unknown by it.
        names[name if key in names or value.dtype.kind != "f" else key] = name
    if _CLS_TOKEN in names:
        names[f"cvt.encoder.stages.{_last_stage(names)}.cls_token"] = names.pop(_CLS_TOKEN)
    expected = _expected(names)
    check_keys(names, expected, f"{path}: not the weights of one of transformers' TensorFlow CvT classes")
    return {key: _to_torch_layout(names[key], datasets[names[key]]) for key in expected}


def _key_of_dataset(name: str) -> str:
    """PyTorch's key, of a name such as cvt/tf_cvt_model/cvt/encoder/stages.0/.../kernel:0."""
    variable = name.removesuffix(":0")
    if variable.endswith(_CLS_TOKEN):
        return _CLS_TOKEN
    # Ahead of it are the names of the group and of the model, which a second model has numbered.
    parts = variable.split("/")[2:]
    return torch_name(".".join(parts)) if len(parts) > 1 else name


def _last_stage(keys: Iterable[str]) -> int:
    return max((int(match[1]) for match in map(_LAYER.match, keys) if match), default=0)


def _to_torch_layout(name: str, value: Any) -> Tensor:
    """Of a kernel: (in, out) to (out, in), or (height, width, in, out) to (out, in, height, width)."""
    tensor = torch.from_numpy(value).float()
    if name.endswith("/kernel:0") and tensor.ndim in TO_TORCH:
        tensor = tensor.permute(TO_TORCH[tensor.ndim])
    return tensor.contiguous()


def _to_tensorflow_layout(name: str, tensor: Tensor) -> Tensor:
    """The reverse of `_to_torch_layout`."""
    if name.endswith("/kernel"):
        tensor = tensor.permute(_TO_TENSORFLOW[tensor.ndim])
    return tensor.contiguous()


def write_h5(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes weights as transformers 4's TFCvtForImageClassification or TFCvtModel would.

    Args:
        state: the state dict of a CvtForImageClassification. Without `layernorm` and `classifier`, the
            file is a TFCvtModel's. `num_batches_tracked` is left out.
        path: the file, usually named `tf_model.h5`; replaced if it exists. The folder's config.json
            needs an `image_size` (any) for those classes, which else raise NotImplementedError.

    Raises:
        CheckpointError: these classes can't have such weights; names the keys. They know no other
            `qkv_projection_method` than "dw_bn", and one class token, in the last stage.
    """
    state = {key: tensor for key, tensor in state.items() if not key.endswith(".num_batches_tracked")}
    expected = _expected(state)
    check_keys(state, expected, f"{path}: not weights that transformers' TensorFlow classes have")
    tokens = [key for key in expected if key.endswith(".cls_token")]
    if tokens not in ([], [f"cvt.encoder.stages.{_last_stage(expected)}.cls_token"]):
        raise CheckpointError(
            f"{path}: transformers' TensorFlow classes have a class token in the last stage only,"
            f" not: {', '.join(tokens)}"
        )
    model = "tf_cvt_for_image_classification" if "classifier.weight" in state else "tf_cvt_model"
    # Keras also reads weights by their order: all that is trained, then the rest.
    expected.sort(key=lambda key: ".running_" in key)
    groups: dict[str, dict[str, Tensor]] = {}
    for key in expected:
        variable = _CLS_TOKEN if key in tokens else f"{model}/{_path_of_variable(variable_name(key))}"
        tensor = _to_tensorflow_layout(variable, state[key].detach().cpu().float())
        groups.setdefault(key.split(".")[0], {})[f"{variable}:0"] = tensor
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


def _path_of_variable(name: str) -> str:
    """Slashes for dots, but within the name of a list's entry: stages.0/layers.1/output/dense/bias."""
    return re.sub(r"\.(?!\d)", "/", name)
