"""The labels that a dataset has for its samples, as class indices."""

import math

from pipeline.read.samples import ReadOptions

_MAX_LABEL_ID = 2**31  # of the predictions' int32 column
IGNORE_HINT = "labels can be ignored by `input.labels: false`"


class TargetParser:
    """Turns labels into class indices."""

    def __init__(self, options: ReadOptions) -> None:
        self._ids = dict(options.class_ids)
        self._limit = options.num_labels if options.num_labels is not None else _MAX_LABEL_ID

    def parse(self, label: object) -> tuple[int | None, str | None]:
        """Returns the class index of a label, None for none, and the error of a label that is no class.

        Text is a class name, or else an index.
        """
        if label is None or (isinstance(label, float) and math.isnan(label)):
            return None, None
        found: object = label
        if isinstance(label, str):
            text = label.strip()
            found = self._ids.get(text, whole_number(text))
        elif isinstance(label, float) and label.is_integer():  # pandas' integers next to nulls
            found = int(label)
        if not isinstance(found, int) or isinstance(found, bool):
            return None, f"label {_shortened(label)} is no class of the model; {IGNORE_HINT}"
        if found == -1:
            return None, None
        if not 0 <= found < self._limit:
            return None, f"label {_shortened(label)} is not in 0..{self._limit - 1}; {IGNORE_HINT}"
        return found, None


def whole_number(text: str) -> int | None:
    """Returns the number that a text is, in ASCII digits; None where it is none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
