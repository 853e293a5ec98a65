"""Options of readers from fields of the sections `input` and `read`."""

from collections.abc import Sequence
from typing import Any

from pipeline.config import InputConfig, ReadConfig
from pipeline.read import ReadOptions


def read_options(class_names: Sequence[str] = (), **fields: Any) -> ReadOptions:
    """Returns options of readers. No field has the same name in both sections."""
    read = {name: fields.pop(name) for name in [*fields] if name in ReadConfig.model_fields}
    return ReadOptions(InputConfig(uri="/in", **fields), ReadConfig(**read), class_names)
