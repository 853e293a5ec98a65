"""Model files that request far more memory or time than their size, and what each should cost."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cvt.checkpoints import BUNDLED, load_checkpoint
from cvt.errors import CheckpointError

TF_TINY = Path(__file__).parents[1] / "data" / "tf-tiny"

CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def bundled(folder: Path) -> Path:
    """Copies the bundled checkpoint."""
    return Path(shutil.copytree(BUNDLED["fashion-mnist"], folder))


def change_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def replace_weights(folder: Path, name: str, save: Callable[[Any, Path], object]) -> None:
    """Replaces the weights of a folder by another file with the same weights."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save(weights, folder / name)


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def many_classes(folder: Path) -> None:
    change_json(folder / CONFIG, id2label=None, num_labels=10**9)


def many_names(folder: Path) -> None:
    change_json(folder / CONFIG, id2label={str(i): "x" for i in range(600_000)})


def long_label(folder: Path) -> None:
    change_json(folder / CONFIG, id2label={str(i): "x" * 10**6 for i in range(2)})


def many_layers(folder: Path) -> None:
    change_json(folder / CONFIG, depth=[1, 2, 10**7])


def wide_tokens(folder: Path) -> None:
    change_json(folder / CONFIG, embed_dim=[32, 64, 2**40])


def large_tokens(folder: Path) -> None:
    """A valid architecture with 100 times the weights of the file."""
    change_json(folder / CONFIG, embed_dim=[2048, 4096, 16_384], depth=[50, 50, 50])


def nested_json(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 400_000)


def many_lists(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"[" + b"[]," * 2_600_000 + b"[]]")


def many_keys(folder: Path) -> None:
    (folder / CONFIG).write_text(f"{{{','.join(f'{chr(34)}{i}{chr(34)}:0' for i in range(600_000))}}}")


def many_stages(folder: Path) -> None:
    change_json(folder / CONFIG, embed_dim=[[]] * 200_000)


def nested_value(folder: Path) -> None:
    value: list[object] = []
    for _ in range(400):
        value = [value]
    change_json(folder / CONFIG, embed_dim=value)


def large_pixels(folder: Path) -> None:
    change_json(folder / PREPROCESSOR, size=10**6)


def many_tokens(folder: Path) -> None:
    """An architecture with 4 million tokens of width 32, of which attention would take hours."""
    change_json(folder / PREPROCESSOR, size=2048)
    change_json(folder / CONFIG, patch_stride=[1, 1, 1])


def narrow_crop(folder: Path) -> None:
    change_json(folder / PREPROCESSOR, crop_pct=1e-9)


def long_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((9 * 10**6).to_bytes(8, "little") + b"{" + b" " * (9 * 10**6))


def many_tensors(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(i): tensor for i in range(100_000)}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def many_shards(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    files = {str(i): f"{i}.safetensors" for i in range(150_000)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": files}))


def calls_bytearray(folder: Path) -> None:
    replace_weights(
        folder, "pytorch_model.bin", lambda w, f: torch.save(w | {"x": Call(bytearray, 4 * 10**9)}, f)
    )


def calls_tensor(folder: Path) -> None:
    replace_weights(
        folder, "pytorch_model.bin", lambda w, f: torch.save(w | {"x": Call(torch.FloatTensor, 10**9)}, f)
    )


def calls_storage(folder: Path) -> None:
    replace_weights(
        folder, "pytorch_model.bin", lambda w, f: torch.save(w | {"x": Call(torch.UntypedStorage, 10**9)}, f)
    )


def inflated_entry(folder: Path) -> None:
    def save(weights: dict[str, torch.Tensor], file: Path) -> None:
        torch.save(weights, file)
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content + bytes(10**8 if name.endswith("data.pkl") else 0))

    replace_weights(folder, "pytorch_model.bin", save)


def expanded_tensor(folder: Path) -> None:
    def save(weights: dict[str, torch.Tensor], file: Path) -> None:
        torch.save(weights | {"classifier.weight": torch.ones(1, 1).expand(50_000, 16_384)}, file)

    replace_weights(folder, "pytorch_model.bin", save)
    change_json(folder / CONFIG, id2label=None, num_labels=50_000, embed_dim=[32, 64, 16_384])


def storage_beyond_the_file(folder: Path) -> None:
    """Weights that claim 2 * 10^9 values, of which the file has 100,000."""

    def claim(content: bytes) -> bytes:
        return content.replace((100_000).to_bytes(4, "little"), (2 * 10**9).to_bytes(4, "little"))

    def save(weights: dict[str, torch.Tensor], file: Path) -> None:
        weights["classifier.bias"] = torch.zeros(100_000)
        torch.save(weights, file)
        with zipfile.ZipFile(file) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, claim(content) if name.endswith("data.pkl") else content)

    replace_weights(folder, "pytorch_model.bin", save)


def many_rows_without_columns(folder: Path) -> str:
    """A Microsoft file with 10^12 classes and no values."""
    weights = {
        "stage0.patch_embed.proj.weight": torch.ones(64, 3, 7, 7),
        "head.weight": torch.empty(10**12, 0),
    }
    for i, width in enumerate((192, 384), 1):
        weights[f"stage{i}.patch_embed.proj.weight"] = torch.ones(width, 1, 1, 1)
    weights |= {
        f"stage{i}.blocks.{j}.norm1.weight": torch.ones(1) for i, n in enumerate((1, 2, 10)) for j in range(n)
    }
    torch.save(weights, folder / "CvT-13-224x224.pth")
    return "CvT-13-224x224.pth"


def many_pickled_lists(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"]" * 5_000_000 + b".")


def many_pickle_operations(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"]" * 4_000_000 + b".")


def long_entry_list(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for i in range(2000):
            archive.writestr(f"{i:>05000}", b"")


def compressed_dataset(folder: Path) -> None:
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset(
            "a/b/c/kernel:0", shape=(40_000, 40_000), dtype="f4", chunks=(1000, 1000), compression=9
        )


def unwritten_dataset(folder: Path) -> None:
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("a/b/c/kernel:0", shape=(40_000, 40_000), dtype="f4")


def many_groups(folder: Path) -> None:
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w", libver="latest") as file:
        for i in range(20_000):
            file.create_group(str(i))


def shared_strings_dataset(folder: Path) -> None:
    """6,000 strings of 16 KB, of which the file has one."""
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        strings = file.create_dataset("a/b/c/kernel:0", (6000,), h5py.string_dtype())
        strings[0] = "x" * 16_384
        place, size = strings.id.get_offset(), strings.id.get_storage_size()
    content = bytearray((folder / "tf_model.h5").read_bytes())
    content[place : place + size] = content[place : place + 16] * 6000
    (folder / "tf_model.h5").write_bytes(content)


def external_dataset(folder: Path) -> None:
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file.create_dataset("a/b/c/kernel:0", shape=(100,), dtype="f4", external=[("/dev/zero", 0, 400)])


def linked_groups(folder: Path) -> None:
    import h5py

    (folder / WEIGHTS).unlink()
    with h5py.File(folder / "tf_model.h5", "w") as file:
        file["a"] = h5py.SoftLink("/b")
        file["b"] = h5py.SoftLink("/a")
        file["c"] = h5py.ExternalLink("tf_model.h5", "/c")
        group = file.create_group("d")
        group["e"] = group


def truncated_string(folder: Path) -> None:
    """A pickle with a string of 1 GB, which is not in the file."""
    (folder / WEIGHTS).unlink()
    content = b"\x80\x02X" + (10**9).to_bytes(4, "little") + b"text"
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("a/data.pkl", content)


def load(path: str) -> str:
    """Loads a checkpoint; returns its digest."""
    return load_checkpoint(path).digest


# Random changes of files ----------------------------------------------------------------------------

#: By kind: the file of a checkpoint that is changed.
KINDS = {
    "configuration": CONFIG,
    "preprocessing": PREPROCESSOR,
    "safetensors": WEIGHTS,
    "index": f"{WEIGHTS}.index.json",
    "pytorch": "pytorch_model.bin",
    "tensorflow": "tf_model.h5",
    "labels": "labels.json",
}

_VALUES = [None, -1, 0, 1e308, 10**30, "x", "", "\ud800", [], {}, [[1]], {"0": 1}, True, 2**63, -1e-300]
_BYTES = [b"", b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"\0\0\0\0\1\0\0\0", b"{", b"]."]


def escaped_errors(kind: str, folder: str, count: int) -> list[str]:
    """Loads `count` randomly changed checkpoints; returns the errors that are no CheckpointError."""
    checkpoint = bundled(Path(folder) / "model")
    file = checkpoint / KINDS[kind]
    if kind == "tensorflow":
        shutil.copytree(TF_TINY, checkpoint, dirs_exist_ok=True)
        (checkpoint / WEIGHTS).unlink()
    elif kind == "pytorch":
        replace_weights(
            checkpoint, file.name, lambda weights, path: torch.save({"state_dict": weights}, path)
        )
    elif kind == "index":
        shard = (checkpoint / WEIGHTS).rename(checkpoint / "model-1.safetensors")
        file.write_text(json.dumps({"weight_map": dict.fromkeys(load_file(shard), shard.name)}))
    elif kind == "labels":
        file.write_text(json.dumps([f"class {i}" for i in range(10)]))
    labels = str(file) if kind == "labels" else None
    torch.set_num_threads(1)
    original, numbers, escaped = file.read_bytes(), random.Random(kind), []
    load_checkpoint(str(checkpoint), labels=labels)
    for _ in range(count):
        if file.suffix == ".json" and numbers.random() < 0.7:
            changed = json.dumps(_change_value(json.loads(original), numbers)).encode()
        else:
            changed = _change_bytes(original, numbers)
        file.unlink()  # tensors of the last round may map the file
        file.write_bytes(changed)
        try:
            load_checkpoint(str(checkpoint), labels=labels)
        except CheckpointError:
            pass
        except Exception as error:
            escaped.append(f"{error!r}: {changed[:200]!r}")
    return escaped


def _change_value(value: Any, numbers: random.Random) -> Any:
    """Replaces or removes a random part of a JSON value."""
    if isinstance(value, dict | list) and value and numbers.random() < 0.8:
        key = numbers.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if numbers.random() < 0.2:
            del value[key]
        else:
            value[key] = _change_value(value[key], numbers)
        return value
    return numbers.choice(_VALUES)


def _change_bytes(content: bytes, numbers: random.Random) -> bytes:
    """Replaces some bytes, most often at the start and the end, where formats have their structure."""
    changed = bytearray(content)
    for _ in range(numbers.choice([1, 2, 8])):
        start = numbers.choice([0, max(0, len(changed) - 2000), numbers.randrange(len(changed))])
        position = min(start + numbers.randrange(2000), len(changed) - 1)
        width = numbers.choice([1, 1, 2, 8])
        changed[position : position + width] = numbers.choice([*_BYTES, numbers.randbytes(width)])
    return bytes(changed)
