"""Readers: a shard in, its samples out, one at a time, in the same order every time.

WebDataset tars, Parquet files with image bytes, and groups of loose images. Nothing is decoded here,
and pickles are never loaded. A bad sample is a sample with an error; a bad shard is a `ShardError`.
"""

from __future__ import annotations

import math

from pipeline.read.samples import ReadOptions

_MAX_LABEL_ID = 2**31  # of the predictions' int32 column

IGNORE_HINT = "labels can be ignored by `input.labels: false`"


# Labels ------------------------------------------------------------------------------------------


class LabelError(ValueError):
    """A label that names no class; the message is the sample's error."""


def class_index(value: object, options: ReadOptions, names: dict[str, int]) -> int | None:
    """A label as a class index, null for none; text is a class name, or else an index."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    found: object = value
    if isinstance(value, str):
        text = value.strip()
        found = names.get(text, whole_number(text))
    elif isinstance(value, float) and value.is_integer():  # pandas' integers beside nulls
        found = int(value)
    if not isinstance(found, int) or isinstance(found, bool):
        raise LabelError(f"label {_shortened(value)} is no class of the model; {IGNORE_HINT}")
    if found == -1:
        return None
    limit = options.num_labels if options.num_labels is not None else _MAX_LABEL_ID
    if not 0 <= found < limit:
        raise LabelError(f"label {_shortened(value)} is not in 0..{limit - 1}; {IGNORE_HINT}")
    return found


def whole_number(text: str) -> int | None:
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
