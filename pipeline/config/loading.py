"""Loads a configuration from YAML 1.2 or from a run record, and applies overrides."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node

from pipeline.config.base import VALUE_HIDDEN, ConfigError
from pipeline.config.fields import describe_error, merge_unions
from pipeline.config.job import Config
from pipeline.config.train import TrainConfig
from pipeline.text import remove_secrets

T = TypeVar("T", bound=BaseModel)
Field = tuple[str, ...]
Source = str | Path | None
#: What set a field: a line of the file, or an override.
Origin = int | str


def load_job_config(path: Source = None, overrides: Iterable[str] = ()) -> Config:
    """Loads the configuration of a labeling job from YAML or from a run record.

    Args:
        path: a YAML file or a run record. `env:NAME` reads the environment variable NAME, which holds the
            configuration of a submitted job. None: only the overrides set fields.
        overrides: `section.field=value`, where the value is YAML, such as `output.topk=10`, in order.

    Returns:
        The validated configuration, with normalized URIs.

    Raises:
        ConfigError: lists every error, each with its field, and with its line or its override.
    """
    return load_config(Config, path, overrides)


def load_train_config(path: Source = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Loads the configuration of a training job from YAML, in the same way as `load_job_config`."""
    return load_config(TrainConfig, path, overrides)


def load_config(
    kind: type[T], path: Source, overrides: Iterable[str] = (), *, keep_relative_paths: bool = False
) -> T:
    """Loads a configuration of any kind, in the same way as `load_job_config`.

    With `keep_relative_paths`, relative paths are not made absolute, because another machine uses them. From
    a run record, a model of the Hugging Face hub is loaded at the commit that the recorded run used, unless
    an override sets another model or revision.
    """
    source = str(path) if path is not None else "configuration"
    values, origins = _read(source) if path is not None else ({}, {})
    commit = None
    if {"run", "fingerprint", "config"} <= values.keys():
        commit, values = values.get("model_commit"), values["config"]
        origins = {field[1:]: line for field, line in origins.items() if field[0] == "config"}
    recorded_model = _model(values)
    for override in overrides:
        _apply(override, values, origins)
    if commit is not None and _model(values) == recorded_model is not None:
        values["model"] |= {"path": recorded_model[0].partition("@")[0], "revision": commit}
    try:
        return kind.model_validate(values, context={"keep_relative_paths": keep_relative_paths})
    except ValidationError as error:
        errors = [_describe(kind, each, origins) for each in merge_unions(kind, error.errors())]
    of_file = [f"  {message}" for message in errors if not message.startswith("--set ")]
    of_overrides = [message for message in errors if message.startswith("--set ")]
    header = [f"{source}:"] if of_file else []
    raise ConfigError("\n".join([*header, *of_file, *of_overrides]))


def _model(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("path"), str):
        return None
    return model["path"], model.get("revision")


def _read(source: str) -> tuple[dict[str, Any], dict[Field, Origin]]:
    """Returns the values of a file or environment variable, and the line of each field."""
    kind, _, name = source.partition(":")
    try:
        text = os.environ[name] if kind == "env" else Path(source).read_text(encoding="utf-8")
        values, node = _parse(text)
        lines = dict[Field, Origin](_lines(node))
    except KeyError:
        raise ConfigError(f"{source}: the environment has no such variable") from None
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        problem = str(error.problem).partition(" with value")[0]  # of a duplicate key
        raise ConfigError(f"{source}: not valid YAML: {line}{problem}") from None
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(f"{source}: expected a mapping of sections, found a {type(values).__name__}")
    return values or {}, lines


def _parse(text: str) -> tuple[Any, Node | None]:
    yaml = YAML(typ="safe", pure=True)
    node = yaml.compose(text)
    return (None if node is None else yaml.constructor.construct_document(node)), node


def _lines(node: Node | None, parent: Field = ()) -> Iterator[tuple[Field, int]]:
    """Yields every field of a YAML mapping with its line."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            field = (*parent, str(key.value))
            yield field, key.start_mark.line + 1
            yield from _lines(value, field)


def _apply(override: str, values: dict[str, Any], origins: dict[Field, Origin]) -> None:
    """Sets one `section.field=value`, whose value is YAML, in a configuration and in the origins."""
    name, equals, text = override.partition("=")
    field = tuple(name.strip().split("."))
    if not equals or not all(field):
        raise ConfigError(f"--set {remove_secrets(override)}: expected section.field=value")
    try:
        value = _parse(text)[0]
    except (YAMLError, ValueError, RecursionError):
        value = text
    for depth, part in enumerate(field[:-1], 1):
        if values.get(part) is None:
            values[part] = {}
            origins[field[:depth]] = override
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {remove_secrets(override)}: {part} is not a section")
    values[field[-1]] = value
    for replaced in [each for each in origins if each[: len(field)] == field]:
        del origins[replaced]
    origins[field] = override


def _describe(kind: type[BaseModel], error: Mapping[str, Any], origins: Mapping[Field, Origin]) -> str:
    """Returns the message of a validation error, with the line or the override that set the value."""
    field = tuple(str(part) for part in error["loc"])
    message = describe_error(kind, error)
    if field[-1:] == ("[key]",):  # of a mapping, such as the name of a dataset
        field, message = field[:-1], f"the name {message}"
    if named := re.match(r"([a-z]+\.[a-z_]+): ", message):  # a condition on several fields names one of them
        field, message = (*field, *named[1].split(".")), message.removeprefix(named[0])
    is_hidden = error["type"] == VALUE_HIDDEN
    origin = _find_origin(field, origins)
    place = f"{'.'.join(field)}: " if field else ""
    if isinstance(origin, str):
        name, _, value = origin.partition("=")
        shown = name if is_hidden else f"{name}={remove_secrets(value)}"
        return f"--set {shown}: {'' if name.strip() == '.'.join(field) else place}{message}"
    if origin is not None:
        place = f"line {origin}: {place}"
    has_value = error["type"] not in ("extra_forbidden", "missing") and not is_hidden
    if has_value and not isinstance(error["input"], Mapping) and error["input"] not in ("", []):
        message += f", not {remove_secrets(_as_yaml(error['input']))}"
    return f"{place}{message}"


def _find_origin(field: Field, origins: Mapping[Field, Origin]) -> Origin | None:
    """Returns what set a field, or else the section that holds the field; None for neither."""
    for end in range(len(field), 0, -1):
        if field[:end] in origins:
            return origins[field[:end]]
        # The value of a dataset's field may come from the defaults of all datasets.
        if field[0] == "datasets" and ("defaults", *field[2:end]) in origins and end > 2:
            return origins["defaults", *field[2:end]]
    return None


def _as_yaml(value: Any) -> str:
    """Returns a value as the user writes the value in YAML, as far as YAML and Python differ."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
