"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from pipeline.config.sections import ConfigError
from pipeline.text import without_credentials


class StrictLoader(yaml.SafeLoader):
    """YAML 1.1 as everybody writes it: with numbers such as 1e-3, which it takes for text."""


SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(kind: type[SectionT], path: str | Path | None, overrides: Iterable[str] = ()) -> SectionT:
    """Reads a YAML file as `kind` and applies `section.field=value` overrides, in order.

    Without a path, the overrides alone make the configuration. `env:NAME` for a path reads the variable
    NAME of the environment: so a job carries its configuration.

    Raises:
        ConfigError: unreadable file, not YAML, an unknown or ill-typed field, a missing one. The
            message lists every fault, each with its field, and its line where the file has one.
    """
    return load_recorded(kind, path, overrides)[0]


def load_recorded(
    kind: type[SectionT], path: str | Path | None, overrides: Iterable[str] = ()
) -> tuple[SectionT, Mapping[str, Any]]:
    """As `load_config`; of the record of a run, also the record, which else is empty.

    The commit of a hub's model that the run has used is the model's revision, unless an override names
    another model or revision.
    """
    source = str(path) if path is not None else "configuration"
    values, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    record: dict[str, Any] = {}
    if {"run", "fingerprint", "config"} <= values.keys():
        record, values = values, values["config"]
        lines = {field[1:]: line for field, line in lines.items() if field[0] == "config"}
    recorded_model = _model_asked_for(values)
    for override in overrides:
        _apply(values, override)
        lines[_fields(override)] = 0  # no line's fault
    commit = record.get("model_commit")
    if commit is not None and _model_asked_for(values) == recorded_model is not None:
        values["model"] |= {"path": recorded_model[0].partition("@")[0], "revision": commit}
    try:
        return kind.model_validate(values), record
    except ValidationError as error:
        faults = "\n".join(_fault(fault, lines) for fault in error.errors())
        raise ConfigError(f"{source}:\n{faults}") from None


def _model_asked_for(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return None
    return model["path"], model.get("revision")


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Returns the file's values, and the line of each field."""
    try:
        text = _read_text(path)
        node = yaml.compose(text, Loader=StrictLoader)
        values = yaml.load(text, StrictLoader)
        lines: dict[tuple[str, ...], int] = {}
        if node is not None:
            _note_lines(node, (), lines, path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a mapping of sections")
    return values, lines


def _read_text(path: Path) -> str:
    if not str(path).startswith("env:"):
        return path.read_text(encoding="utf-8")
    try:
        return os.environ[str(path).removeprefix("env:")]
    except KeyError:
        raise ConfigError(f"{path}: there is no such variable in the environment") from None


def _note_lines(node: yaml.Node, at: tuple[str, ...], lines: dict[tuple[str, ...], int], path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        field = (*at, str(key.value))
        line = key.start_mark.line + 1
        if field in lines:  # YAML would silently let the last one win
            name = ".".join(field)
            raise ConfigError(f"{path}: line {line}: {name} stands here and in line {lines[field]}")
        lines[field] = line
        _note_lines(value, field, lines, path)


def _apply(values: dict[str, Any], override: str) -> None:
    """Sets one `section.field=value`; the value is read as YAML, as it would be in the file."""
    _, equals, text = override.partition("=")
    fields = _fields(override)
    if not equals or not all(fields):
        raise ConfigError(f"--set {override}: expected section.field=value")
    try:
        value = yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    for field in fields[:-1]:
        if values.get(field) is None:
            values[field] = {}
        values = values[field]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {field} is not a section")
    values[fields[-1]] = value


def _fields(override: str) -> tuple[str, ...]:
    return tuple(override.partition("=")[0].strip().split("."))


def _redacted(text: str) -> str:
    """A value that is shown as it was given, without what may be a secret in its URLs."""
    return re.sub(r"(?<=[?#])[^\s\"']+", "", without_credentials(text))


def _fault(fault: Mapping[str, Any], lines: Mapping[tuple[str, ...], int]) -> str:
    field = tuple(str(part) for part in fault["loc"])
    inherited = ("defaults", *field[2:]) if field[:1] == ("datasets",) else field
    line = lines.get(field, lines.get(inherited))
    where = f"line {line}: " if line else ""
    name = ".".join(field)
    if not name:  # of several fields; the message names them
        return f"  {fault['msg'].removeprefix('Value error, ')}"
    if fault["type"] == "secret":
        return f"  {where}{name}: {fault['msg']}"
    if fault["type"] == "extra_forbidden":
        return f"  {where}{name}: unknown field"
    if fault["type"] == "missing":
        return f"  {name}: required, but missing"
    message = fault["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(fault["input"], Mapping) else f", not {_redacted(repr(fault['input']))}"
    return f"  {where}{name}: {message}{shown}"
