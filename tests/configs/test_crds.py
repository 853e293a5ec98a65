"""Manifests and transcription against KubeRay's published CRDs, where KUBERAY_CRDS names their folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.configs.crds import Json, deviations, faults, read_crds
from tests.configs.test_kubernetes import DOCUMENTS, kuberay, schema_of

KINDS = ("RayCluster", "RayJob", "RayCronJob")
OURS = [(name, document) for name, document in DOCUMENTS if document["kind"] in KINDS]

pytest.importorskip("jsonschema", reason="jsonschema is not installed")


# The published ones ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Json]:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder of KubeRay's CRDs")
    found = read_crds(Path(folder))
    assert set(KINDS) <= set(found), f"{folder} has the CRDs of {sorted(found)}"
    return found


@pytest.mark.parametrize("document", [d for _, d in OURS], ids=[name for name, _ in OURS])
def test_a_manifest_is_as_the_published_crd_wants_it(published: dict[str, Json], document: Json) -> None:
    assert faults(published[document["kind"]], document) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_transcription_is_as_the_published_crd_has_it(published: dict[str, Json], kind: str) -> None:
    assert list(deviations(kind, published[kind], kuberay())) == []


# Ones that are made here -------------------------------------------------------------------------


def published_form(value: Any) -> Any:
    """A schema of the transcription as a CRD has it: closed by itself, without references."""
    if isinstance(value, list):
        return [published_form(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    made = {name: published_form(each) for name, each in value.items()}
    if made.get("additionalProperties") is False:
        del made["additionalProperties"]
    return made | ({"type": "string"} if isinstance(value.get("enum"), list) else {})


def write_crds(folder: Path, change: Callable[[Json], object] = lambda schemas: None) -> dict[str, Json]:
    """Writes CRDs of the transcription's types, changed before that, and reads them."""
    schemas = {kind: published_form(schema_of(kind)) for kind in KINDS}
    change(schemas)
    for kind, schema in schemas.items():
        old = {"name": "v1alpha1", "schema": {"openAPIV3Schema": {"type": "string"}}}
        versions = [old, {"name": "v1", "schema": {"openAPIV3Schema": schema}}]
        spec = {"group": "ray.io", "names": {"kind": kind}, "versions": versions}
        crd = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "spec": spec}
        (folder / f"ray.io_{kind.lower()}s.yaml").write_text("---\n" + yaml.safe_dump(crd))
    return read_crds(folder)


def at(schemas: Json, path: str) -> Json:
    """The schema of a field: `RayJob.spec.entrypoint`; of a list's items by `[]`."""
    kind, *names = path.split(".")
    place: Json = schemas[kind]
    for name in names:
        place = place["items"] if name == "[]" else place["properties"][name]
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    return write_crds(tmp_path_factory.mktemp("crds"))


@pytest.mark.parametrize("document", [d for _, d in OURS], ids=[name for name, _ in OURS])
def test_crds_of_the_transcription_take_the_manifests_and_it_deviates_from_none(
    made: dict[str, Json], document: Json
) -> None:
    kind = document["kind"]
    assert faults(made[kind], document) == []
    assert list(deviations(kind, made[kind], kuberay())) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("spec.rayVersions", "2", "$.spec: Additional properties are not allowed ('rayVersions' was"),
        ("spec.headGroupSpec.rayStartParam", {}, "$.spec.headGroupSpec: Additional properties"),
        ("spec.workerGroupSpecs.0.replica", 1, "$.spec.workerGroupSpecs[0]: Additional properties"),
        ("spec.workerGroupSpecs.0.maxReplicas", "8", "'8' is not of type 'integer'"),
        ("spec.workerGroupSpecs.0.rayStartParams.num-cpus", 8, "8 is not of type 'string'"),
        ("spec.autoscalerOptions.upscalingMode", "Fast", "'Fast' is not one of ["),
        ("spec.headGroupSpec.template.anything", 1, None),  # which is Kubernetes' own there
        ("metadata.anything", 1, None),
        ("specs", {}, "$: Additional properties"),
    ],
)
def test_a_crd_is_applied_strictly(
    made: dict[str, Json], path: str, value: object, fault: str | None
) -> None:
    (document,) = [copy.deepcopy(d) for name, d in OURS if name == "raycluster.yaml"]
    *before, last = path.split(".")
    place: Any = document
    for part in before:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    found = faults(made["RayCluster"], document)
    assert len(found) == (fault is not None)
    assert fault is None or fault in found[0]


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
        "unknown fields beside known ones",
        "embedded resource",
        "nullable",
        "exclusive bound",
        "required and default",
    ],
)
def test_what_kubernetes_adds_to_schemas_is_honoured(
    schema: Json, right: list[object], wrong: list[object]
) -> None:
    whole = {"type": "object", "properties": {"spec": schema}}
    for value in right:
        assert faults(whole, {"kind": "X", "spec": value}) == [], value
    for value in wrong:
        assert faults(whole, {"kind": "X", "spec": value}), value


@pytest.mark.parametrize(
    ("path", "change", "deviation"),
    [
        ("RayJob.spec.backoffLimit", {"type": "string"}, "backoffLimit: string, and not integer"),
        ("RayJob.spec.metadata", {"additionalProperties": {"type": "integer"}}, "metadata{}: integer, and"),
        ("RayJob.spec.submissionMode", {"enum": ["HTTPMode"]}, "submissionMode: one of ['HTTPMode'], and"),
        ("RayJob.spec.submitterPodTemplate", {"type": "array"}, "submitterPodTemplate: array, and not obj"),
        ("RayJob.spec.rayClusterSpec.workerGroupSpecs", {"type": "object"}, "Specs: object, and not array"),
        ("RayJob.spec.rayClusterSpec.workerGroupSpecs.[].groupName", {"type": "integer"}, "[].groupName: "),
        ("RayJob.spec.submitterConfig", {"required": ["backoffLimit"]}, "backoffLimit: is required"),
        ("RayJob.spec.submitterConfig", {"properties": {}}, "backoffLimit: there is no such field"),
        ("RayJob.spec.submitterConfig", {"type": "string"}, "submitterConfig: string, and not object"),
    ],
)
def test_what_the_transcription_has_otherwise_is_told(
    tmp_path: Path, path: str, change: Json, deviation: str
) -> None:
    crds = write_crds(tmp_path, lambda schemas: at(schemas, path).update(change))
    (found,) = deviations("RayJob", crds["RayJob"], kuberay())
    assert deviation in found
    assert list(deviations("RayCluster", crds["RayCluster"], kuberay())) == []


def test_what_a_crd_says_by_a_rule_alone_is_no_deviation(tmp_path: Path) -> None:
    """As of `managedBy`: a string, of which a rule says what it may be."""
    crds = write_crds(tmp_path, lambda schemas: at(schemas, "RayJob.spec.managedBy").pop("enum"))
    assert list(deviations("RayJob", crds["RayJob"], kuberay())) == []
