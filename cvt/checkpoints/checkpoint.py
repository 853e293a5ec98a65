"""The checkpoint: a model, its preprocessing, its labels, and a digest of all three. Saves checkpoints.

Does not import torch. `cvt.checkpoints.loading` loads checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt.architecture import Architecture
from cvt.checkpoints.files import PREPROCESSOR_FILE
from cvt.errors import CheckpointError, checkpoint_errors, read_text_bytes
from cvt.preprocessing import Preprocessor

if TYPE_CHECKING:
    from cvt.modeling import CvtForImageClassification
    from cvt.network import CvtClassifier

#: Number of the definition of `Checkpoint.digest`, and of how files are read: caches of digests have it.
DIGEST_DEFINITION = 1

#: Limits on the classes, and on the length of a name in UTF-8, since every row has one.
_MAX_CLASSES, _MAX_NAME_BYTES = 100_000, 1024


#: One thread at a time loads a model. Reentrant, because loading may check a digest, which needs the model.
_loading = threading.RLock()


@dataclass(frozen=True)
class Checkpoint:
    """A model with its preprocessing and labels. The weights are loaded when they are first used.

    A pickled checkpoint contains the weights.

    Attributes:
        name: short name, valid in a path.
        labels: names of the classes, in the order of class ids.
        load_model: loads the weights; called at most once, by `model`.
        commit: commit of a model from the Hugging Face hub, or None.
        problem_type: the field of config.json, None for a model that chooses one of several classes.
        known_digest: the digest, if it is known without the weights.
    """

    name: str
    architecture: Architecture
    labels: tuple[str, ...]
    preprocessor: Preprocessor
    load_model: Callable[[], CvtClassifier]
    commit: str | None = None
    problem_type: str | None = None
    known_digest: str | None = None

    @property
    def model(self) -> CvtClassifier:
        """The network in float32 and evaluation mode. Threads may share the first use, which takes seconds.

        Raises `CheckpointError` if the files have changed since the checkpoint was opened.
        """
        with _loading:
            return self._model

    @functools.cached_property
    def _model(self) -> CvtClassifier:
        return self.load_model()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_model": self.model, "load_model": None}

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
        names = check_names(json.loads(text) if is_json else text.removesuffix("\n").split("\n"))
        for i, name in enumerate(names):
            if not name.strip():
                raise CheckpointError(f"the name of class {i} is empty")
    return names


def check_names(names: Any) -> list[str]:
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


def default_labels(count: int) -> tuple[str, ...]:
    """Returns the names that transformers gives to classes without names."""
    _check_count(count)
    return tuple(f"LABEL_{i}" for i in range(count))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of CvtConfig for class names."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
