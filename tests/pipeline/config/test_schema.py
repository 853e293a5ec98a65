"""The JSON Schema of configuration files, checked with a JSON Schema validator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import KINDS, json_schema
from pipeline.config.base import Section
from pipeline.config.fields import model_in

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = {
    "demo.yaml": "label",
    "gpu_cluster.yaml": "label",
    "fashion_mnist_train.yaml": "train",
    "schedule.yaml": "schedule",
}
JOB = {"input": {"uri": "in"}, "model": {"path": "fashion-mnist"}, "output": {"uri": "out"}}


def errors(kind: str, document: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schema(kind))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a model and of its sections that hold values."""
    for name, field in model.model_fields.items():
        section = model_in(field.annotation)
        if section is None or field.description:
            yield f"{path}{name}", field
        if section is not None:
            yield from fields(section, f"{path}{name}.")


def test_every_example_file_has_a_kind() -> None:
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_example_file_fits_its_schema(name: str) -> None:
    assert errors(FILES[name], yaml.safe_load((CONFIGS / name).read_text())) == []


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_valid_draft_2020_12(kind: str) -> None:
    schema = json_schema(kind)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_description(kind: str) -> None:
    described = dict(fields(KINDS[kind]))
    assert len(described) > 20
    for name, field in described.items():
        description = " ".join((field.description or "").split())
        assert description.endswith("."), name
        if not field.is_required() and field.get_default(call_default_factory=True) is None:
            assert "Null: " in description, name


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_of_the_schema_are_one_line(kind: str) -> None:
    for section in json_schema(kind)["$defs"].values():
        for field in section["properties"].values():
            assert "\n" not in field.get("description", "")


def test_description_names_the_formats_that_use_the_field() -> None:
    properties = json_schema("label")["$defs"]["InputConfig"]["properties"]
    assert properties["filter"]["description"].startswith("Only for `table`. Conditions")
    assert properties["key_column"]["description"].startswith("Only for `parquet`, `table`. Column")


@pytest.mark.parametrize("kind", KINDS)
def test_sections_are_described(kind: str) -> None:
    schema = json_schema(kind)
    for section in (schema, *schema["$defs"].values()):
        assert section["description"]
        assert section["description"] != Section.__doc__


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_fits_its_field(kind: str) -> None:
    schema = json_schema(kind)
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            validator = jsonschema.Draft202012Validator(field | {"$defs": schema["$defs"]})
            for example in field.get("examples", []):
                assert validator.is_valid(example), name
            if "default" in field:
                assert validator.is_valid(field["default"]), name


@pytest.mark.parametrize(
    ("kind", "document", "message"),
    [
        ("label", JOB | {"outputs": {}}, "'outputs' was unexpected"),
        (
            "label",
            JOB | {"output": {"uri": "x", "topk": 0}},
            "$.output.topk: 0 is less than the minimum of 1",
        ),
        ("label", JOB | {"output": {"topk": 3}}, "$.output: 'uri' is a required property"),
        (
            "label",
            JOB | {"gate": {"max_js": 2}},
            "$.gate.max_js: 2 is not valid under any of the given schemas",
        ),
        ("label", JOB | {"decode": {"device": "cuda"}}, "is not one of ['cpu', 'gpu', 'auto']"),
        ("train", {"train": {"uri": "x"}}, "'validation' is a required property"),
        ("schedule", {"datasets": {}}, "$.datasets: {} should be non-empty"),
        ("schedule", {"datasets": {"../a": None}}, "$.datasets: '../a' does not match"),
        (
            "schedule",
            {"defaults": {"inputs": {}}, "datasets": {"a": None}},
            "'inputs' was unexpected",
        ),
    ],
)
def test_wrong_document_does_not_fit(kind: str, document: Any, message: str) -> None:
    assert message in "\n".join(errors(kind, document))


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        ("label", JOB | {"storage": None}),  # a section whose lines are all comments
        ("schedule", {"defaults": JOB | {"cron": "@daily"}, "datasets": {"a": None, "b": {"prune": True}}}),
    ],
)
def test_document_with_null_sections_fits(kind: str, document: Any) -> None:
    assert errors(kind, document) == []


def test_command_prints_the_schema_without_torch_and_ray() -> None:
    code = (
        "import sys; sys.argv = ['cvt-label', 'config', '--schema', 'train']\n"
        "from jobs.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'ray') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json_schema("train")
    assert done.stderr.strip() == "[]"
