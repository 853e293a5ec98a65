"""Opens checkpoints in object storage: copies the needed files to this machine and loads them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cvt.errors import MAX_TEXT_BYTES, CheckpointError
from pipeline.storage import ObjectInfo, Storage, is_relative, normalize_uri, temporary_folder

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint

#: Maximum size of a file of weights in a bucket. A training state of CvT-W24 has 3.5 GB.
_MAX_WEIGHTS_BYTES = 16 * 1024**3


def open_checkpoint(
    storage: Storage, path: str, revision: str | None = None, labels: str | None = None
) -> Checkpoint:
    """Loads a checkpoint as `cvt.checkpoints.load_checkpoint` does, also from object storage.

    Args:
        storage: access to the checkpoint.
        path: local path, hub id, or URI of a folder or file; the last part is the name of the model.
        revision: revision of a hub id.
        labels: path or URI of a file with class names.

    Raises:
        CheckpointError: there is no checkpoint, or it is not a complete CvT classifier.
        StorageError: an object can't be read.
    """
    from cvt.checkpoints import load_checkpoint  # this import takes seconds

    with temporary_folder() as temporary:
        copies = _LocalCopies(storage, temporary)
        try:
            path = copies.local(path)
            if labels is not None and "://" in labels:
                labels = copies.file(labels)
            return load_checkpoint(path, revision, labels)
        except CheckpointError as error:
            message = str(error)
            for local, uri in copies.folders.items():
                message = message.replace(local, uri)
            raise CheckpointError(message) from error
        except OSError as error:
            raise CheckpointError(f"model {path!r}: cannot copy to {temporary}: {error.strerror}") from error


class _LocalCopies:
    """Local copies of objects, with one local folder per remote folder."""

    def __init__(self, storage: Storage, root: Path) -> None:
        self._storage = storage
        self._root = root
        self.folders: dict[str, str] = {}  #: URI of the remote folder, by local folder

    def local(self, path: str) -> str:
        """Returns the local path of a checkpoint; copies the files that loading uses."""
        if is_relative(path):  # or the name of a model
            return path
        uri = normalize_uri(path)
        if "://" not in uri:
            return uri
        from cvt.checkpoints import weights

        suffix = PurePosixPath(uri).suffix
        if suffix in weights.MICROSOFT_SUFFIXES:
            return self.file(uri)
        if suffix == weights.TENSORFLOW_SUFFIX:
            return self.file(uri, weights.CONFIG_FILE, weights.PREPROCESSOR_FILE)
        objects = {info.uri.removeprefix(f"{uri}/"): info for info in self._storage.list(uri)}
        if not objects:
            raise CheckpointError(f"model {uri!r}: no such folder")
        return str(self._copy(uri, [objects[name] for name in weights.files_to_load(objects)]))

    def file(self, uri: str, *siblings: str) -> str:
        """Copies an object and its siblings in the same folder; returns the local path of the object."""
        folder, _, name = uri.rpartition("/")
        objects = [self._storage.stat(f"{folder}/{each}") for each in (name, *siblings)]
        return str(self._copy(folder, objects) / name)

    def _copy(self, uri: str, objects: Iterable[ObjectInfo]) -> Path:
        """Copies objects of one folder, each in its listed version."""
        folder = self._root / str(len(self.folders)) / PurePosixPath(uri).name
        folder.mkdir(parents=True)
        self.folders[str(folder)] = uri
        for info in objects:
            copy = folder / PurePosixPath(info.uri).name
            is_small = copy.suffix not in (".safetensors", ".bin", ".h5", ".pth", ".pt")
            if info.size > (limit := MAX_TEXT_BYTES if is_small else _MAX_WEIGHTS_BYTES):
                raise CheckpointError(f"{info.uri}: has {info.size:,} bytes, more than {limit:,}")
            with self._storage.open(info.uri, info.version) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 8 * 1024**2)
        return folder
