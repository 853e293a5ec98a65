"""Reads weights from files (safetensors, PyTorch, TensorFlow; whole or in shards) and checks that they fit.

Only tensors are unpickled. Tensors may be views of a mapped file: copy those that must not change. Making a
model of the weights belongs to `cvt.checkpoints.checkpoint`.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from torch import Tensor

from cvt.checkpoints.microsoft import unwrapped
from cvt.errors import CheckpointError, checkpoint_errors, listed
from cvt.preprocessing import FILE_NAME

_INDEX = ".index.json"

#: The kinds of weights in a folder. The first that is there is read.
_PRECEDENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = FILE_NAME

#: Files that are complete checkpoints, and files that need the configuration next to them.
MICROSOFT_SUFFIXES = (".pth", ".pt")
TENSORFLOW_SUFFIX = ".h5"


def used_files(names: Iterable[str]) -> list[str]:
    """The names in a folder that loading uses: configuration files, and one kind of weights."""
    names = {name for name in names if "/" not in name}
    used = sorted(names.intersection({CONFIG_FILE, PREPROCESSOR_FILE}))
    first = next((name for name in _PRECEDENCE if name in names), None)
    if first is not None:
        used.append(first)
    if first is not None and first.endswith(_INDEX):
        stem, dot, suffix = first.removesuffix(_INDEX).rpartition(".")
        # Shards are named model-00001-of-00002.safetensors, and so on.
        used += sorted(name for name in names if name.startswith(f"{stem}-") and name.endswith(dot + suffix))
    return used


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a folder in Hugging Face's layout, by the names in its files.

    Raises:
        CheckpointError: there are none, or they can't be read; names the file.
    """
    for name in _PRECEDENCE:
        file = folder / name
        if file.is_file():
            return _read_shards(file) if name.endswith(_INDEX) else read_file(file)
    raise CheckpointError(f"the folder has no weights: none of {', '.join(_PRECEDENCE)}")


def read_file(file: Path) -> dict[str, Tensor]:
    """Reads one file of weights, by its suffix; a file of another suffix is PyTorch's.

    Raises:
        CheckpointError: it cannot be read, or holds something else; names the file.
    """
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        ".safetensors": safetensors.torch.load_file,
        TENSORFLOW_SUFFIX: _read_tensorflow,
    }
    with checkpoint_errors(file):
        return readers.get(file.suffix, _read_pytorch)(file)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not those of a model, except that batch norm's counters may be missing.

    Args:
        weights: by the model's keys.
        expected: the model's state dict; may be on the meta device.

    Raises:
        CheckpointError: names the weights.
    """
    shared = weights.keys() & expected.keys()
    faults = {
        "missing": {key for key in expected.keys() - shared if not key.endswith(".num_batches_tracked")},
        "unexpected": weights.keys() - shared,
        "of another shape": {key for key in shared if weights[key].shape != expected[key].shape},
        "no floating-point numbers": {
            key for key in shared if expected[key].is_floating_point() > weights[key].is_floating_point()
        },
        "not finite": {key for key in shared if not weights[key].isfinite().all()},
    }
    if any(faults.values()):
        described = (f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys)
        raise CheckpointError(f"weights don't fit the configuration: {'; '.join(described)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    with checkpoint_errors(f"{index}: not an index of weights with a weight_map"):
        weight_map = json.loads(index.read_bytes())["weight_map"]
        places = {key: PurePosixPath(place) for key, place in weight_map.items()}
    weights: dict[str, Tensor] = {}
    for place in sorted(set(places.values())):
        if len(place.parts) != 1:  # do not leave the folder
            raise CheckpointError(f"{index}: weight_map: {str(place)!r} is not the name of a file beside it")
        shard_file = index.parent / place
        shard = read_file(shard_file)
        if lost := sorted(key for key in places if places[key] == place and key not in shard):
            raise CheckpointError(f"{shard_file}: has no {lost[0]}, which {index.name} places there")
        weights |= shard
    return weights


def _read_pytorch(file: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch asks to report files that are refused below
            # Files of PyTorch before 1.6 are not zip archives, and cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # PyTorch's own message describes how to unpickle the file anyway, which nobody should do.
        raise CheckpointError(
            "damaged, or holds Python objects other than tensors, which are not unpickled because that would"
            " run code of the file's author"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights by name")
    weights: dict[str, Tensor] = {}
    for key, value in unwrapped(content).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} is a {type(value).__name__}, not a tensor")
        weights[str(key)] = value
    return weights


def _read_tensorflow(file: Path) -> dict[str, Tensor]:
    from cvt.checkpoints.tensorflow import read_h5  # needs h5py, which few have

    return read_h5(file)
