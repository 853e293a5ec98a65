"""Loads a configuration from YAML 1.2, from the record of a run, and from overrides."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from pipeline.config.job import Config
from pipeline.config.sections import VALUE_HIDDEN, ConfigError
from pipeline.config.train import TrainConfig
from pipeline.text import remove_credentials

T = TypeVar("T", bound=BaseModel)
Field = tuple[str, ...]
Source = str | Path | None


def load_config(
    kind: type[T], path: Source, overrides: Iterable[str] = (), *, keep_relative_paths: bool = False
) -> T:
    """Reads a YAML file as `kind` and applies `section.field=value` overrides, in order.

    Without a path, the overrides alone make the configuration. The path `env:NAME` reads the variable
    NAME of the environment: a submitted job gets its configuration from there. URIs are normalized. A
    relative path is made absolute, unless `keep_relative_paths` is set, for use on another machine.
    A `ConfigError` lists every fault, each with its field, and its line where the file has one.
    """
    return load_recorded(kind, path, overrides, keep_relative_paths=keep_relative_paths)[0]


def load_job_config(path: Source = None, overrides: Iterable[str] = ()) -> Config:
    """Loads the configuration of a labeling job, from YAML or the record of a run; see `load_config`."""
    return load_config(Config, path, overrides)


def load_train_config(path: Source = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Loads the configuration of a training job from YAML; see `load_config`."""
    return load_config(TrainConfig, path, overrides)


def load_recorded(
    kind: type[T], path: Source, overrides: Iterable[str] = (), *, keep_relative_paths: bool = False
) -> tuple[T, Mapping[str, Any]]:
    """Like `load_config`; returns also the record if the file is the record of a run, and else an empty one.

    A model from the Hugging Face hub is loaded by the commit that the run used, unless an override names
    another model or revision.
    """
    source = str(path) if path is not None else "configuration"
    values, lines = _read(source) if path is not None else ({}, {})
    record: dict[str, Any] = {}
    if {"run", "fingerprint", "config"} <= values.keys():
        record, values = values, values["config"]
        lines = {field[1:]: line for field, line in lines.items() if field[0] == "config"}
    recorded_model = _model(values)
    for override in overrides:
        lines[_apply(values, override)] = 0  # no line's fault
    commit = record.get("model_commit")
    if commit is not None and _model(values) == recorded_model is not None:
        values["model"] |= {"path": recorded_model[0].partition("@")[0], "revision": commit}
    try:
        return kind.model_validate(values, context={"keep_relative_paths": keep_relative_paths}), record
    except ValidationError as error:
        faults = "\n".join(_fault(fault, lines) for fault in error.errors())
        raise ConfigError(f"{source}:\n{faults}") from None


def _model(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return None
    return model["path"], model.get("revision")


def _read(source: str) -> tuple[dict[str, Any], dict[Field, int]]:
    """Returns the values of a file or variable, and the line of each field."""
    kind, _, name = source.partition(":")
    try:
        text = os.environ[name] if kind == "env" else Path(source).read_text(encoding="utf-8")
        values, node = _parsed(text)
        lines = dict(_lines(node))
    except KeyError:
        raise ConfigError(f"{source}: there is no such variable in the environment") from None
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = str(error.problem).partition(" with value")[0]  # of a duplicate key
        raise ConfigError(f"{source}: not valid YAML: {line}{problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{source}: holds a {type(values).__name__}, not a mapping of sections")
    return values or {}, lines


def _parsed(text: str) -> tuple[Any, Node | None]:
    yaml = YAML(typ="safe", pure=True)
    node = yaml.compose(text)
    return (None if node is None else yaml.constructor.construct_document(node)), node


def _lines(node: Node | None, at: Field = ()) -> Iterable[tuple[Field, int]]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            field = (*at, str(key.value))
            yield field, key.start_mark.line + 1
            yield from _lines(value, field)


def _apply(values: dict[str, Any], override: str) -> Field:
    """Sets one `section.field=value`, whose value is YAML; returns the field."""
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    if not equals or not all(field):
        raise ConfigError(f"--set {override}: expected section.field=value")
    try:
        value = _parsed(text)[0]
    except (YAMLError, ValueError, RecursionError):
        value = text
    for part in field[:-1]:
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {part} is not a section")
    values[field[-1]] = value
    return field


def _fault(fault: Mapping[str, Any], lines: Mapping[Field, int]) -> str:
    field = tuple(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if not field:  # the message names the fields
        return f"  {message}"
    inherited = ("defaults", *field[2:]) if field[0] == "datasets" else field
    line = lines.get(field, lines.get(inherited))
    where = f"{f'line {line}: ' if line else ''}{'.'.join(field)}"
    if fault["type"] == "extra_forbidden":
        return f"  {where}: unknown field"
    if fault["type"] == "missing":
        return f"  {'.'.join(field)}: required, but missing"
    if fault["type"] == VALUE_HIDDEN or isinstance(fault["input"], Mapping):
        return f"  {where}: {message}"
    # The value as it was given, without credentials and without the query of a URL.
    value = re.sub(r"(?<=[?#])[^\s\"']+", "", remove_credentials(repr(fault["input"])))
    return f"  {where}: {message}, not {value}"
