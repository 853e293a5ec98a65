"""JSON Schema of the configuration files, for editors."""

from typing import Any

from pipeline.config.base import Section
from pipeline.config.input import FIELD_FORMATS
from pipeline.config.job import Config
from pipeline.config.schedule import ScheduleConfig
from pipeline.config.train import TrainConfig

#: The configuration model of each kind of file.
KINDS: dict[str, type[Section]] = {"label": Config, "train": TrainConfig, "schedule": ScheduleConfig}


def json_schema(kind: str) -> dict[str, Any]:
    """Returns the JSON Schema (draft 2020-12) of a configuration file.

    The kinds are those of `KINDS`. Only `load_config` checks the conditions that involve several fields.
    """
    model = KINDS[kind]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | model.model_json_schema()
    sections = schema["$defs"]
    if model is ScheduleConfig:
        # A dataset and the defaults share the fields of a job, so neither needs all of them.
        for section in sections.values():
            section.pop("required", None)
        fields = schema["properties"]
        dataset = {"$ref": "#/$defs/DatasetConfig"}
        fields["defaults"] = {"description": fields["defaults"]["description"]} | dataset
        fields["datasets"]["additionalProperties"] = False  # names that do not match the pattern
        sections["DatasetConfig"]["type"] = ["object", "null"]
    for section in (schema, *sections.values()):
        for name, field in section["properties"].items():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
            if "$ref" in field and name not in section.get("required", []):
                # A section whose lines are all comments is null in YAML.
                sections[field["$ref"].rpartition("/")[2]]["type"] = ["object", "null"]
    for name, formats in FIELD_FORMATS.items():
        field = sections["InputConfig"]["properties"][name]
        names = ", ".join(f"`{each}`" for each in formats)
        field["description"] = f"Only for {names}. {field['description']}"
    return schema
