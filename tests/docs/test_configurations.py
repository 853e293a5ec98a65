"""The YAML and JSON in the documentation: it loads as configuration, and fields in prose exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipeline.config import Config, ScheduleConfig, TrainConfig, load_config
from pipeline.config.fields import model_in
from tests.docs.pages import PAGES, Block, blocks_of, inline_code, name_of

#: What a configuration needs; blocks that show one section are completed with these sections.
COMPLETE: dict[str, Any] = {
    "input": {"uri": "/in"},
    "model": {"path": "fashion-mnist"},
    "output": {"uri": "/out"},
}


def kind_of(values: dict[str, Any]) -> type[Config] | type[ScheduleConfig] | type[TrainConfig]:
    """Returns the configuration that a block is part of."""
    if "datasets" in values:
        return ScheduleConfig
    return TrainConfig if "train" in values else Config


@pytest.mark.parametrize("block", blocks_of("yaml"), ids=lambda block: block.name)
def test_yaml_blocks_load(block: Block, tmp_path: Path) -> None:
    values = yaml.safe_load(block.text) or {}
    if isinstance(values, list):  # environment variables of a Kubernetes container
        assert all({"name"} < each.keys() <= {"name", "value", "valueFrom"} for each in values)
        return
    if values.keys() & {"scrape_configs", "metadata", "catalog"}:
        # tests/configs/test_kubernetes.py loads these with Prometheus, and as a part of a manifest; and
        # tests/docs/test_table_queries.py with pyiceberg.
        return
    kind = kind_of(values)
    if kind is Config:
        values = COMPLETE | values
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    load_config(kind, path)


@pytest.mark.parametrize("block", blocks_of("json"), ids=lambda block: block.name)
def test_json_blocks_parse(block: Block) -> None:
    assert json.loads(block.text)


def fields(kind: type[BaseModel], prefix: str = "") -> set[str]:
    """Returns the dotted names of all fields of a configuration."""
    found = set[str]()
    for name, field in kind.model_fields.items():
        found.add(prefix + name)
        if (section := model_in(field.annotation)) is not None:
            found |= fields(section, f"{prefix}{name}.")
    return found


FIELDS = fields(Config) | fields(ScheduleConfig) | fields(TrainConfig)
SECTIONS = {name.partition(".")[0] for name in FIELDS if "." in name} - {"train", "datasets"}
FILES = (".html", ".json", ".parquet", ".py", ".safetensors", ".yaml")
#: A field, also with its value; `storage.objects.list` is a permission of Google Cloud.
_FIELD = re.compile(
    rf"(?!storage\.objects)((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z0-9_]+)+)(?::? .*|=.*|\.)?$"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_fields_in_prose_exist(page: Path) -> None:
    codes = [code for code in inline_code(page) if not code.endswith(FILES)]
    assert {found[1] for code in codes if (found := _FIELD.match(code))} <= FIELDS
