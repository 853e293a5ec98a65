"""Reading weights from files: safetensors and PyTorch's, whole or in shards, and TensorFlow's.

Nothing here unpickles anything but tensors. Tensors may be views of a mapped file: copy what is to stay.
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
from cvt.errors import CheckpointError
from cvt.preprocessing import FILE_NAME

_INDEX = ".index.json"


#: What is read of a folder that has several, the first first.
_PRECEDENCE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)


CONFIG_FILE = "config.json"

PREPROCESSOR_FILE = FILE_NAME


#: Of files that are checkpoints by themselves, or with the configuration beside them.
MICROSOFT_SUFFIXES = (".pth", ".pt")

TENSORFLOW_SUFFIX = ".h5"


def used_files(names: Iterable[str]) -> list[str]:
    """Of the paths in a folder, those that loading uses: configuration, and one kind of weights."""
    names = {name for name in names if "/" not in name}  # what lies deeper is of no interest
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
    """Reads one file of weights; the kind is told by its suffix, and is PyTorch's by default.

    Raises:
        CheckpointError: it can't be read, or holds something else; names the file.
    """
    readers: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        ".safetensors": safetensors.torch.load_file,
        TENSORFLOW_SUFFIX: _read_tensorflow,
    }
    try:
        return readers.get(file.suffix, _read_pytorch)(file)
    except CheckpointError:
        raise
    except Exception as error:  # files of any origin: whatever reading them raises is about them
        cause = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{file}: {cause}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        places = {key: PurePosixPath(place) for key, place in weight_map.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of weights with a weight_map: {error!r}") from error
    weights: dict[str, Tensor] = {}
    for place in sorted(set(places.values())):
        if len(place.parts) != 1:  # never out of the folder
            raise CheckpointError(f"{index}: weight_map: {str(place)!r} is not the name of a file beside it")
        shard = read_file(index.parent / place)
        lost = sorted(key for key in places if places[key] == place and key not in shard)
        if lost:
            raise CheckpointError(
                f"{index.parent / place}: has no {lost[0]}, which {index.name} places there"
            )
        weights |= shard
    return weights


def _read_pytorch(file: Path) -> dict[str, Tensor]:
    try:
        # Files of PyTorch before 1.6 are no zip archives, and can't be mapped.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks to report files that are refused below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # PyTorch's message names a way to unpickle all the same; better that nobody takes it.
        raise CheckpointError(
            f"{file}: damaged, or holds Python objects other than tensors, which are not unpickled because"
            " that would run code of the file's author"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not weights by name")
    weights: dict[str, Tensor] = {}
    for key, value in unwrapped(content).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {key!r} is a {type(value).__name__}, not a tensor")
        weights[str(key)] = value
    return weights


def _read_tensorflow(file: Path) -> dict[str, Tensor]:
    try:
        from cvt.checkpoints.tensorflow import read_h5

        return read_h5(file)
    except ImportError as error:
        raise CheckpointError(
            f"{file}: TensorFlow's weights need h5py: pip install 'cvt-label[keras]'"
        ) from error
