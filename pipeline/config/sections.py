"""The job's configuration: strict YAML into frozen, typed sections.

Every field that a run depends on is here and nowhere else, and goes whole into the run record. Secrets
don't belong here: credentials come from the standard chains of each storage service.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """The configuration can't be used; the message names the file, the line and the field."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_sections(cls, values: Any) -> Any:
        """A section of which every line is a comment is null in YAML."""
        if not isinstance(values, dict):
            return values
        kinds = {name: field.annotation for name, field in cls.model_fields.items()}
        sections = {
            name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)
        }
        return {name: {} if value is None and name in sections else value for name, value in values.items()}


#: Marks in a URL: credentials end here; a query, or a fragment, begins.
_SECRET_MARKS = "@?#"

PositiveInt = Annotated[int, Field(ge=1)]

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _holding_no_secret(uri: str) -> str:
    """Refuses credentials before the host of a URI, and signed web addresses; the message shows neither."""
    scheme, separator, rest = uri.partition("://")
    if scheme in ("s3", "gs", "file"):  # a password may have a slash in it, and no bucket's name has a colon
        place, marks = rest.partition("/")[0], "@:"
    else:
        place, marks = rest, _SECRET_MARKS
    if separator and any(mark in place for mark in marks):
        message = "credentials don't belong here, but in the environment: only a plain address does"
        raise PydanticCustomError("secret", message)
    return uri


def _plain_url(url: str) -> str:
    """Refuses whatever has more than scheme, host and port; the message doesn't show it."""
    if any(mark in url for mark in _SECRET_MARKS):
        message = "credentials don't belong here, but in the environment: only scheme, host and port do"
        raise PydanticCustomError("secret", message)
    try:
        _ = urlsplit(url).port
    except ValueError:  # whose message holds the URL
        raise PydanticCustomError("secret", "not a URL") from None
    return url


#: Of a service; it goes into records and messages as it is.
ServiceUrl = Annotated[str, AfterValidator(_plain_url)]

#: A path, a URI or an address; it goes into records and messages as it is.
Address = Annotated[str, AfterValidator(_holding_no_secret)]
