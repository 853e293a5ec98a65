"""The configuration of a schedule: datasets, each with its labeling job and its cron expression."""

import re
from contextlib import suppress
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.base import VALUE_HIDDEN, PositiveFloat, Section, ServiceUrl
from pipeline.config.job import Config


class SubmitConfig(Section):
    """The Ray cluster that a schedule submits to, and how its jobs run there."""

    address: ServiceUrl | None = Field(default=None, examples=["http://head:8265"])
    """URL of the cluster's dashboard. Null: `RAY_API_SERVER_ADDRESS`, `RAY_ADDRESS`, or local port 8265."""
    working_dir: str | None = Field(default=None, examples=["."])
    """Local folder with the code to upload. Null: the cluster's image contains the code."""
    requirements: str | None = Field(default=None, examples=["requirements.txt"])
    """Local requirements file that Ray installs for each job. Null: the cluster's image has all packages."""
    python: Annotated[str, Field(min_length=1)] = "python"
    """Python interpreter on the cluster."""
    poll_interval_s: PositiveFloat = 15
    """Seconds between polls of the datasets."""


class DatasetConfig(Config):
    """One dataset of a schedule: a labeling job, and the times at which it is due."""

    cron: str = Field(examples=["0 2 * * *"])
    """Cron expression of five fields (minute, hour, day of month, month, day of week; 0 and 7 are Sunday), or
    `@hourly`, `@daily`, `@weekly`, `@monthly`, `@yearly`.
    """
    timezone: ZoneInfo = Field(default=ZoneInfo("UTC"), examples=["Europe/Berlin"])
    """IANA time zone of the cron expression."""
    retry_errors: bool = False
    """In every run, also label shards with error rows, and shards that could not be read."""
    prune: bool = False
    """In every run, remove the labels of shards that were deleted from the input."""

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str) -> str:
        try:
            from croniter import croniter
        except ImportError:
            message = "schedules need croniter: pip install 'cvt-label[schedule]'"
            raise PydanticCustomError(VALUE_HIDDEN, message) from None
        # With R and H, croniter gives other times to each caller.
        if re.fullmatch(r"@\w+|[^rRhH\s]\S*(\s+[^rRhH\s]\S*){4}", cron.strip()):
            with suppress(ValueError):
                croniter(cron).get_next()
                return cron
        raise ValueError("expected a cron expression of five fields with at least one future time")

    @property
    def job(self) -> Config:
        """The labeling job without its schedule."""
        return Config(**{name: getattr(self, name) for name in Config.model_fields})


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class ScheduleConfig(Section):
    """The configuration of a schedule: a list of datasets, and the cluster that labels them."""

    submit: SubmitConfig = SubmitConfig()
    defaults: dict[str, Any] = Field(
        default={}, examples=[{"model": {"path": "microsoft/cvt-13"}, "timezone": "Europe/Berlin"}]
    )
    """Fields of every dataset that does not set them itself. Sections are merged field by field."""
    datasets: Annotated[dict[DatasetName, DatasetConfig], Field(min_length=1)]
    """Datasets by name. A name has at most 100 letters, digits, dots, underscores and hyphens. It is part of
    the name of the state file `schedule-<name>.json`.
    """

    @model_validator(mode="before")
    @classmethod
    def _apply_defaults(cls, values: Any) -> Any:
        match values:
            case {"datasets": dict(datasets)}:
                defaults = values.get("defaults") or {}
                merged = {
                    name: _merge(defaults, {} if own is None else own) for name, own in datasets.items()
                }
                return values | {"defaults": defaults, "datasets": merged}
        return values


def _merge(defaults: Any, own: Any) -> Any:
    """Returns the defaults, updated with a dataset's own fields, field by field in each section."""
    if not isinstance(defaults, dict) or not isinstance(own, dict):
        return own
    return defaults | {name: _merge(defaults.get(name), value) for name, value in own.items()}
