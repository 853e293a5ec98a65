"""Loads checkpoints in any layout: the network with its weights, its labels and its preprocessing.

`cvt.checkpoints.files` finds the files, and `cvt.checkpoints.weights` reads files of weights.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cvt.architecture import Architecture, token_sides
from cvt.checkpoints import microsoft
from cvt.checkpoints.checkpoint import Checkpoint, check_names, default_labels, read_labels
from cvt.checkpoints.files import CONFIG_FILE, MICROSOFT_SUFFIXES, LocalCheckpoint, locate
from cvt.checkpoints.weights import check_weights, read_file, read_folder
from cvt.errors import CheckpointError, checkpoint_errors, read_text_bytes
from cvt.network import CvtClassifier
from cvt.preprocessing import Preprocessor

logger = logging.getLogger("cvt_label")

#: Maximum number of values in a layer for one image. CvT-W24 has 7 million.
_MAX_VALUES = 2**28

_PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")


def load_checkpoint(path: str, revision: str | None = None, labels: str | None = None) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        path: checkpoint to load. The first match applies:

            - a name in `BUNDLED`
            - a local folder with config.json, preprocessor_config.json and weights (safetensors, else
              PyTorch, else TensorFlow)
            - a local TensorFlow file (.h5) with both JSON files next to it
            - a local Microsoft file (.pth or .pt); see `microsoft.image_size` for its image size
            - a Hugging Face hub id, or `id@revision`
        revision: branch, tag or commit of a hub id.
        labels: local file of class names, which replace the names in the checkpoint; see `read_labels`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not a complete CvT classifier.
    """
    return load_local(locate(path, revision), labels)


def load_local(found: LocalCheckpoint, labels: str | None = None) -> Checkpoint:
    """Loads a checkpoint that was located, as `load_checkpoint` does."""
    with checkpoint_errors(f"model {found.source!r}"):
        checkpoint = replace(_read(found.path, found.name), commit=found.commit)
        if labels is not None:
            names, count = read_labels(Path(labels).expanduser()), len(checkpoint.labels)
            if len(names) != count:
                raise CheckpointError(
                    f"labels {labels}: number of names: {len(names)}, number of classes of the model: {count}"
                )
            checkpoint = replace(checkpoint, labels=tuple(names))
    return checkpoint


def _read(path: Path, name: str) -> Checkpoint:
    if path.is_dir():
        return _read_folder(path, name)
    if path.suffix in MICROSOFT_SUFFIXES:
        return _read_microsoft(path)
    return _read_folder(path.parent, name, path)


def _read_folder(folder: Path, name: str, weights_file: Path | None = None) -> Checkpoint:
    """Reads a folder in the Hugging Face layout. Weights may have Microsoft's names."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError("the folder has no config.json")
    with checkpoint_errors(CONFIG_FILE):
        fields = json.loads(read_text_bytes(folder / CONFIG_FILE))
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        if kind != "cvt":
            raise CheckpointError(f"model_type is {kind!r}, not 'cvt'")
        architecture, names = Architecture.from_dict(fields), fields.get("id2label")
        if names is None:  # transformers generates names
            labels = default_labels(fields.get("num_labels", 2))
        else:
            with checkpoint_errors("id2label"):
                labels = tuple(check_names(names))
        if (problem_type := fields.get("problem_type")) not in _PROBLEM_TYPES:
            raise CheckpointError(f"problem_type is {problem_type!r}, not one of {_PROBLEM_TYPES[1:]}")
    weights = read_folder(folder) if weights_file is None else read_file(weights_file)
    preprocessor = Preprocessor.from_folder(folder)
    if problem_type == "single_label_classification":
        problem_type = None
    return _make_checkpoint(name, architecture, labels, weights, preprocessor, problem_type)


def _read_microsoft(file: Path) -> Checkpoint:
    weights = read_file(file)
    with checkpoint_errors(file.name):
        architecture = microsoft.infer_architecture(weights)
        labels = default_labels(len(weights["head.weight"]))
    size, cause = microsoft.image_size(file.name, architecture)
    if cause is not None:
        cause += "; to set the size: cvt-label convert --size"
        logger.warning("%s: assuming an image size of %d pixels, because %s", file.name, size, cause)
    return _make_checkpoint(file.stem, architecture, labels, weights, Preprocessor.published(size))


def _make_checkpoint(
    name: str,
    architecture: Architecture,
    labels: tuple[str, ...],
    weights: Mapping[str, Tensor],
    preprocessor: Preprocessor,
    problem_type: str | None = None,
) -> Checkpoint:
    """Creates the model with a copy of the weights. Their names are those of transformers or Microsoft."""
    for i, side in enumerate(token_sides(architecture, preprocessor.size)):
        width = architecture.embed_dim[i]
        if not 0 < side**2 * width * max(1, architecture.mlp_ratio[i]) <= _MAX_VALUES:
            raise CheckpointError(
                f"size in preprocessor_config.json ({preprocessor.size}) does not fit the architecture in"
                f" config.json: stage {i} has {side} x {side} tokens of width {width}"
            )
    if architecture.num_channels != 3:
        raise CheckpointError(f"num_channels is {architecture.num_channels}, not 3")
    with torch.device("meta"):  # skips random initialization, which takes longer than loading
        expected = CvtClassifier(architecture, len(labels)).state_dict()
    weights = microsoft.rename_weights(weights, expected)
    if not any(key.startswith("classifier.") for key in weights) and any("stages." in key for key in weights):
        raise CheckpointError("the checkpoint has no classifier: its weights are those of a CvtModel")
    check_weights(weights, expected)
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected.keys() - weights.keys()}
    model = CvtClassifier.of_weights(architecture, len(labels), weights | counters)
    path_name = re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"
    return Checkpoint(path_name, architecture, labels, preprocessor, lambda: model, problem_type=problem_type)
