"""Targets: the classes of the model that the dataset's own labels stand for."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from cvt.checkpoints import read_labels
from cvt.errors import MAX_TEXT_BYTES, read_text_bytes
from pipeline.config import ConfigError, InputConfig
from pipeline.storage import ObjectNotFound, Storage, normalize_uri, temporary_folder

_MAX_LABEL_ID = 2**31  # limit of the int32 column `target_id`
#: WordNet ids of ImageNet's classes, and some of the names by which a model with these classes is known.
_WORDNET_IDS = Path(__file__).with_name("imagenet_synsets.txt")
_IMAGENET_NAMES = {1: "goldfish", 207: "golden retriever", 388: "giant panda", 985: "daisy"}


class Targets:
    """Finds the class of the model that a label of the dataset stands for."""

    def __init__(
        self, class_names: Sequence[str], names: Sequence[str] | None = None, mapping: Mapping[str, str] = {}
    ) -> None:
        """Takes the model's classes, or none if every id is a class, and `target_names` and `target_map`.

        Raises `ValueError` if the mapping has a class that the model lacks.
        """
        self._class_names, self._names, self._mapping = class_names, names, mapping if class_names else {}
        # The class "tench, Tinca tinca" has three names. A part of a name is no id.
        parts = [{x, *(y for y in x.split(", ") if y and parse_integer(y) is None)} for x in class_names]
        times, self._times = Counter(class_names), Counter(chain.from_iterable(parts))
        starts = [name.split(",")[0].casefold() for name in class_names]
        is_imagenet = len(starts) == 1000 and all(starts[i] == x for i, x in _IMAGENET_NAMES.items())
        self._ids = {x: i for i, x in enumerate(_WORDNET_IDS.read_text().split() if is_imagenet else ())}
        self._ids |= {x: i for i, each in enumerate(parts) for x in each if self._times[x] == 1}
        self._ids |= {x: i for i, x in enumerate(class_names) if times[x] == 1}
        self._folded = {name.casefold(): name for name in class_names}
        mapped = dict[str, int]()
        for key, name in self._mapping.items():
            target = self._ids.get(name, parse_integer(name))
            if target is None or not 0 <= target < len(class_names):
                problem = self._problem(name, _show(name))
                raise ValueError(f"{_show(key)}: {problem}; set the name or id of one class of the model")
            mapped[key] = target
        self._ids |= mapped

    def find(self, label: object, names: Sequence[str] | None = None) -> tuple[int | None, str | None]:
        """Returns the class id of a label, and why a label has none; both are None for null, NaN and -1.

        `names` are the class names of the label's file, by integer label.
        """
        names = names if self._names is None else self._names
        if label is None or label != label:
            return None, None
        text, number = parse_label(label)
        is_name = isinstance(label, str | bytes | bool)  # text of digits may be a name; a number is no name
        if isinstance(label, bool):
            text = text if text in self._ids or text in (names or ()) else text.lower()
            number = number if len(self._class_names if names is None else names) == 2 else None
        shown = _show(text if isinstance(label, str | bytes) else label)
        if text in self._mapping:
            return self._ids[text], None
        if number == -1 and text not in self._ids:
            return None, None
        if number is not None and not (is_name and text in (names or self._ids)):
            count = len(names or self._class_names) or _MAX_LABEL_ID
            if not 0 <= number < count:
                return None, f"{shown} is not in 0..{count - 1}"
            if not names:
                return number, None
            text, is_name = names[number], True
            if text in self._class_names[number : number + 1] and text not in self._mapping:
                return number, None  # other classes may have this name, too
            shown = _show(text)
        is_ambiguous = names is not None and self._times[text] > 1 and names.count(text) > 1
        if text in self._mapping or (is_name and text in self._ids and not is_ambiguous):
            return self._ids[text], None
        return None, self._problem(text, shown)

    def _problem(self, name: str, shown: str) -> str:
        if self._times[name] > 1:
            return f"{shown} is the name of several classes of the model"
        similar = self._folded.get(name.casefold())
        hint = f"; did you mean {_show(similar)}?" if similar else ""
        return f"{shown} is not a class of the model{hint}"


def load_targets(
    storage: Storage, section: InputConfig, class_names: Sequence[str], where: str = "input"
) -> InputConfig:
    """Returns a section of a configuration with the content of the files of its targets.

    Raises `ConfigError` for a missing or invalid file, or a class that the model lacks; or `StorageError`.
    """
    content: dict[str, Any] = {}
    field, path, copy = "", None, Path()
    try:
        with temporary_folder() as folder:
            for field, read in (("target_names", read_labels), ("target_map", _read_map)):
                path = getattr(section, field)
                if isinstance(path, str):
                    copy = folder / PurePosixPath(path).name
                    copy.write_bytes(storage.read(normalize_uri(path), max_bytes=MAX_TEXT_BYTES))
                    content[field] = read(copy)
        Targets(class_names, mapping=content.get("target_map", section.target_map) or {})
    except (ValueError, RecursionError, ObjectNotFound) as error:
        place = f"{where}.{field}: {path}" if isinstance(path, str) else f"{where}.{field}"
        cause = str(error).removeprefix(f"labels {copy}: ")
        raise ConfigError(f"{place}: {cause}") from error
    return section.model_copy(update=content)


def _read_map(file: Path) -> dict[str, str]:
    found = json.loads(read_text_bytes(file).decode("utf-8-sig"), object_pairs_hook=_to_map)
    return found if isinstance(found, dict) else _to_map([("the file", found)])


def _to_map(pairs: Iterable[tuple[str, Any]]) -> dict[str, str]:
    mapping = dict[str, str]()
    for key, name in pairs:
        name = str(name) if type(name) is int else name
        if not isinstance(name, str):
            raise ValueError(
                f'{_show(key)}: {_show(name)} is no name or id; expected {{"label": "class", ...}}'
            )
        if key in mapping:
            raise ValueError(f"{_show(key)} is in the file more than once; remove the wrong lines")
        mapping[key] = name
    return mapping


def hive_label(uri: str, column: str | None) -> tuple[str | None, str | None]:
    """Returns the value of the last folder `<column>=<value>` of a URI, and why no folder has the label."""
    folders = [part.partition("=") for part in uri.split("/")[:-1] if "=" in part]
    values = [value for name, _, value in folders if column in (None, unquote(name))]
    if not values:
        return None, f"the path has no folder {column or 'name'}=value (label_from: folder)"
    if column is None and len(values) > 1:
        return None, "the path has several folders name=value: set input.label_column to one of the names"
    return (None if values[-1] == "__HIVE_DEFAULT_PARTITION__" else unquote(values[-1])), None


def folder_label(uri: str) -> str | None:
    """Returns the name of the folder of a URI or a relative path; None if there is no folder."""
    scheme, is_uri, rest = uri.partition("://")
    path = rest.partition("/")[2] if is_uri else uri  # without bucket or host
    path = unquote(path.partition("?")[0]) if scheme in ("http", "https") else path
    return path.rpartition("/")[0].rpartition("/")[2] or None


def parse_integer(text: str) -> int | None:
    """Returns the integer that a text represents in ASCII digits; None for other text."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def parse_label(label: object) -> tuple[str, int | None]:
    """Returns the text and the integer of a label: bytes may be padded, and a float may be integral."""
    label = label.decode(errors="backslashreplace") if isinstance(label, bytes) else label
    if isinstance(label, str):
        text = label.rstrip("\0").removeprefix("\ufeff").strip()
        return text, parse_integer(text.removesuffix(".0"))
    if isinstance(label, float | Decimal) and math.isfinite(label) and label == int(label):
        label = int(label)  # pandas: integers with nulls are floats
    return repr(label), int(label) if isinstance(label, int) else None


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
