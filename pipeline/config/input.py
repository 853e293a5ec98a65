"""The section `input`: the location of the shards, and which of their parts are image, key and label."""

from collections import Counter
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from pipeline.config.base import VALUE_HIDDEN, Address, NameOrUri, PositiveInt, Section, Uris
from pipeline.config.uris import InputUris
from pipeline.predictions import carried_column
from pipeline.text import arrow_type

InputFormat = Literal["auto", "webdataset", "parquet", "images", "table"]

_OPERATORS = {"=", "==", "!=", "<", "<=", ">", ">=", "in", "not in"}
#: Fields that no label depends on: they select samples, or are part of a shard's version.
_NOT_IN_FINGERPRINT = {
    "uri", "exclude", "format", "uri_column", "filter", "csv_columns", "check_objects", "carry",
    "on_damaged_shard",
}  # fmt: skip


def _field_of(formats: list[InputFormat], description: str, **options: Any) -> Any:
    """Returns a field that only these formats use; its description names them."""
    names = ", ".join(f"`{each}`" for each in formats)
    extra: JsonDict = {"formats": [*formats]}
    return Field(description=f"{names}: {description}", json_schema_extra=extra, **options)


def _names_to_types(value: Any) -> Any:
    """Returns a list of names as a mapping without types."""
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return dict.fromkeys(value) if is_list else value


class InputConfig(Section):
    """The location of the shards, and which of their parts are image, key and label."""

    uri: Uris = Field(
        description="Folder of the shards, or a single shard: `s3://`, `gs://` or a local path. Also a list "
        "of them, and glob patterns: `*`, `**`, `?`, `[a-c]`, `{a,b}`, `{0000..0999}`.",
        examples=["s3://my-bucket/shards", ["s3://my-bucket/a", "s3://my-bucket/b-{000..099}.tar"]],
    )
    exclude: list[Address] = Field(
        default=[],
        description="Glob patterns of objects and folders to exclude: full URIs, or names relative to the "
        "folder in `uri`. A pattern without a slash excludes names in every folder.",
        examples=[["val/**", "*-broken.tar"]],
    )
    format: InputFormat = Field(
        default="auto",
        description="Format of the shards. `auto`: inferred from each file extension. Others: only files "
        "with an extension of the format, and objects that `uri` names exactly.",
        examples=["webdataset"],
    )
    labels: bool = Field(
        default=True,
        description="Read the dataset's own labels as targets. False: every target is null.",
    )
    label_from: Literal["folder"] | None = Field(
        default=None,
        description="`folder`: the label of an image file, of a row of a table and of a sample of a tar is "
        "the name of its folder, and the label of a Parquet file is in the name of a folder such as "
        "`label=3`. Null: see `label_field` and `label_column`.",
        examples=["folder"],
    )
    label_field: str | None = _field_of(
        ["webdataset"],
        default=None,
        description="field of the `.json` member that holds the label; dots separate nested "
        "fields. Null: the label is in the `.cls` member.",
        examples=["annotation.class"],
    )
    image_column: str | None = _field_of(
        ["parquet"],
        default=None,
        description="name of the image column. Null: `image`, or the only column whose type is "
        "binary or a struct with binary `bytes`.",
        examples=["image"],
    )
    uri_column: str | None = _field_of(
        ["table"],
        default=None,
        description="name of the column with the URIs of the images. Null: the only column whose name "
        "is usual for it, such as `uri` or `image_url`.",
        examples=["image_url"],
    )
    label_column: str | None = _field_of(
        ["parquet", "table"],
        default=None,
        description="name of the label column. Null: no targets.",
        examples=["label"],
    )
    key_column: str | None = _field_of(
        ["parquet", "table"],
        default=None,
        description="name of the column with the sample keys. Null: the image's path or "
        "URI, or the row number if there is none.",
        examples=["id"],
    )
    carry: Annotated[
        dict[str, str | None],
        BeforeValidator(_names_to_types, json_schema_input_type=dict[str, str | None] | list[str]),
    ] = _field_of(
        ["webdataset", "parquet", "table"],
        default={},
        description="columns, or fields of the `.json` member, that are copied to "
        "each prediction row: a list of names, or a mapping of names to Arrow types such as `int64` or "
        "`timestamp[us, UTC]`. A name that prediction files have already becomes `input_<name>`.",
        examples=[{"id": "int64", "captured_at": None}],
    )
    filter: list[Annotated[list[Any], Field(min_length=3, max_length=3)]] = _field_of(
        ["table"],
        default=[],
        description="conditions that a row must meet, each a list of column, operator and value. "
        "Operators: `=`, `!=`, `<`, `<=`, `>`, `>=`, `in`, `not in`.",
        examples=[[["split", "=", "train"]]],
    )
    csv_columns: list[str] | None = _field_of(
        ["table"],
        default=None,
        description="names of the columns of CSV files without a header. Null: the first line is the header.",
        examples=[["bucket", "key"]],
    )
    check_objects: Literal["auto", "never", "always"] = _field_of(
        ["table"],
        default="auto",
        description="whether a run finds images that were replaced under the same URI. `auto`: in "
        "buckets and local folders, by listing them. `always`: also on web servers, with one request per "
        "image. `never`: an image is identified by its URI only.",
        examples=["always"],
    )
    key: Literal["first-dot", "last-dot"] = _field_of(
        ["webdataset"],
        default="first-dot",
        description="the part of a member's file name that is the sample's key. `first-dot`: the "
        "part before the first dot, as WebDataset does. `last-dot`: the part before the last dot.",
        examples=["last-dot"],
    )
    image_member: str | None = _field_of(
        ["webdataset"],
        default=None,
        description="extension of the member that is the image, such as `left.jpg`. Null: the "
        "first member with an image extension such as `jpg`, or else such as `left.jpg`.",
        examples=["left.jpg"],
    )
    on_damaged_shard: Literal["skip", "keep"] = _field_of(
        ["webdataset", "parquet"],
        default="skip",
        description="a shard that cannot be read to its end: `skip` labels nothing of it, `keep` labels the "
        "readable part. Either way the run ends with a non-zero status.",
        examples=["keep"],
    )
    target_names: NameOrUri | list[str] | None = Field(
        default=None,
        description="Names of the dataset's own classes, by integer label: a list, or the path or URI of a "
        "file as for `model.labels`. Null: the names in the schema of the file, if it has some; else an "
        "integer label is a class id of the model.",
        examples=[["cat", "dog"]],
    )
    target_map: NameOrUri | dict[str, str] | None = Field(
        default=None,
        description="Class of the model for each class of the dataset, by name: a mapping, or the path or "
        "URI of a JSON file with one. Several classes of the dataset may have the same class of the model. "
        "Null: classes with equal names.",
        examples=[{"sneakers": "Sneaker"}],
    )
    max_image_bytes: PositiveInt = Field(
        default=256 * 1024**2,
        description="Maximum size of an encoded image, in bytes. A larger image is an error row, and is not "
        "read.",
    )
    max_image_pixels: PositiveInt = Field(
        default=178_956_970,  # Pillow's limit against decompression bombs
        description="Maximum number of pixels of an image (width times height). A larger image is an error "
        "row, and is not decoded.",
    )

    @field_validator("*")
    @classmethod
    def _check_format(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects a field that the format does not use, because a run would ignore the field."""
        field, chosen = cls.model_fields[str(info.field_name)], info.data.get("format")
        if chosen is None or value == field.default or not isinstance(field.json_schema_extra, dict):
            return value
        formats = cast(list[str], field.json_schema_extra["formats"])
        if chosen not in formats and (chosen != "auto" or formats == ["table"]):
            remedy = f"remove the field, or set format: {' or '.join(formats)}"
            raise PydanticCustomError(VALUE_HIDDEN, f"not used with format: {chosen}; {remedy}")
        return value

    @field_validator("uri", "exclude")
    @classmethod
    def _check_patterns(cls, value: str | list[str]) -> str | list[str]:
        _ = InputUris.parse(value)
        return value

    @property
    def inputs(self) -> InputUris:
        """The objects that `uri` and `exclude` select."""
        return InputUris.parse(self.uri, self.exclude)

    @field_validator("carry")
    @classmethod
    def _check_types(cls, carry: dict[str, str | None]) -> dict[str, str | None]:
        columns = Counter(carried_column(name).lower() for name in carry)
        for name, kind in carry.items():
            column = carried_column(name)
            if columns[column.lower()] > 1:  # as engines of SQL compare names
                raise ValueError(f"{name!r} is one of two names of the column {column!r}; remove one")
            try:
                _ = kind and arrow_type(kind)
            except ValueError:
                message = f"{kind!r} of {name!r} is not an Arrow type such as int64 or timestamp[us, UTC]"
                raise ValueError(message) from None
        return carry

    @field_validator("filter")
    @classmethod
    def _check_operators(cls, conditions: list[list[Any]]) -> list[list[Any]]:
        for column, operator, _ in conditions:
            if not isinstance(column, str) or operator not in _OPERATORS:
                raise ValueError(f"expected a column, one of {' '.join(sorted(_OPERATORS))}, and a value")
        return conditions

    @field_validator("image_member")
    @classmethod
    def _check_member(cls, member: str | None, info: ValidationInfo) -> str | None:
        extension = member and member.lower().removeprefix(".")
        if extension and "." in extension and info.data.get("key") == "last-dot":
            raise ValueError("an extension has no dot with key: last-dot; each image is a sample of its own")
        return extension

    @property
    def label_settings(self) -> dict[str, Any]:
        """The settings that determine a label; only those without their default, so that more can follow."""
        return self.model_dump(exclude=_NOT_IN_FINGERPRINT, exclude_defaults=True)
