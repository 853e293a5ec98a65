"""Looks up the sections and fields of a configuration model by their path."""

import difflib
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel


def describe_unknown_field(kind: type[BaseModel], field: Sequence[str]) -> str:
    """Returns the error message of an unknown field, with the closest field of the same section.

    Args:
        kind: the model of the configuration.
        field: path of the unknown field.
    """
    section = kind
    parts = iter(field[:-1])
    for part in parts:
        annotation = section.model_fields[part].annotation
        section = model_in(annotation) or section
        if get_origin(annotation) is dict:
            next(parts, None)  # the key of the mapping
    known = list(section.model_fields)
    close = difflib.get_close_matches(field[-1], known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(known)}"
    return f"unknown field; {hint}"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in an annotation such as `Section | None` or `dict[str, Section]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := model_in(each))), None)
