"""Finds, loads and writes checkpoints: the model, its preprocessing, its labels, and a digest of them.

Reading files of weights belongs to `cvt.checkpoints.weights`. The same model has the same digest, whatever
layout it was loaded from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from torch import Tensor
from transformers.utils import logging as transformers_logging

from cvt.checkpoints import microsoft
from cvt.checkpoints.weights import (
    CONFIG_FILE,
    MICROSOFT_SUFFIXES,
    PREPROCESSOR_FILE,
    TENSORFLOW_SUFFIX,
    check_weights,
    read_file,
    read_folder,
    used_files,
)
from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError, checkpoint_errors
from cvt.modeling import CvtForImageClassification
from cvt.preprocessing import Preprocessor
from cvt.presets import preset_preprocessor

#: Checkpoints in the package, by the name that a configuration gives them.
BUNDLED = {"fashion-mnist": Path(__file__).parents[1] / "bundled" / "fashion-mnist"}

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^\s@]+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to classify, in float32 and evaluation mode.

    Attributes:
        name: short name, usable in a path.
        digest: SHA-256 over weights, configuration and preprocessing, in hexadecimal; does not depend on the
            layout of the files.
        commit: for a hub id, the commit of its revision when it was loaded.
    """

    name: str
    model: CvtForImageClassification
    preprocessor: Preprocessor
    digest: str
    commit: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, by class id."""
        names = self.model.config.id2label
        return tuple(names[i] for i in range(self.model.config.num_labels))

    @property
    def embedding_width(self) -> int:
        """Values in an embedding."""
        return int(self.model.config.embed_dim[-1])


@dataclass(frozen=True)
class _Parts:
    """The content of a checkpoint's files; weights may have Microsoft's names."""

    name: str
    config: CvtConfig
    weights: Mapping[str, Tensor]
    preprocessor: Preprocessor
    commit: str | None = None


def load_checkpoint(path: str, revision: str | None = None, labels: str | None = None) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        path: what to load, the first of these that applies: a name in `BUNDLED`; a local folder with
            config.json, preprocessor_config.json and weights (safetensors, else PyTorch, else TensorFlow);
            a local TensorFlow file (.h5) with both next to it; a local file of Microsoft's (.pth or .pt), for
            384 pixels if its name contains `-384x384-`, else 224; a hub id, or `id@revision`.
        revision: branch, tag or commit of a hub id.
        labels: local file of class names that replace the checkpoint's; see `read_labels`.

    Raises:
        CheckpointError: nothing is there, or it is not a complete CvT classifier.
    """
    with checkpoint_errors(f"model {path!r}"):
        parts = _read(path, revision)
        if labels is not None:
            names, count = read_labels(Path(labels).expanduser()), parts.config.num_labels
            if len(names) != count:
                raise CheckpointError(
                    f"labels {labels}: {len(names)} names, but the model has {count} classes"
                )
            parts.config.id2label = dict(enumerate(names))
            parts.config.label2id = {name: i for i, name in enumerate(names)}
        model = _make_model(parts)
    name = re.sub(r"[^\w.-]+", "-", parts.name).strip("-.") or "model"
    return Checkpoint(
        name, model, parts.preprocessor, _digest(model, parts.preprocessor), commit=parts.commit
    )


def save_checkpoint(model: CvtForImageClassification, preprocessor: Preprocessor, folder: Path) -> None:
    """Writes a folder that `load_checkpoint` and transformers load."""
    with _no_progress_bars():
        model.save_pretrained(folder)
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor.to_dict(), indent=2) + "\n")


def read_labels(file: Path) -> list[str]:
    """Reads the names of classes, in the order of class ids.

    Args:
        file: one name a line; or, with the suffix .json, a list of names, or an object of names by class id.

    Raises:
        CheckpointError: it cannot be read, or holds something else; names the file.
    """
    with checkpoint_errors(f"labels {file}"):
        text = file.read_text(encoding="utf-8-sig")
        is_json = file.suffix.lower() == ".json"
        names = json.loads(text) if is_json else text.removesuffix("\n").split("\n")
        if isinstance(names, dict):
            names = [names.get(str(i)) for i in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError("neither a list of names nor an object of names by class id, from 0 up")
        for i, name in enumerate(names):
            if not name.strip():
                raise CheckpointError(f"the name of class {i} is empty")
    return names


def _read(path: str, revision: str | None) -> _Parts:
    if path in BUNDLED:
        return _read_folder(BUNDLED[path], path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _read_folder(place, place.name)
    if place.suffix in MICROSOFT_SUFFIXES and place.is_file():
        return _read_microsoft(place)
    if place.suffix == TENSORFLOW_SUFFIX and place.is_file():
        return _read_folder(place.parent, place.absolute().parent.name, place)
    if place.exists():
        raise CheckpointError("this is a file, not a folder with a config.json, a .pth or an .h5 file")
    if place.suffix in (*MICROSOFT_SUFFIXES, TENSORFLOW_SUFFIX):
        raise CheckpointError("no such file")
    hub = _HUB_ID.fullmatch(path)
    if path.startswith(("/", ".", "~")) or hub is None:
        raise CheckpointError("no such folder")
    if revision and hub["revision"]:
        raise CheckpointError(f"there are two revisions, {hub['revision']!r} and {revision!r}")
    folder = _fetch(hub["name"], revision or hub["revision"])
    return replace(_read_folder(folder, hub["name"].rpartition("/")[2]), commit=folder.name)


def _fetch(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id's files, from the hub, or from the local cache if the hub cannot be reached.

    The hub's client names the folder after the commit: `models--<id>/snapshots/<commit>`.
    """
    bundled = f"(bundled: {', '.join(BUNDLED)})"
    with checkpoint_errors(f"no such local folder {bundled}, and not available from the Hugging Face hub"):
        try:
            listed = HfApi().model_info(hub_id, revision=revision).siblings or []
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # no network, an overloaded hub, or HF_HUB_OFFLINE
            cached = try_to_load_from_cache(hub_id, CONFIG_FILE, revision=revision)
            folder = Path(cached).parent if isinstance(cached, str) else None
            # An interrupted download leaves some of the files.
            if folder is None or len(used_files(file.name for file in folder.iterdir())) < 3:
                raise
            return folder
        files = used_files(file.rfilename for file in listed)
        with _no_progress_bars():
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps transformers and the hub's client from drawing over the program's own output."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def _read_folder(folder: Path, name: str, weights_file: Path | None = None) -> _Parts:
    """Reads a folder in Hugging Face's layout. Its weights may have Microsoft's names."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError("the folder has no config.json")
    with checkpoint_errors(CONFIG_FILE):
        kind = CvtConfig.get_config_dict(folder)[0].get("model_type")
        if kind != CvtConfig.model_type:
            raise CheckpointError(f"model_type {kind!r}, not 'cvt'")
        config = CvtConfig.from_pretrained(folder)
    weights = read_folder(folder) if weights_file is None else read_file(weights_file)
    preprocessor = Preprocessor.from_folder(folder)
    return _Parts(name, config, weights, preprocessor)


def _read_microsoft(file: Path) -> _Parts:
    weights = read_file(file)
    with checkpoint_errors(file.name):
        config = microsoft.infer_config(weights)
    return _Parts(file.stem, config, weights, preset_preprocessor(microsoft.image_size(file.name)))


def _make_model(parts: _Parts) -> CvtForImageClassification:
    """The model of a configuration with a copy of exactly these weights."""
    config = parts.config
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise CheckpointError("id2label in config.json doesn't count its classes from 0 up")
    if config.num_channels != 3:
        raise CheckpointError(f"num_channels is {config.num_channels}, not 3")
    with torch.device("meta"):  # initial weights would take longer than loading
        model = CvtForImageClassification(config)
    expected = model.state_dict()
    weights = microsoft.renamed(parts.weights, expected)
    if not any(key.startswith("classifier.") for key in weights) and any("stages." in key for key in weights):
        raise CheckpointError("it has no classifier: the weights are those of a CvtModel alone")
    check_weights(weights, expected)
    model.to_empty(device="cpu")
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected.keys() - weights.keys()}
    model.load_state_dict(weights | counters)
    model.eval()
    return model


def _digest(model: CvtForImageClassification, preprocessor: Preprocessor) -> str:
    # Only the fields of the architecture: the others vary with the version of transformers.
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
