"""Published CRDs as JSON schemas that refuse what a cluster refuses, and the transcription held to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]
VERSION = "v1"
#: With CLoader, where there is one, a file of a megabyte takes a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_crds(folder: Path) -> dict[str, Json]:
    """The structural schemas of the CRDs in a folder, as they are published, by kind."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        for document in yaml.load_all(path.read_text(), _LOADER):
            if not document or document.get("kind") != "CustomResourceDefinition":
                continue
            versions = {version["name"]: version for version in document["spec"]["versions"]}
            if VERSION in versions:
                schema = versions[VERSION]["schema"]["openAPIV3Schema"]
                found[document["spec"]["names"]["kind"]] = schema
    return found


def faults(schema: Json, document: Json) -> list[str]:
    """What is wrong with a document, by a CRD's schema; its `metadata` are Kubernetes' own matter."""
    from jsonschema import Draft4Validator  # which OpenAPI 3.0 derives from

    strict = _strict(schema)
    strict["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
    errors = Draft4Validator(strict).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


def _strict(schema: Json) -> Json:
    """The schema as a strict server applies it: fields that it doesn't name are refused.

    Alternatives (`anyOf` and its like) only narrow what is described beside them, and stay as they are.
    """
    made = {name: value for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    fields = schema.get("properties", {})
    if fields:
        made["properties"] = {name: _strict(each) for name, each in fields.items()}
    if required := schema.get("required"):  # what has a default is there in the end
        made["required"] = [name for name in required if "default" not in fields.get(name, {})]
        if not made["required"]:  # draft 4 wants one at least
            del made["required"]
    if isinstance(schema.get("items"), dict):
        made["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    elif schema.get("type") == "object" and not is_open and not schema.get("additionalProperties"):
        made["additionalProperties"] = False
    if schema.get("x-kubernetes-embedded-resource"):
        made["properties"] = {"apiVersion": {}, "kind": {}, "metadata": {}} | made.get("properties", {})
    if schema.get("nullable") and "type" in made:
        kinds = made["type"] if isinstance(made["type"], list) else [made["type"]]
        made["type"] = [*kinds, "null"]
    return made


def deviations(
    kind: str, schema: Json, transcribed: dict[str, dict[str, str]], at: str = ""
) -> Iterator[str]:
    """Where a type of the transcription isn't as a CRD's schema has it.

    Args:
        kind: the type, as the transcription writes types.
        schema: of the CRD.
        transcribed: the transcription: by type, the types of its fields.
        at: where in the CRD that is.
    """
    if kind == "any":
        return
    if kind in transcribed:
        yield from _deviations_of_fields(kind, schema, transcribed, at)
        return
    expected = _type_of(kind)
    if schema.get("type") != expected:
        yield f"{at}: {schema.get('type')}, and not {expected}"
    elif kind.startswith("["):
        yield from deviations(kind[1:-1], schema.get("items", {}), transcribed, f"{at}[]")
    elif kind.startswith("{"):
        yield from deviations(kind[1:-1], schema.get("additionalProperties", {}), transcribed, f"{at}{{}}")
    elif "|" in kind and set(schema.get("enum", kind.split("|"))) != set(kind.split("|")):
        yield f"{at}: one of {schema['enum']}, and not of {kind.split('|')}"  # or said by a rule alone


def _type_of(kind: str) -> str:
    if kind.startswith("["):
        return "array"
    if kind.startswith(("{", "io.k8s.")):
        return "object"
    return "string" if "|" in kind else kind


def _deviations_of_fields(
    kind: str, schema: Json, transcribed: dict[str, dict[str, str]], at: str
) -> Iterator[str]:
    if schema.get("type") != "object":
        yield f"{at}: {schema.get('type')}, and not object"
        return
    fields = {name.rstrip("*"): each for name, each in transcribed[kind].items()}
    for name in schema.get("required", []):
        if name in fields and f"{name}*" not in transcribed[kind]:
            yield f"{at}.{name}: is required"
    for name, each in fields.items():
        if name in schema.get("properties", {}):
            yield from deviations(each, schema["properties"][name], transcribed, f"{at}.{name}")
        else:
            yield f"{at}.{name}: there is no such field"
