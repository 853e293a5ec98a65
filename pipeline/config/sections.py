"""What all configurations are made of: strict, frozen sections, and types of values that hold no secret."""

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.storage import StorageError, is_relative, normalize_uri

#: The type of faults whose value is not shown.
VALUE_HIDDEN = "value_hidden"


class ConfigError(ValueError):
    """The configuration can't be used; the message names the file, the line and the field."""


class Section(BaseModel):
    """A section of a configuration; unknown fields and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*", mode="before")
    @classmethod
    def _empty_sections_are_sections(cls, value: Any, info: ValidationInfo) -> Any:
        """A section of which every line is a comment is null in YAML."""
        kind = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return {} if value is None and is_section else value


def _holding_no_secret(uri: str) -> str:
    """Refuses credentials before the host of a URI, and signed web addresses."""
    scheme, separator, rest = uri.partition("://")
    if scheme in ("s3", "gs", "file"):  # a password may contain a slash; no bucket's name contains a colon
        rest, marks = rest.partition("/")[0], "@:"
    else:
        marks = "@?#"
    if separator and any(mark in rest for mark in marks):
        message = "credentials don't belong here, but in the environment: only a plain address does"
        raise PydanticCustomError(VALUE_HIDDEN, message)
    return uri


def _plain_url(url: str) -> str:
    """Refuses a URL with more than scheme, host and port."""
    _holding_no_secret(url if "://" in url else f"http://{url}")
    try:
        _ = urlsplit(url).port
    except ValueError:  # its message contains the URL
        raise PydanticCustomError(VALUE_HIDDEN, "not a URL") from None
    return url


def _normalized(uri: str, info: ValidationInfo) -> str:
    """Returns the one spelling of a URI; `load_config` may keep relative paths."""
    if is_relative(uri) and (info.context or {}).get("keep_relative_paths"):
        return uri
    try:
        return normalize_uri(uri)
    except StorageError as error:
        raise PydanticCustomError(VALUE_HIDDEN, "{cause}", {"cause": error.cause}) from None


def _normalized_unless_relative(uri: str, info: ValidationInfo) -> str:
    return uri if is_relative(uri) else _normalized(uri, info)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

#: The URL of a service. Records and messages show it.
ServiceUrl = Annotated[str, AfterValidator(_plain_url)]

#: A path, a URI or an address. Records and messages show it.
Address = Annotated[str, Field(min_length=1), AfterValidator(_holding_no_secret)]

#: The place of objects, in its one spelling.
Uri = Annotated[Address, AfterValidator(_normalized)]

#: A model's name, or the path or URI of a file or folder; URIs and absolute paths are in their one spelling.
NameOrUri = Annotated[Address, AfterValidator(_normalized_unless_relative)]
