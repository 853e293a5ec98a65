"""Finding and loading a checkpoint: the model, its preprocessing, its labels, and a digest of them.

A checkpoint is a folder in Hugging Face's layout, local or on the hub, or one that this package brings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import PreprocessingError, Preprocessor

#: Checkpoints in the package, by the name that a configuration gives them.
BUNDLED = {"fashion-mnist": Path(__file__).parent / "bundled" / "fashion-mnist"}

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to classify, in float32 and evaluation mode.

    Attributes:
        name: short name, fit for a path.
        model: the model.
        preprocessor: what turns an image into the model's input.
        digest: SHA-256 over weights, configuration and preprocessing, in hexadecimal; it doesn't
            depend on how the files are laid out.
    """

    name: str
    model: CvtForImageClassification
    preprocessor: Preprocessor
    digest: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, by class id."""
        names = self.model.config.id2label
        return tuple(names[i] for i in range(self.model.config.num_labels))

    @property
    def embedding_width(self) -> int:
        """Values in an embedding."""
        return int(self.model.config.embed_dim[-1])


def load_checkpoint(path: str, revision: str | None = None) -> Checkpoint:
    """Loads a bundled name, a folder, or a hub id.

    Args:
        path: what to load; a name of `BUNDLED` comes before a folder, a folder before a hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: nothing is there, or it isn't a complete CvT classifier.
    """
    source = _locate(path)
    model = _load_model(path, source, revision)
    try:
        preprocessor = Preprocessor.from_pretrained(source, revision)
    except PreprocessingError as error:
        raise CheckpointError(f"model {path!r}: {error}") from None
    name = re.sub(r"[^\w.-]+", "-", Path(path).name).strip("-.") or "model"
    return Checkpoint(name, model, preprocessor, _digest(model, preprocessor))


def _locate(path: str) -> str:
    if path in BUNDLED:
        return str(BUNDLED[path])
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"model {path!r}: the folder has no config.json")
        return str(folder)
    if folder.exists():
        raise CheckpointError(f"model {path!r}: this is a file, not a folder with a config.json")
    if path.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(path):
        raise CheckpointError(f"model {path!r}: no such folder")
    return path


def _load_model(path: str, source: str, revision: str | None) -> CvtForImageClassification:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its table of keys; ours is the error below
    transformers_logging.disable_progress_bar()
    try:
        kind = CvtConfig.get_config_dict(source, revision=revision)[0].get("model_type")
        if kind != CvtConfig.model_type:
            raise CheckpointError(f"model {path!r}: config.json says model_type {kind!r}, not 'cvt'")
        model, info = CvtForImageClassification.from_pretrained(
            source,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the others, by name
        )
    except CheckpointError:
        raise
    except Exception as error:  # files of any origin: whatever reading them raises is about them
        known = "" if Path(source).is_dir() else f" (bundled: {', '.join(BUNDLED)})"
        raise CheckpointError(f"model {path!r}: {_one_line(error)}{known}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    faults = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of another shape than config.json says": [key for key, *_ in info["mismatched_keys"]],
    }
    if any(faults.values()):
        listed = "; ".join(f"{why}: {_some(keys)}" for why, keys in faults.items() if keys)
        raise CheckpointError(f"model {path!r}: weights don't fit the configuration: {listed}")
    if sorted(model.config.id2label) != list(range(model.config.num_labels)):
        raise CheckpointError(f"model {path!r}: id2label in config.json doesn't count its classes from 0 up")
    if model.config.num_channels != 3:
        raise CheckpointError(f"model {path!r}: num_channels is {model.config.num_channels}, not 3")
    return model.eval()


def _digest(model: CvtForImageClassification, preprocessor: Preprocessor) -> str:
    # Only what the architecture reads: what else a configuration holds varies with transformers.
    architecture = {name: getattr(model.config, name) for name in CvtConfig.__annotations__}
    decides: dict[str, Any] = {
        "architecture": architecture,
        "labels": model.config.id2label,
        "preprocessing": preprocessor.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _some(keys: Iterable[str], most: int = 8) -> str:
    names = sorted(keys)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
