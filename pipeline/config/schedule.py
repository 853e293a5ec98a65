"""The configuration of a schedule: datasets, each with its labeling job and its cron expression."""

import re
from contextlib import suppress
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.job import Config
from pipeline.config.sections import VALUE_HIDDEN, PositiveFloat, Section, ServiceUrl


class SubmitConfig(Section):
    """The Ray cluster that a schedule submits to, and how its jobs run there."""

    #: The dashboard, http://head:8265; null: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.
    address: ServiceUrl | None = None
    #: Local folder with the code to upload; null: the cluster's image contains it.
    working_dir: str | None = None
    #: Local requirements file that Ray installs for the job; null: the image contains everything.
    requirements: str | None = None
    #: The cluster's interpreter.
    python: Annotated[str, Field(min_length=1)] = "python"
    #: Seconds between two polls of the datasets.
    poll_interval_s: PositiveFloat = 15


class DatasetConfig(Config):
    """One dataset of a schedule: a labeling job, and when it is due."""

    #: Five fields (minute, hour, day of the month, month, day of the week), or @daily and the like.
    cron: str
    timezone: ZoneInfo = ZoneInfo("UTC")
    #: Label also shards with error rows, and shards that could not be read.
    retry_errors: bool = False
    #: Remove the labels of shards that are deleted from the input.
    prune: bool = False

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
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
        raise ValueError("not a cron expression of five fields that ever comes")

    @property
    def job(self) -> Config:
        """The labeling job without its schedule."""
        return Config(**{name: getattr(self, name) for name in Config.model_fields})


DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]


class ScheduleConfig(Section):
    """A list of datasets, each with its own input, model, output and schedule."""

    submit: SubmitConfig = SubmitConfig()
    #: Fields for every dataset that does not set them itself.
    defaults: dict[str, Any] = Field(default_factory=dict)
    datasets: Annotated[dict[DatasetName, DatasetConfig], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _defaults_are_inherited(cls, values: Any) -> Any:
        match values:
            case {"datasets": dict(datasets)}:
                defaults = values.get("defaults") or {}
                whole = {
                    name: _merged(defaults, {} if own is None else own) for name, own in datasets.items()
                }
                return values | {"defaults": defaults, "datasets": whole}
        return values


def _merged(common: Any, own: Any) -> Any:
    """Returns a dataset's own fields over the common ones, field by field of each section."""
    if not isinstance(common, dict) or not isinstance(own, dict):
        return own
    return common | {name: _merged(common.get(name), value) for name, value in own.items()}
