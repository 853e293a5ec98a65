"""Opens checkpoints, also in object storage; loads their weights only if they are used or unknown."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cvt.checkpoints import Checkpoint
from cvt.checkpoints.files import (
    CONFIG_FILE,
    MICROSOFT_SUFFIXES,
    PREPROCESSOR_FILE,
    TENSORFLOW_SUFFIX,
    LocalCheckpoint,
    file_version,
    files_to_load,
    locate,
)
from cvt.errors import MAX_TEXT_BYTES, CheckpointError
from pipeline.classify.checkpoint_cache import find_checkpoint, known_fields, store_checkpoint
from pipeline.storage import ObjectInfo, Storage, is_relative, normalize_uri, temporary_folder

if TYPE_CHECKING:
    from cvt.network import CvtClassifier

#: Maximum size of a file of weights in a bucket. A training state of CvT-W24 has 3.5 GB.
_MAX_WEIGHTS_BYTES = 16 * 1024**3


def open_checkpoint(
    storage: Storage, path: str, revision: str | None = None, labels: str | None = None
) -> Checkpoint:
    """Opens a checkpoint that `cvt.checkpoints.load_checkpoint` can load, also from object storage.

    If this machine has opened the same versions of its files before, reads no weights and needs no PyTorch:
    `Checkpoint.model` then loads the weights, and checks that the rest is as known.

    Args:
        storage: access to the checkpoint.
        path: local path, hub id, or URI of a folder or file; the last part is the name of the model.
        revision: revision of a hub id.
        labels: path or URI of a file with class names.

    Raises:
        CheckpointError: there is no checkpoint, or it is not a complete CvT classifier.
        StorageError: an object can't be read.
    """
    uri = path if is_relative(path) else normalize_uri(path)  # a relative path may be the name of a model
    files = _Files(storage, uri if "://" in uri else locate(uri, revision), labels)
    source, versions = repr((path, revision, labels)), files.versions()

    def load_model() -> CvtClassifier:
        loaded = load()
        if known_fields(loaded) != known_fields(checkpoint):
            raise CheckpointError(
                f"model {path!r}: its files have changed since the run was planned, or were replaced without "
                "a new modification time; run the same command again"
            )
        return loaded.model

    def load() -> Checkpoint:
        before = files.versions()
        loaded = files.load()
        if before is not None and before == files.versions():
            store_checkpoint(source, before, loaded)
        return loaded

    checkpoint = (None if versions is None else find_checkpoint(source, versions, load_model)) or load()
    return checkpoint


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint and of its labels: local files, or objects that loading copies."""

    storage: Storage
    model: LocalCheckpoint | str  #: or the URI of a folder or file
    labels: str | None

    def versions(self) -> dict[str, str] | None:
        """Returns the version of each file by path or URI; None if a local file cannot be accessed."""
        try:
            if isinstance(self.model, str):
                versions = {info.uri: info.version for info in self._objects(self.model)}
            else:
                versions = self.model.versions()
            if self.labels is not None:
                version = self.storage.version if "://" in self.labels else file_version
                versions[self.labels] = version(self.labels)
        except OSError:
            return None
        return versions

    def load(self) -> Checkpoint:
        """Loads the checkpoint; copies objects to this machine first."""
        from cvt.checkpoints.loading import load_local  # imports torch, which takes a second

        model, labels, copies = self.model, self.labels, dict[str, str]()
        with temporary_folder() as temporary:
            try:
                if isinstance(model, str):
                    model = locate(self._copy(model, self._objects(model), temporary / "0", copies))
                if labels is not None and "://" in labels:
                    labels = self._copy(labels, [self.storage.stat(labels)], temporary / "1", copies)
                return load_local(model, labels)
            except CheckpointError as error:
                message = str(error)
                for local, uri in copies.items():
                    message = message.replace(local, uri)
                raise CheckpointError(message) from error
            except OSError as error:
                name = self.model if isinstance(self.model, str) else self.model.source
                cause = f"cannot copy to {temporary}: {error.strerror}"
                raise CheckpointError(f"model {name!r}: {cause}") from error

    def _objects(self, uri: str) -> list[ObjectInfo]:
        """Lists the objects that loading a folder or a file reads."""
        suffix, names = PurePosixPath(uri).suffix, [uri.rpartition("/")[2]]
        if suffix == TENSORFLOW_SUFFIX:
            names += [CONFIG_FILE, PREPROCESSOR_FILE]
        elif suffix not in MICROSOFT_SUFFIXES:
            objects = {info.uri.removeprefix(f"{uri}/"): info for info in self.storage.list(uri)}
            if not objects:
                raise CheckpointError(f"model {uri!r}: no such folder")
            return [objects[name] for name in files_to_load(objects)]
        return [self.storage.stat(f"{uri.rpartition('/')[0]}/{name}") for name in names]

    def _copy(self, uri: str, objects: Sequence[ObjectInfo], parent: Path, copies: dict[str, str]) -> str:
        """Copies objects of a folder, each in its listed version; returns the local path of `uri`.

        Adds the URI of the folder to `copies`, by local folder.
        """
        is_file = any(info.uri == uri for info in objects)
        folder_uri, name = (uri.rpartition("/")[0], PurePosixPath(uri).name) if is_file else (uri, "")
        folder = parent / PurePosixPath(folder_uri).name
        folder.mkdir(parents=True)
        copies[str(folder)] = folder_uri
        for info in objects:
            copy = folder / PurePosixPath(info.uri).name
            is_small = copy.suffix not in (".safetensors", ".bin", ".h5", ".pth", ".pt")
            if info.size > (limit := MAX_TEXT_BYTES if is_small else _MAX_WEIGHTS_BYTES):
                raise CheckpointError(f"{info.uri}: has {info.size:,} bytes, more than {limit:,}")
            with self.storage.open(info.uri, info.version) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 8 * 1024**2)
        return str(folder / name)
