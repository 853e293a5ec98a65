"""Loads and saves checkpoints: the model, its preprocessing, its labels, and a digest of all three.

`cvt.checkpoints.weights` reads files of weights. The digest does not depend on the layout of the files.
torch, whose import takes a second, is imported only to load weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt.architecture import Architecture, token_sides
from cvt.checkpoints import microsoft
from cvt.checkpoints.files import CONFIG_FILE, MICROSOFT_SUFFIXES, PREPROCESSOR_FILE, LocalCheckpoint, locate
from cvt.errors import CheckpointError, checkpoint_errors, read_text_bytes
from cvt.preprocessing import Preprocessor

if TYPE_CHECKING:
    from torch import Tensor

    from cvt.modeling import CvtForImageClassification
    from cvt.network import CvtClassifier

logger = logging.getLogger("cvt_label")

#: Limits on the classes, and on the length of a name in UTF-8, since every row has one.
_MAX_CLASSES, _MAX_NAME_BYTES = 100_000, 1024

#: Maximum number of values in a layer for one image. CvT-W24 has 7 million.
_MAX_VALUES = 2**28

_PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")

#: Number of the definition of `Checkpoint.digest`, and of how files are read, for caches.
DIGEST_DEFINITION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A model with its preprocessing and labels. A pickled checkpoint contains the weights.

    Attributes:
        name: short name, valid in a path.
        labels: names of the classes, in the order of class ids.
        load_model: returns `model`; called when the model is first used.
        commit: commit of a model from the Hugging Face hub, or None.
        problem_type: the field of config.json, None for a model that chooses one of several classes.
        known_digest: the digest, if it is known without the weights.
    """

    name: str
    architecture: Architecture
    labels: tuple[str, ...]
    preprocessor: Preprocessor
    load_model: Callable[[], Any]
    commit: str | None = None
    problem_type: str | None = None
    known_digest: str | None = None

    @functools.cached_property
    def model(self) -> CvtClassifier:
        """The network in float32 and evaluation mode."""
        return self.load_model()  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"model": self.model, "load_model": None}

    @functools.cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of weights, architecture, labels and preprocessing, in any layout of files."""
        if self.known_digest is not None:
            return self.known_digest
        architecture = asdict(self.architecture)
        if architecture["hidden_act"] == "gelu":  # transformers has no other, and its files lack the field
            del architecture["hidden_act"]
        content: dict[str, Any] = {
            "architecture": architecture,
            "labels": dict(enumerate(self.labels)),
            "preprocessing": self.preprocessor.to_dict(),
        }
        if self.problem_type is not None:
            content["problem_type"] = self.problem_type
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def embedding_width(self) -> int:
        """Number of values in an embedding."""
        return self.architecture.embed_dim[-1]

    def check_single_label(self) -> None:
        """Raises `CheckpointError` if the scores of the classes are not a softmax."""
        if self.problem_type is not None or len(self.labels) < 2:
            problem = "it has one class" if len(self.labels) < 2 else f"problem_type is {self.problem_type!r}"
            raise CheckpointError(
                f"model {self.name!r}: {problem}. Labeling needs a model that chooses one of several classes "
                "with a softmax. Use another model, or correct problem_type in config.json if it is wrong"
            )

    def to_transformers(self) -> CvtForImageClassification:
        """Returns a copy of the model as a class of transformers, for training and saving."""
        # Imports transformers, which takes seconds.
        import torch

        from cvt.modeling import CvtConfig, CvtForImageClassification

        fields = asdict(self.architecture) | label_fields(self.labels)
        with torch.device("meta"):  # skips random initialization, which takes longer than loading
            model = CvtForImageClassification(CvtConfig(**fields, problem_type=self.problem_type))
        model.to_empty(device="cpu").load_state_dict(self.model.state_dict())
        model.eval()
        return model


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
        if found.path.suffix in MICROSOFT_SUFFIXES and found.path.is_file():
            checkpoint = _read_microsoft(found)
        else:
            checkpoint = _read_folder(found)
        if labels is not None:
            names, count = read_labels(Path(labels).expanduser()), len(checkpoint.labels)
            if len(names) != count:
                raise CheckpointError(
                    f"labels {labels}: number of names: {len(names)}, number of classes of the model: {count}"
                )
            checkpoint = replace(checkpoint, labels=tuple(names))
    return checkpoint


def save_checkpoint(model: CvtForImageClassification, preprocessor: Preprocessor, folder: Path) -> None:
    """Saves a checkpoint as a folder that `load_checkpoint` can load.

    transformers can load the folder too, with exceptions: see `cvt.architecture.transformers_problem`.
    """
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # it would overwrite other output
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            bars.enable_progress_bar()
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(preprocessor.to_dict(), indent=2) + "\n")


def read_labels(file: Path) -> list[str]:
    """Reads class names in the order of class ids.

    The file has one name per line. A .json file has a list of names, or an object from class id to name.
    """
    with checkpoint_errors(f"labels {file}"):
        text = read_text_bytes(file).decode("utf-8-sig").replace("\r\n", "\n")
        is_json = file.suffix.lower() == ".json"
        names = _check_names(json.loads(text) if is_json else text.removesuffix("\n").split("\n"))
        for i, name in enumerate(names):
            if not name.strip():
                raise CheckpointError(f"the name of class {i} is empty")
    return names


def _check_names(names: Any) -> list[str]:
    """Checks class names in a list, or in an object from class id to name."""
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError("expected a list of names, or an object from class id (0, 1, ...) to name")
    _check_count(len(names))
    for i, name in enumerate(names):
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise CheckpointError(f"the name of class {i} has more than {_MAX_NAME_BYTES:,} bytes")
    return names


def _check_count(classes: Any) -> None:
    if not isinstance(classes, int) or not 0 < classes <= _MAX_CLASSES:
        raise CheckpointError(f"the number of classes is {classes!r}, not 1 to {_MAX_CLASSES:,}")


def _read_folder(found: LocalCheckpoint) -> Checkpoint:
    """Reads a folder in the Hugging Face layout. Weights may have Microsoft's names."""
    from cvt.checkpoints.weights import read_file, read_folder

    folder = found.path if found.path.is_dir() else found.path.parent
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError("the folder has no config.json")
    with checkpoint_errors(CONFIG_FILE):
        fields = json.loads(read_text_bytes(folder / CONFIG_FILE))
        kind = fields.get("model_type") if isinstance(fields, dict) else None
        if kind != "cvt":
            raise CheckpointError(f"model_type is {kind!r}, not 'cvt'")
        architecture, names = Architecture.from_dict(fields), fields.get("id2label")
        if names is None:  # transformers generates names
            labels = _default_labels(fields.get("num_labels", 2))
        else:
            with checkpoint_errors("id2label"):
                labels = tuple(_check_names(names))
        if (problem_type := fields.get("problem_type")) not in _PROBLEM_TYPES:
            raise CheckpointError(f"problem_type is {problem_type!r}, not one of {_PROBLEM_TYPES[1:]}")
    weights = read_folder(folder) if folder == found.path else read_file(found.path)
    preprocessor = Preprocessor.from_folder(folder)
    if problem_type == "single_label_classification":
        problem_type = None
    return _make_checkpoint(found, architecture, labels, weights, preprocessor, problem_type)


def _default_labels(count: int) -> tuple[str, ...]:
    """Returns the names that transformers gives to classes without names."""
    _check_count(count)
    return tuple(f"LABEL_{i}" for i in range(count))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of CvtConfig for class names."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}


def _read_microsoft(found: LocalCheckpoint) -> Checkpoint:
    from cvt.checkpoints.weights import read_file

    file = found.path
    weights = read_file(file)
    with checkpoint_errors(file.name):
        architecture = microsoft.infer_architecture(weights)
        labels = _default_labels(len(weights["head.weight"]))
    size, cause = microsoft.image_size(file.name, architecture)
    if cause is not None:
        cause += "; to set the size: cvt-label convert --size"
        logger.warning("%s: assuming an image size of %d pixels, because %s", file.name, size, cause)
    return _make_checkpoint(found, architecture, labels, weights, Preprocessor.published(size))


def _make_checkpoint(
    found: LocalCheckpoint,
    architecture: Architecture,
    labels: tuple[str, ...],
    weights: Mapping[str, Tensor],
    preprocessor: Preprocessor,
    problem_type: str | None = None,
) -> Checkpoint:
    """Creates the model with a copy of the weights. Their names are those of transformers or Microsoft."""
    import torch

    from cvt.checkpoints.weights import check_weights
    from cvt.network import CvtClassifier

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
    name = re.sub(r"[^\w.-]+", "-", found.name).strip("-.") or "model"
    return Checkpoint(name, architecture, labels, preprocessor, lambda: model, found.commit, problem_type)
