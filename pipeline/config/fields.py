"""Looks up the sections and fields of a configuration model by their path, and describes their errors."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

#: Error messages by pydantic's error type. Fields in braces come from the error's context.
_MESSAGES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "int_type": "must be an integer",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "list_type": "must be a list",
    "literal_error": "must be one of {expected}",
    "missing": "required, but missing",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_type": "must be text",
    "zoneinfo_str": "must be an IANA time zone such as Europe/Berlin",
}
#: Maximum number of fields that a message about a section names.
_SHOWN_FIELDS = 4


def describe_error(kind: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Returns the message of a validation error. Other types than the known ones keep pydantic's message.

    Args:
        kind: the model of the configuration.
        error: an item of `ValidationError.errors()`.
    """
    field = tuple(str(part) for part in error["loc"])
    match error:
        case {"type": "extra_forbidden"}:
            return describe_unknown_field(kind, field)
        case {"type": "model_type"}:
            names = list(_section_at(kind, field).model_fields)
            shown = ", ".join(names if len(names) <= _SHOWN_FIELDS else [*names[:_SHOWN_FIELDS], "..."])
            return f"expected a section with the fields {shown}"
        case {"type": "string_too_short" | "too_short", "ctx": {"min_length": 1}}:
            return "must not be empty"
        case {"type": name} if name in _MESSAGES:
            return _MESSAGES[name].format_map(error.get("ctx", {}))
    return str(error["msg"]).removeprefix("Value error, ")


def describe_unknown_field(kind: type[BaseModel], field: Sequence[str]) -> str:
    """Returns the error message of an unknown field, with the closest field of the same section.

    Args:
        kind: the model of the configuration.
        field: path of the unknown field.
    """
    known = list(_section_at(kind, field[:-1]).model_fields)
    close = difflib.get_close_matches(field[-1], known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(known)}"
    return f"unknown field; {hint}"


def _section_at(kind: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """Returns the section at a path of the model `kind`."""
    section = kind
    parts = iter(path)
    for part in parts:
        annotation = section.model_fields[part].annotation
        section = model_in(annotation) or section
        if get_origin(annotation) is dict:
            next(parts, None)  # the key of the mapping
    return section


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in an annotation such as `Section | None` or `dict[str, Section]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := model_in(each))), None)
