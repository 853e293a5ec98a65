"""The validator applies CRDs as strictly as a cluster."""

from __future__ import annotations

import pytest

from tests.configs.crds import Json, schema_errors

pytest.importorskip("jsonschema", reason="jsonschema is not installed")

INT_OR_STRING = {"x-kubernetes-int-or-string": True, "anyOf": [{"type": "integer"}, {"type": "string"}]}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (INT_OR_STRING, [1, "1Gi"], [1.5, {}, None]),
        ({"x-kubernetes-int-or-string": True, "pattern": "^[0-9]+$"}, [1, "1"], ["x"]),
        ({"type": "object"}, [{}], [{"a": 1}]),
        ({"type": "object", "additionalProperties": True}, [{"a": 1}], ["a"]),
        ({"x-kubernetes-preserve-unknown-fields": True}, [{"a": 1}, "a"], []),
        (
            {
                "type": "object",
                "x-kubernetes-preserve-unknown-fields": True,
                "properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}}},
            },
            [{"c": 1}, {"a": {"b": 1}}],
            [{"a": {"c": 1}}, {"a": {"b": "1"}}],
        ),
        (
            {
                "type": "object",
                "x-kubernetes-embedded-resource": True,
                "properties": {"a": {"type": "string"}},
            },
            [{"kind": "x", "metadata": {"name": "x"}, "a": "x"}],
            [{"b": 1}],
        ),
        ({"type": "string", "nullable": True}, ["a", None], [1]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, [1], [0]),
        (
            {
                "type": "object",
                "required": ["a", "b"],
                "properties": {"a": {"type": "string"}, "b": {"type": "string", "default": "x"}},
            },
            [{"a": "x"}],
            [{"b": "x"}],
        ),
    ],
    ids=[
        "int or string",
        "int or string without types",
        "no fields",
        "any fields",
        "anything",
        "unknown fields next to known ones",
        "embedded resource",
        "nullable",
        "exclusive bound",
        "required and default",
    ],
)
def test_kubernetes_extensions_of_schemas_are_applied(
    schema: Json, right: list[object], wrong: list[object]
) -> None:
    resource = {"type": "object", "properties": {"spec": schema}}
    for value in right:
        assert schema_errors(resource, {"kind": "X", "spec": value}) == [], value
    for value in wrong:
        assert schema_errors(resource, {"kind": "X", "spec": value}), value
