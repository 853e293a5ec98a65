"""Opens checkpoints, also in object storage.

What is known of a checkpoint without its weights is kept in the user's cache folder. While the files have the
same versions, only labeling needs the weights and PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from cvt.checkpoints.checkpoint import DIGEST_DEFINITION, Checkpoint, load_local
from cvt.checkpoints.files import (
    CONFIG_FILE,
    MICROSOFT_SUFFIXES,
    PREPROCESSOR_FILE,
    TENSORFLOW_SUFFIX,
    LocalCheckpoint,
    files_to_load,
    locate,
)
from cvt.errors import MAX_TEXT_BYTES, CheckpointError
from pipeline.storage import ObjectInfo, Storage, StorageError, is_relative, normalize_uri, temporary_folder

if TYPE_CHECKING:
    from cvt.network import CvtClassifier

#: Maximum size of a file of weights in a bucket. A training state of CvT-W24 has 3.5 GB.
_MAX_WEIGHTS_BYTES = 16 * 1024**3


def open_checkpoint(
    storage: Storage, path: str, revision: str | None = None, labels: str | None = None
) -> Checkpoint:
    """Opens a checkpoint that `cvt.checkpoints.load_checkpoint` can load, also from object storage.

    Reads no weights if this machine has loaded the same versions of the files before. The first use of
    `Checkpoint.model` then checks that weights, labels and preprocessing are as known.

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
    entry = hashlib.sha256(repr((path, revision, labels)).encode()).hexdigest()

    def load(versions: dict[str, str]) -> Checkpoint:
        loaded = files.load()
        if versions and versions == files.versions():  # no file changed in the meantime
            _store(entry, versions, loaded)
        return loaded

    def load_model() -> CvtClassifier:
        loaded = load(files.versions())
        if _known(loaded) != _known(checkpoint):
            cause = "its files have changed since the command started, or were replaced unnoticed"
            raise CheckpointError(f"model {path!r}: {cause}; run the same command again")
        return loaded.model

    versions = files.versions()
    checkpoint = _find(entry, versions, load_model) or load(versions)
    return checkpoint


def _find(entry: str, versions: dict[str, str], load_model: Callable[[], CvtClassifier]) -> Checkpoint | None:
    """Returns the checkpoint of an entry of the cache; None if there is none, or not of these versions."""
    # Whatever is wrong with the cache, the checkpoint can be loaded. RuntimeError: there is no home folder.
    with suppress(OSError, RuntimeError, ValueError, TypeError, KeyError):
        content = json.loads(_file(entry).read_bytes())
        fields = content["checkpoint"] | {"load_model": load_model}
        if versions and content["versions"] == versions and fields["known_digest"]:
            return TypeAdapter(Checkpoint).validate_python(fields)
    return None


def _store(entry: str, versions: dict[str, str], checkpoint: Checkpoint) -> None:
    """Writes an entry of the cache in one atomic step, if possible."""
    content = {"versions": versions, "checkpoint": _known(checkpoint)}
    with suppress(StorageError, RuntimeError):
        Storage().write(str(_file(entry)), json.dumps(content).encode())


def _file(entry: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "cvt-label" / "checkpoints" / f"{entry[:32]}.json"


def _known(checkpoint: Checkpoint) -> Any:
    """Returns the fields of a checkpoint, with its digest in place of the weights, as JSON has them."""
    fields = asdict(checkpoint) | {"load_model": None, "known_digest": checkpoint.digest}
    return json.loads(json.dumps(fields))


@dataclass(frozen=True)
class _Files:
    """The files of a checkpoint and of its labels: local files, or objects that loading copies."""

    storage: Storage
    model: LocalCheckpoint | str  #: or the URI of a folder or file
    labels: str | None

    def versions(self) -> dict[str, str]:
        """Returns the version of each file by path or URI; nothing if a local file cannot be accessed."""
        versions = {"definition of the digest": str(DIGEST_DEFINITION)}
        try:
            if isinstance(self.model, str):
                versions |= {info.uri: info.version for info in self._objects(self.model)}
            else:
                versions |= _local_versions(self.model.path)
            if self.labels is not None and "://" in self.labels:
                versions[self.labels] = self.storage.version(self.labels)
            elif self.labels is not None:
                versions |= _local_versions(Path(self.labels).expanduser())
        except OSError:
            return {}
        return versions

    def load(self) -> Checkpoint:
        """Loads the checkpoint; copies objects to this machine first."""
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


def _local_versions(path: Path) -> dict[str, str]:
    """Returns versions of the files in a folder, or of a file and of the JSON files next to it, by path."""
    files = path.iterdir() if path.is_dir() else [path, *path.parent.glob("*.json")]
    found = {str(file): file.stat() for file in files if file.is_file()}
    # Weights of an architecture have the same size, and copies may keep the modification time.
    return {
        path: f"{file.st_mtime_ns}-{file.st_ctime_ns}-{file.st_ino}-{file.st_size}"
        for path, file in found.items()
    }
