"""Finds the files of a checkpoint: bundled, local, or from the Hugging Face hub. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cvt.errors import CheckpointError, checkpoint_errors
from cvt.preprocessing import FILE_NAME as PREPROCESSOR_FILE

#: Folders of the checkpoints in this package, by name.
BUNDLED = {"fashion-mnist": Path(__file__).parents[1] / "bundled" / "fashion-mnist"}

CONFIG_FILE = "config.json"
INDEX_SUFFIX = ".index.json"

#: Names of weights in a folder, in order of precedence.
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
)

#: Suffixes of files that are complete checkpoints, and of files that need JSON files next to them.
MICROSOFT_SUFFIXES = (".pth", ".pt")
TENSORFLOW_SUFFIX = ".h5"

_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^\s@]+))?")


class LocalCheckpoint(NamedTuple):
    """The folder or file of a checkpoint; `source` is the path or hub id that was asked for."""

    source: str
    path: Path
    name: str
    commit: str | None = None


def locate(path: str, revision: str | None = None) -> LocalCheckpoint:
    """Finds a checkpoint, as `load_checkpoint` does; downloads the files of a hub id."""
    with checkpoint_errors(f"model {path!r}"):
        if path in BUNDLED:
            return LocalCheckpoint(path, BUNDLED[path], path)
        local = Path(path).expanduser()
        if local.is_dir():
            return LocalCheckpoint(path, local.absolute(), local.name)
        if local.suffix in MICROSOFT_SUFFIXES and local.is_file():
            return LocalCheckpoint(path, local.absolute(), local.stem)
        if local.suffix == TENSORFLOW_SUFFIX and local.is_file():
            return LocalCheckpoint(path, local.absolute(), local.absolute().parent.name)
        if local.exists():
            raise CheckpointError("not a folder, a .pth file, a .pt file or an .h5 file")
        if local.suffix in (*MICROSOFT_SUFFIXES, TENSORFLOW_SUFFIX):
            raise CheckpointError("no such file")
        hub = _HUB_ID.fullmatch(path)
        if path.startswith(("/", ".", "~")) or hub is None:
            raise CheckpointError("no such folder")
        if revision and hub["revision"]:
            raise CheckpointError(f"two revisions are given, {hub['revision']!r} and {revision!r}; give one")
        folder = _fetch(hub["name"], revision or hub["revision"])
        return LocalCheckpoint(path, folder, hub["name"].rpartition("/")[2], folder.name)


def files_to_load(names: Iterable[str]) -> list[str]:
    """Returns the files of a folder that loading needs: configuration files, and one kind of weights."""
    names = {name for name in names if "/" not in name}
    used = sorted(names.intersection({CONFIG_FILE, PREPROCESSOR_FILE}))
    used += [name for name in WEIGHTS_FILES if name in names][:1]
    if used and used[-1].endswith(INDEX_SUFFIX):
        stem, dot, suffix = used[-1].removesuffix(INDEX_SUFFIX).rpartition(".")
        # Shards have names such as model-00001-of-00002.safetensors.
        used += sorted(name for name in names if name.startswith(f"{stem}-") and name.endswith(dot + suffix))
    return used


def _fetch(hub_id: str, revision: str | None) -> Path:
    """Downloads the files of a hub id, or finds them in the cache: `models--<id>/snapshots/<commit>`."""
    # Imported here, because a local checkpoint does not need the client.
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    bundled = f"(bundled: {', '.join(BUNDLED)})"
    with checkpoint_errors(f"no such local folder {bundled}, and not available from the Hugging Face hub"):
        try:
            listed = HfApi().model_info(hub_id, revision=revision).siblings or []
        except Exception:  # no network, unavailable hub, HF_HUB_OFFLINE, or a deleted model
            cached = try_to_load_from_cache(hub_id, CONFIG_FILE, revision=revision)
            if not isinstance(cached, str):
                raise
            return Path(cached).parent
        files = files_to_load(file.rfilename for file in listed)
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
