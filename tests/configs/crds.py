"""KubeRay's published CRDs as JSON schemas that reject what a cluster rejects."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Json = dict[str, Any]
#: The C loader reads a file of a megabyte ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def kuberay_validator(kind: str) -> Any:
    """Returns a validator of RayCluster or RayJob, or skips the test if `KUBERAY_CRDS` names no folder."""
    pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder of KubeRay's CRDs")
    text = (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text()
    versions = {version["name"]: version for version in yaml.load(text, _LOADER)["spec"]["versions"]}
    return validator(versions["v1"]["schema"]["openAPIV3Schema"])


def schema_errors(schema: Json, document: Json) -> list[str]:
    """Returns the errors of a document by a CRD's schema. Kubernetes itself defines `metadata`."""
    return [f"{error.json_path}: {error.message}" for error in validator(schema).iter_errors(document)]


def validator(schema: Json) -> Any:
    """Returns a validator that applies a CRD's schema strictly."""
    from jsonschema import Draft4Validator  # OpenAPI 3.0 derives from draft 4

    strict = _strict(schema)
    strict["properties"] |= {name: {} for name in ("apiVersion", "kind", "metadata")}
    return Draft4Validator(strict)


def _strict(schema: Json) -> Json:
    """Returns the schema as a strict server applies it: unknown fields are rejected.

    Alternatives (such as `anyOf`) only narrow the schema next to them, so they are not changed.
    """
    made = {name: value for name, value in schema.items() if not name.startswith("x-kubernetes-")}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    fields = schema.get("properties", {})
    if fields:
        made["properties"] = {name: _strict(each) for name, each in fields.items()}
    if required := schema.get("required"):  # the server sets fields with a default
        made["required"] = [name for name in required if "default" not in fields.get(name, {})]
        if not made["required"]:  # draft 4 requires at least one name
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
