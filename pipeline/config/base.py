"""The base of all configuration sections: strict, frozen models, and value types that hold no secret."""

import os
import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.storage import StorageError, is_relative, normalize_uri

#: The type of validation errors whose value must not be shown.
VALUE_HIDDEN = "value_hidden"

#: Environment variables with the address of a service.
_SERVICE_VARIABLES = re.compile(
    "AWS_ENDPOINT_URL(_.*)?|STORAGE_EMULATOR_HOST|HF_ENDPOINT|RAY_ADDRESS|RAY_API_SERVER_ADDRESS"
)


class ConfigError(ValueError):
    """The configuration is invalid. The message names the file and line, or the option, and the field."""


class Section(BaseModel):
    """A section of a configuration. Unknown fields and values of another type are rejected."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        field_title_generator=lambda name, _: name,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_null_section_as_empty(cls, value: Any, info: ValidationInfo) -> Any:
        """A section whose lines are all comments is null in YAML."""
        kind = cls.model_fields[str(info.field_name)].annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        return {} if value is None and is_section else value


def _reject_credentials(uri: str) -> str:
    """Rejects credentials before the host of a URI, and signed URLs."""
    scheme, separator, rest = uri.partition("://")
    if scheme in ("s3", "gs", "file"):  # a password may contain a slash; a bucket name contains no colon
        rest, marks = rest.partition("/")[0], "@:"
    else:
        marks = "@?#"
    if separator and any(mark in rest for mark in marks):
        message = "must not contain credentials: set them in their own environment variables"
        raise PydanticCustomError(VALUE_HIDDEN, message)
    return uri


def _check_service_url(url: str) -> str:
    """Rejects a URL with more than scheme, host and port."""
    _reject_credentials(url if "://" in url else f"http://{url}")
    try:
        _ = urlsplit(url).port
    except ValueError:  # its message contains the URL
        raise PydanticCustomError(VALUE_HIDDEN, "not a URL") from None
    return url


def check_environment() -> None:
    """Checks the addresses of services in the environment; raises `ConfigError`.

    Proxies are not checked: their passwords belong in the environment.
    """
    for name in filter(_SERVICE_VARIABLES.fullmatch, os.environ):
        try:
            _check_service_url(os.environ[name])
        except PydanticCustomError as error:
            raise ConfigError(f"{name}: {error}") from None


def _normalize(uri: str, info: ValidationInfo) -> str:
    """Returns the normalized URI. `load_config` may keep relative paths."""
    if is_relative(uri) and (info.context or {}).get("keep_relative_paths"):
        return uri
    try:
        return normalize_uri(uri)
    except StorageError as error:
        raise PydanticCustomError(VALUE_HIDDEN, "{cause}", {"cause": error.cause}) from None


def _normalize_each(value: Any, info: ValidationInfo) -> Any:
    uris = value if isinstance(value, list) else [value]
    if not uris or not all(isinstance(uri, str) and uri for uri in uris):
        raise ValueError("must be a URI or a list of URIs")
    found = [_normalize(_reject_credentials(uri), info) for uri in uris]
    return found if isinstance(value, list) else found[0]


def _normalize_unless_relative(uri: str, info: ValidationInfo) -> str:
    return uri if is_relative(uri) else _normalize(uri, info)


PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

#: The URL of a service. Records and messages show it.
ServiceUrl = Annotated[str, AfterValidator(_check_service_url)]

#: A path, a URI or an address. Records and messages show it.
Address = Annotated[str, Field(min_length=1), AfterValidator(_reject_credentials)]

#: The normalized URI of a folder or an object.
Uri = Annotated[Address, AfterValidator(_normalize)]

#: A URI or a list of URIs, normalized.
Uris = Annotated[str | list[str], BeforeValidator(_normalize_each)]

#: The name of a model, or the path or URI of a file or folder. URIs and absolute paths are normalized.
NameOrUri = Annotated[Address, AfterValidator(_normalize_unless_relative)]

#: The name of a class, or its id.
ClassName = Annotated[
    str, Field(strict=False, coerce_numbers_to_str=True, json_schema_extra={"type": ["string", "integer"]})
]
