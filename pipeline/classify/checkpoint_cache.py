"""A cache of what is known of checkpoints without their weights, in the user's cache folder.

With an entry, planning needs neither the weights nor PyTorch. Each source of a checkpoint has one entry. The
entry counts only for the versions of the files that were read. A cache that cannot be used has no entries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvt.architecture import Architecture
from cvt.checkpoints.checkpoint import DIGEST_DEFINITION, Checkpoint
from cvt.preprocessing import Preprocessor
from pipeline.storage import Storage, StorageError

if TYPE_CHECKING:
    from cvt.network import CvtClassifier


def find_checkpoint(
    source: str, versions: Mapping[str, str], load_model: Callable[[], CvtClassifier]
) -> Checkpoint | None:
    """Returns the checkpoint of an entry, without weights; None if there is no entry for these versions.

    Args:
        source: the names of the checkpoint and of the file with its labels.
        versions: the current versions of the files, by path or URI.
        load_model: loads the weights of the checkpoint; see `Checkpoint`.
    """
    try:
        entry = json.loads(_file(source).read_bytes())
        if {**entry, "checkpoint": None} != _header(source, versions):
            return None
        fields = entry["checkpoint"]
        return Checkpoint(
            architecture=Architecture.from_dict(fields.pop("architecture")),
            labels=tuple(fields.pop("labels")),
            preprocessor=Preprocessor.from_dict(fields.pop("preprocessor"), "the cache"),
            known_digest=fields.pop("digest"),
            load_model=load_model,
            **fields,
        )
    # RuntimeError: the user has no home folder. The others: there is no entry, or the file is damaged.
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return None


def store_checkpoint(source: str, versions: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Writes the entry of a source in one atomic step, if the cache can be written."""
    entry = _header(source, versions) | {"checkpoint": known_fields(checkpoint)}
    # RuntimeError: the user has no home folder.
    with suppress(StorageError, RuntimeError):
        Storage().write(str(_file(source)), json.dumps(entry).encode())


def known_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns the content of an entry: everything but the weights, as JSON has it."""
    return {
        "name": checkpoint.name,
        "architecture": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(checkpoint.architecture).items()
        },
        "labels": list(checkpoint.labels),
        "preprocessor": checkpoint.preprocessor.to_dict(),
        "commit": checkpoint.commit,
        "problem_type": checkpoint.problem_type,
        "digest": checkpoint.digest,
    }


def _header(source: str, versions: Mapping[str, str]) -> dict[str, Any]:
    return {"definition": DIGEST_DEFINITION, "source": source, "versions": dict(versions), "checkpoint": None}


def _file(source: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cvt-label" / "checkpoints"
    return folder / f"{hashlib.sha256(source.encode()).hexdigest()[:32]}.json"
