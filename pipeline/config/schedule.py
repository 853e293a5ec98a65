"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from pipeline.config.job import Config
from pipeline.config.sections import PositiveFloat, Section, ServiceUrl


class SubmitConfig(Section):
    """The Ray cluster that a schedule submits to, and what its jobs need there."""

    #: Of its dashboard, http://head:8265; null: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.
    address: ServiceUrl | None = None
    #: Local folder with the code, which is uploaded; null where the cluster's image has it.
    working_dir: str | None = None
    #: Local requirements file, of what Ray installs for the job; null where the image has everything.
    requirements: str | None = None
    #: The cluster's interpreter.
    python: Annotated[str, Field(min_length=1)] = "python"
    #: Seconds between two looks at the datasets.
    poll_s: PositiveFloat = 15


class DatasetConfig(Config):
    """One dataset of a schedule: a labelling job, and when it is due."""

    #: Five fields (minute, hour, day of the month, month, day of the week), or @daily and its like.
    cron: str
    timezone: str = "UTC"
    #: Also shards with error rows, or that couldn't be read.
    retry_errors: bool = False
    #: Remove the labels of shards that the input no longer has.
    prune: bool = False

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
        from croniter import croniter

        fields = cron.split()
        # Its R and H fields are other times for everybody who asks.
        usual = len(fields) == 5 and not any(field[:1] in "rRhH" for field in fields)
        try:
            if usual or (len(fields) == 1 and cron.startswith("@")):
                croniter(cron).get_next()
                return cron
        except ValueError:
            pass
        raise ValueError("not a cron expression of five fields that ever comes")

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, LookupError):
            raise ValueError("not a time zone, such as Europe/Berlin") from None
        return name

    @property
    def job(self) -> Config:
        """The labelling job alone."""
        return Config.model_validate(self.model_dump(include=set(Config.model_fields)))


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class DatasetsConfig(Section):
    """A list of datasets, each with its own input, model, output and schedule."""

    submit: SubmitConfig = SubmitConfig()
    #: Fields of every dataset that doesn't have them itself.
    defaults: dict[str, Any] = {}
    datasets: Annotated[dict[DatasetName, DatasetConfig], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_inherited(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        defaults, datasets = values.get("defaults") or {}, values.get("datasets")
        if not isinstance(defaults, dict) or not isinstance(datasets, dict):
            return values
        whole = {name: _over(defaults, {} if own is None else own) for name, own in datasets.items()}
        return values | {"defaults": defaults, "datasets": whole}


def _over(defaults: Mapping[str, Any], own: Any) -> Any:
    """A dataset's own fields over the common ones, field by field of each section."""
    if not isinstance(own, dict):
        return own
    merged = dict(defaults)
    for name, value in own.items():
        common = merged.get(name)
        if isinstance(common, dict) and isinstance(value, dict):
            value = common | value
        merged[name] = value
    return merged
