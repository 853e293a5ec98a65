"""Finding, loading and writing a checkpoint: the model, its preprocessing, its labels, a digest of them.

A checkpoint is a folder in Hugging Face's layout, local, on the hub or in this package; or a file of
Microsoft's. Whatever it comes from, the model, and so the digest, is the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
    read_file,
    read_folder,
    used_files,
)
from cvt.configuration import CvtConfig
from cvt.errors import CheckpointError, NoClassifierError, some
from cvt.modeling import CvtForImageClassification, CvtModel
from cvt.preprocessing import PreprocessingError, Preprocessor
from cvt.presets import preset_preprocessor

#: Checkpoints in the package, by the name that a configuration gives them.
BUNDLED = {"fashion-mnist": Path(__file__).parents[1] / "bundled" / "fashion-mnist"}


_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^\s@]+))?")


#: Of a CvtModel's weights, where a classifier holds it.
_PREFIX = f"{CvtModel.base_model_prefix}."


Model = TypeVar("Model", CvtForImageClassification, CvtModel)


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to classify, in float32 and evaluation mode.

    Attributes:
        name: short name, fit for a path.
        model: the model.
        preprocessor: what turns an image into the model's input.
        digest: SHA-256 over weights, configuration and preprocessing, in hexadecimal; it doesn't
            depend on how the files are laid out.
        commit: of a hub id, the commit that its revision was when it was loaded; else None.
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
    """What a checkpoint's files say.

    Attributes:
        name: short name, before what no path can hold is replaced.
        config: the model's configuration.
        weights: the weights, by transformers' names unless they are of no such.
        preprocessor: what turns an image into the model's input.
        shapes_from: what tells the weights' shapes, for errors.
        spelled: the name in the files of the weight that transformers calls so.
        commit: of a hub id, the commit.
    """

    name: str
    config: CvtConfig
    weights: Mapping[str, Tensor]
    preprocessor: Preprocessor
    shapes_from: str
    spelled: Callable[[str], str]
    commit: str | None = None


def load_checkpoint(path: str, revision: str | None = None, labels: str | None = None) -> Checkpoint:
    """Loads a checkpoint from wherever it is.

    Args:
        path: what to load. In the order in which they are tried: a name of `BUNDLED`; a local folder with
            config.json, preprocessor_config.json and weights (the first of safetensors, PyTorch's and
            TensorFlow's); a local file of TensorFlow's (.h5) with both beside it; a local file of
            Microsoft's (.pth or .pt), whose name tells 384 pixels by `-384x384-`, else they are 224;
            a hub id, to which a revision may be added as `id@revision`.
        revision: branch, tag or commit of a hub id.
        labels: local file with the names of the classes, instead of those of the checkpoint: one a line,
            or in a .json file a list, or an object of names by class id.

    Raises:
        NoClassifierError: it has no classifier.
        CheckpointError: nothing is there, or it isn't a complete CvT classifier.
    """
    with _named(path):
        parts = _read(path, revision)
        if labels is not None:
            _relabel(parts.config, read_labels(Path(labels).expanduser()), labels)
        model = _make_model(parts, CvtForImageClassification)
    name = re.sub(r"[^\w.-]+", "-", parts.name).strip("-.") or "model"
    return Checkpoint(
        name, model, parts.preprocessor, _digest(model, parts.preprocessor), commit=parts.commit
    )


def load_features(path: str, revision: str | None = None) -> tuple[CvtModel, Preprocessor]:
    """Loads a checkpoint without a classifier, from wherever `load_checkpoint` loads one that has it.

    Raises:
        CheckpointError: nothing is there, or it isn't a complete CvtModel.
    """
    with _named(path):
        parts = _read(path, revision)
        return _make_model(parts, CvtModel), parts.preprocessor


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Names the checkpoint in what is wrong with it."""
    try:
        yield
    except (CheckpointError, PreprocessingError) as error:
        kind = NoClassifierError if isinstance(error, NoClassifierError) else CheckpointError
        raise kind(f"model {path!r}: {error}") from error


def save_checkpoint(
    model: CvtForImageClassification | CvtModel, preprocessor: Preprocessor, folder: Path
) -> None:
    """Writes model and preprocessing as `load_checkpoint`, and transformers, load them."""
    with _no_progress_bars():
        model.save_pretrained(folder)
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor.to_dict(), indent=2) + "\n")


def read_labels(file: Path) -> list[str]:
    """Reads the names of classes, by class id.

    Args:
        file: one name a line; or, by its suffix .json, a list of names, or an object of names by class id.

    Raises:
        CheckpointError: it can't be read, or holds something else; names the file.
    """
    is_json = file.suffix.lower() == ".json"
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if is_json else text.removesuffix("\n").split("\n")
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
    except OSError as error:
        raise CheckpointError(f"labels {file}: {error.strerror or error}") from error
    except KeyError as error:
        raise CheckpointError(f"labels {file}: no class {error}, but ids count from 0 up") from error
    except ValueError as error:
        kind = "JSON" if is_json else "UTF-8"
        raise CheckpointError(f"labels {file}: not {kind}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"labels {file}: neither a list of names nor an object of names by class id")
    for i, name in enumerate(names):
        if not name.strip():
            raise CheckpointError(f"labels {file}: the name of class {i} is empty")
    return names


def _read(path: str, revision: str | None) -> _Parts:
    """Reads whatever `path` names."""
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
    """The folder of a hub id's files, from the hub, or from the local cache where it can't be reached.

    The hub's client calls it by the commit: `models--<id>/snapshots/<commit>`.
    """
    try:
        try:
            listed = HfApi().model_info(hub_id, revision=revision).siblings or []
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception:  # no network, an overloaded hub, or HF_HUB_OFFLINE
            cached = try_to_load_from_cache(hub_id, CONFIG_FILE, revision=revision)
            folder = Path(cached).parent if isinstance(cached, str) else None
            # A download that broke off leaves some of the files.
            if folder is None or len(used_files(file.name for file in folder.iterdir())) < 3:
                raise
            return folder
        files = used_files(file.rfilename for file in listed)
        with _no_progress_bars():
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub's client has some ten kinds of errors, without a common base
        raise CheckpointError(
            f"no such local folder, and not to be had from the Hugging Face hub: {_one_line(error)}"
            f" (bundled: {', '.join(BUNDLED)})"
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps transformers and the hub's client from drawing over the program's own output."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


def _read_folder(folder: Path, name: str, weights_file: Path | None = None) -> _Parts:
    """Reads a folder in Hugging Face's layout; its weights may have Microsoft's names, too."""
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError("the folder has no config.json")
    try:
        kind = CvtConfig.get_config_dict(folder)[0].get("model_type")
        if kind != CvtConfig.model_type:
            raise CheckpointError(f"config.json says model_type {kind!r}, not 'cvt'")
        config = CvtConfig.from_pretrained(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a file of any origin: whatever reading it raises is about it
        raise CheckpointError(f"config.json: {_one_line(error)}") from error
    weights = read_folder(folder) if weights_file is None else read_file(weights_file)
    preprocessor = Preprocessor.from_pretrained(folder)
    return _Parts(name, config, weights, preprocessor, "config.json says", str)


def _read_microsoft(file: Path) -> _Parts:
    weights = read_file(file)
    try:
        variant, config = microsoft.infer_config(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{file.name}: {error}") from None
    preprocessor = preset_preprocessor(microsoft.image_size(file.name))
    return _Parts(file.stem, config, weights, preprocessor, f"{variant} has", microsoft.microsoft_key)


def _relabel(config: CvtConfig, names: list[str], file: str) -> None:
    count = config.num_labels
    if len(names) != count:
        raise CheckpointError(f"labels {file}: {len(names)} names, but the model has {count} classes")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _make_model(parts: _Parts, make: type[Model]) -> Model:
    """The model of a configuration with these weights, copied; nothing else than them will do."""
    config = parts.config
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise CheckpointError("id2label in config.json doesn't count its classes from 0 up")
    if config.num_channels != 3:
        raise CheckpointError(f"num_channels is {config.num_channels}, not 3")
    with torch.device("meta"):  # initial weights would take longer than loading
        model = make(config)
    expected = model.state_dict()
    if make is CvtModel:
        weights = microsoft.renamed(parts.weights, [f"{_PREFIX}{key}" for key in expected])
        weights = {key.removeprefix(_PREFIX): tensor for key, tensor in weights.items()}
    else:
        weights = microsoft.renamed(parts.weights, expected)
        has_head = any(key.startswith("classifier.") for key in weights)
        if not has_head and any("stages." in key for key in weights):
            raise NoClassifierError("it has no classifier: the weights are those of a CvtModel alone")
    shared = weights.keys() & expected.keys()
    # How many batches a normalisation has seen changes nothing, and TensorFlow doesn't know it.
    missing = {key for key in expected.keys() - shared if not key.endswith(".num_batches_tracked")}
    faults = {
        "missing": missing,
        "unexpected": weights.keys() - shared,
        f"of another shape than {parts.shapes_from}": {
            key for key in shared if weights[key].shape != expected[key].shape
        },
        "no floating-point numbers": {
            key for key in shared if expected[key].is_floating_point() > weights[key].is_floating_point()
        },
        "not finite": {key for key in shared if not weights[key].isfinite().all()},
    }
    if any(faults.values()):
        described = (f"{why}: {some(map(parts.spelled, keys))}" for why, keys in faults.items() if keys)
        listed = "; ".join(described)
        raise CheckpointError(f"weights don't fit the configuration: {listed}")
    model.to_empty(device="cpu")
    counters = {key: torch.zeros((), dtype=torch.long) for key in expected.keys() - shared}
    model.load_state_dict(weights | counters)
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
