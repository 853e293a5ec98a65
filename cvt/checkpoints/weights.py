"""Reads weights from safetensors, PyTorch and TensorFlow files, single or sharded, and checks them.

All tensors of a file together are never larger than the file. They may be views of a memory-mapped file: copy
tensors that must not change. `cvt.checkpoints.checkpoint` creates the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import safetensors.torch
import torch
from torch import Tensor

from cvt.checkpoints.files import INDEX_SUFFIX, TENSORFLOW_SUFFIX, WEIGHTS_FILES
from cvt.checkpoints.pytorch import read_pytorch
from cvt.errors import MAX_TEXT_BYTES, CheckpointError, checkpoint_errors, read_text_bytes

#: Maximum number of weights in a file. Every valid architecture has fewer.
_MAX_WEIGHTS = 10_000
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Reads the weights of a folder in the Hugging Face layout. Names stay unchanged."""
    for name in WEIGHTS_FILES:
        file = folder / name
        if file.is_file():
            return _read_shards(file) if name.endswith(INDEX_SUFFIX) else read_file(file)
    raise CheckpointError(f"the folder has no weights: none of {', '.join(WEIGHTS_FILES)}")


def read_file(file: Path) -> dict[str, Tensor]:
    """Reads a file of weights: safetensors or TensorFlow by its suffix, else PyTorch."""
    with checkpoint_errors(file, "; the file is damaged or incomplete: copy it again"):
        if file.suffix == TENSORFLOW_SUFFIX:
            from cvt.checkpoints.tensorflow import read_h5  # needs h5py, an optional dependency

            return read_h5(file)
        return _read_safetensors(file) if file.suffix == ".safetensors" else read_pytorch(file)


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Checks that weights fit the state dict of a model. The counters of batch norm may be missing.

    Raises:
        CheckpointError: weights do not fit. The message names the weights.
    """
    shared = weights.keys() & expected.keys()
    values = {key for key in shared if expected[key].is_floating_point()}  # all but the counters
    problems = {
        "missing": {key for key in expected.keys() - shared if not key.endswith(".num_batches_tracked")},
        "unexpected": weights.keys() - shared,
        "wrong shape": {key for key in shared if weights[key].shape != expected[key].shape},
        "not float16, bfloat16, float32 or float64": {k for k in values if weights[k].dtype not in _TYPES},
    }
    if not any(problems.values()):
        problems["not finite"] = {  # in float32, the type of the model
            key for key in values if not all(map(torch.isfinite, weights[key].float().aminmax()))
        }
    if any(problems.values()):
        details = [
            f"{problem}: {', '.join(sorted(keys)[:8])}"
            + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            for problem, keys in problems.items()
            if keys
        ]
        raise CheckpointError(f"weights do not fit the configuration: {'; '.join(details)}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    with checkpoint_errors(f"{index}: not an index of weights with a weight_map"):
        content = read_text_bytes(index)
        if content.count(b":") > _MAX_WEIGHTS:
            raise CheckpointError(f"more than {_MAX_WEIGHTS:,} names")
        files = {PurePosixPath(file) for file in json.loads(content)["weight_map"].values()}
    weights: dict[str, Tensor] = {}
    for file in sorted(files):
        if len(file.parts) != 1:  # the file must be in the same folder
            raise CheckpointError(f"{index}: weight_map: {str(file)!r} is not a file name without a folder")
        weights |= read_file(index.parent / file)
    return weights


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
        if header > MAX_TEXT_BYTES:
            raise CheckpointError(f"the header has {header:,} bytes, more than {MAX_TEXT_BYTES:,}")
        if stream.read(header).count(b"{") > _MAX_WEIGHTS:
            raise CheckpointError(f"the header has more than {_MAX_WEIGHTS:,} objects")
    return safetensors.torch.load_file(file)
