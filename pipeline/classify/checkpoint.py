"""Checkpoints in object storage: what of them is needed comes to this machine, to be loaded as a local one.

Called in the driver alone: workers get the loaded model through Ray's object store.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from cvt.errors import CheckpointError
from pipeline.storage import ObjectInfo, Storage, normalize_uri

if TYPE_CHECKING:
    from cvt.checkpoints import Checkpoint


def open_checkpoint(
    storage: Storage, path: str, revision: str | None = None, labels: str | None = None
) -> Checkpoint:
    """Loads a checkpoint as `cvt.checkpoints.load_checkpoint` does, from object storage too.

    The path may also be the URI of a folder or file, whose last part is the name, and `labels` a URI.

    Raises:
        CheckpointError: nothing is there, or it isn't a complete CvT classifier.
        StorageError: an object can't be read; names it.
    """
    from cvt.checkpoints import load_checkpoint  # takes seconds, of which listing needs none

    with tempfile.TemporaryDirectory(prefix="cvt-label-") as temporary:
        fetched = _Fetched(storage, Path(temporary))
        try:
            path = fetched.local(path)
            if labels is not None and "://" in labels:
                labels = fetched.file(labels)
            return load_checkpoint(path, revision, labels)
        except CheckpointError as error:
            message = str(error)
            for local, uri in fetched.folders.items():
                message = message.replace(local, uri)
            raise CheckpointError(message) from error


class _Fetched:
    """Local copies of objects, in a folder of their own for each folder that they come from."""

    def __init__(self, storage: Storage, root: Path) -> None:
        self._storage = storage
        self._root = root
        self.folders: dict[str, str] = {}  # local: URI

    def local(self, path: str) -> str:
        """The local path that stands for a checkpoint's path or URI; copies what loading uses."""
        if "://" not in path:
            return path
        uri = normalize_uri(path)
        if "://" not in uri:  # it was file://
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

    def file(self, uri: str, *beside: str) -> str:
        """Copies an object, and others of these names beside it; returns its local path."""
        folder, _, name = uri.rpartition("/")
        objects = [self._storage.stat(f"{folder}/{each}") for each in (name, *beside)]
        return str(self._copy(folder, objects) / name)

    def _copy(self, uri: str, objects: Iterable[ObjectInfo]) -> Path:
        """Copies objects of one folder, each in the version that was listed."""
        folder = self._root / str(len(self.folders)) / PurePosixPath(uri).name
        folder.mkdir(parents=True)
        self.folders[str(folder)] = uri
        for info in objects:
            copy = folder / PurePosixPath(info.uri).name
            with self._storage.open(info.uri, info.version) as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target, 8 * 1024**2)
        return folder
