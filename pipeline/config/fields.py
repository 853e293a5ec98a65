"""Looks up the sections and fields of a configuration model by their path, and describes their errors."""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

#: Messages by pydantic's error type, where pydantic's own message is not plain.
_MESSAGES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "missing": "required, but missing",
    "model_type": "must be a section with fields",
    "string_type": "must be text",
    "zoneinfo_str": "must be an IANA time zone such as Europe/Berlin",
}


def describe_error(kind: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Returns the message of an item of `ValidationError.errors()`, such as "must be a valid integer"."""
    field = tuple(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            sections = [model_in(annotation) or kind for _, annotation in _annotations(kind, field[:-1])]
            known = list([kind, *sections][-1].model_fields)
            close = difflib.get_close_matches(field[-1], known, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known fields: {', '.join(known)}"
            return f"unknown field; {hint}"
        case "string_too_short" | "too_short" if error["ctx"]["min_length"] == 1:
            return "must not be empty"
    message = str(error["msg"]).removeprefix("Value error, ").partition(" after validation")[0]
    return _MESSAGES.get(error["type"], re.sub(r"^\w+ should ", "must ", message))


def merge_unions(kind: type[BaseModel], errors: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the errors, merged for each union: pydantic reports each of its types, with an internal name."""
    by_field = defaultdict[tuple[Any, ...], list[dict[str, Any]]](list)
    for error in errors:
        location = error["loc"]
        fields = _annotations(kind, location)
        end = next((end for end, annotation in fields if _is_union(annotation)), len(location))
        by_field[location[:end]].append({**error, "loc": location[:end] + location[end + 1 :]})
    for field, found in by_field.items():
        inside = [error for error in found if error["loc"] != field]
        chosen = inside or [error for error in found if not error["type"].endswith("_type")]
        expected = " or ".join(describe_error(kind, error).removeprefix("must be ") for error in found)
        yield from chosen or [found[0] | {"type": "union_type", "msg": f"must be {expected}"}]


def _is_union(annotation: Any) -> bool:
    """Returns whether an annotation has several types; null is none of them."""
    return get_origin(annotation) in (Union, UnionType) and len({*get_args(annotation)} - {NoneType}) > 1


def _annotations(section: type[BaseModel], location: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yields the number of parts of a location up to each field, and the field's annotation."""
    parts = enumerate(location, 1)
    for end, part in parts:
        if part not in section.model_fields:
            return
        annotation = section.model_fields[part].annotation
        yield end, annotation
        section = model_in(annotation) or section
        if get_origin(annotation) is dict:
            next(parts, None)  # the key of the mapping


def model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the model in an annotation such as `Section | None` or `dict[str, Section]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := model_in(each))), None)
