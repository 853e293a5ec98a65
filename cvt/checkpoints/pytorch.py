"""Reads weights from PyTorch files. The size of a file limits the memory that reading takes.

`torch.load` with `weights_only=True` runs no code from the file. But it inflates compressed entries, and
calls functions such as `bytearray` that allocate as much as the file asks for. So the pickles are checked
first. Tensors are views of the memory-mapped file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cvt.checkpoints.microsoft import unwrap_weights
from cvt.errors import CheckpointError

#: Maximum size of the pickle and of the list of entries, and number of operations in the pickle. A file for
#: CvT-W24 has 0.1 MB of each, and 30,000 operations.
_MAX_READ, _MAX_OPERATIONS = 4 * 1024**2, 250_000

#: Globals that `weights_only` allows, and that allocate as many values as the file asks for.
_ALLOCATING = re.compile(
    r"\w+ bytearray|torch[\w.]* (\w+Tensor|(Unt|T)ypedStorage|_rebuild_(qtensor|device_tensor)\w*)"
)


class _Stream(io.FileIO):
    """A file without large reads: `zipfile` reads the list of entries at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_READ:
            raise CheckpointError(f"the list of entries has {size:,} bytes, more than {_MAX_READ:,}")
        return super().read(size)


def read_pytorch(file: Path) -> dict[str, Tensor]:
    """Reads the weights of a PyTorch file, without wrappers and prefixes of training scripts."""
    try:
        _check_archive(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about files that raise an error below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own message explains how to unpickle the file anyway, which is unsafe.
        raise CheckpointError(
            "the file is damaged, or has Python objects other than tensors, which are not unpickled because"
            " unpickling can run code from the file"
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the content is a {type(content).__name__}, not a mapping of weights")
    weights: dict[str, Tensor] = {}
    for key, value in unwrap_weights(content, file.name).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} is a {type(value).__name__}, not a tensor")
        weights[key] = value
    size, total = file.stat().st_size, sum(tensor.nbytes for tensor in weights.values())
    if total > size:  # such as a tensor with a stride of 0
        raise CheckpointError(f"the weights have {total:,} bytes, but the file has only {size:,}")
    return weights


def _check_archive(file: Path) -> None:
    """Checks that the entries are stored in the file, and that pickles call no function that allocates."""
    with _Stream(file) as stream:
        if not zipfile.is_zipfile(stream):
            raise CheckpointError(
                "the file is damaged, or was written before PyTorch 1.6: copy it, or load and save it, again"
            )
        archive = zipfile.ZipFile(stream)
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("an entry is compressed: torch.save writes files without compression")
        if sum(entry.file_size for entry in entries) > file.stat().st_size:
            raise CheckpointError("the entries are larger than the file")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if (length := entry.file_size) > _MAX_READ:
                    raise CheckpointError(f"{entry.filename} has {length:,} bytes, more than {_MAX_READ:,}")
                for count, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(entry))):
                    if count == _MAX_OPERATIONS:
                        raise CheckpointError(f"{entry.filename} has more than {count:,} operations")
                    if opcode.name == "GLOBAL" and _ALLOCATING.fullmatch(str(argument)):
                        raise pickle.UnpicklingError(argument)
