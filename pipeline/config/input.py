"""The section `input`: the location of the shards, and which of their parts are image, key and label."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from pipeline.config.base import VALUE_HIDDEN, Address, ClassName, NameOrUri, PositiveInt, Section, Uris
from pipeline.config.uris import InputUris
from pipeline.text import arrow_type

InputFormat = Literal["auto", "webdataset", "parquet", "images", "table"]

_OPERATORS = ("!=", "<", "<=", "=", "==", ">", ">=", "in", "not in")
#: Fields that no label depends on: they select samples, or are part of a shard's version.
NOT_IN_FINGERPRINT = {
    "uri", "exclude", "format", "uri_column", "filter", "csv_columns", "check_objects", "carry",
    "on_damaged_shard",
}  # fmt: skip
#: The formats that use a field. All formats use the other fields.
FIELD_FORMATS: dict[str, tuple[InputFormat, ...]] = {
    "label_field": ("webdataset",),
    "image_column": ("parquet",),
    "uri_column": ("table",),
    "label_column": ("parquet", "table"),
    "key_column": ("parquet", "table"),
    "carry": ("webdataset", "parquet", "table"),
    "filter": ("table",),
    "csv_columns": ("table",),
    "check_objects": ("table",),
    "key": ("webdataset",),
    "image_member": ("webdataset",),
    "on_damaged_shard": ("webdataset", "parquet"),
}


def _names_to_types(value: Any) -> Any:
    """Returns a list of names as a mapping without types."""
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return dict.fromkeys(value) if is_list else value


class InputConfig(Section):
    """The location of the shards, and which of their parts are image, key and label."""

    uri: Uris = Field(
        examples=["s3://my-bucket/shards", ["s3://my-bucket/a", "s3://my-bucket/b-{000..099}.tar"]]
    )
    """Folder of the shards, or a single shard: `s3://`, `gs://` or a local path. Also a list of them, and
    glob patterns: `*`, `**`, `?`, `[a-c]`, `{a,b}`, `{0000..0999}`.
    """
    exclude: list[Address] = Field(default=[], examples=[["val/**", "*-broken.tar"]])
    """Glob patterns of objects and folders to exclude: full URIs, or names relative to the folder in `uri`. A
    pattern without a slash excludes names in every folder.
    """
    format: InputFormat = "auto"
    """Format of the shards. `auto`: inferred from each file extension. Others: only files with an extension
    of the format, and objects that `uri` names exactly.
    """
    labels: bool = True
    """Read the dataset's own labels as targets. False: every target is null."""
    label_from: Literal["folder"] | None = None
    """`folder`: the label of an image file, of a row of a table and of a sample of a tar is the name of its
    folder, and the label of a Parquet file is in the name of a folder such as `label=3`. Null: see
    `label_field` and `label_column`.
    """
    label_field: str | None = Field(default=None, examples=["annotation.class"])
    """Field of the `.json` member with the label; dots separate nested fields. Null: the `.cls` member."""
    image_column: str | None = Field(default=None, examples=["image"])
    """Image column. Null: `image`, or the only column that is binary or a struct with binary `bytes`."""
    uri_column: str | None = Field(default=None, examples=["image_url"])
    """Column with the images' URIs. Null: the only column with a usual name, such as `uri` or `image_url`."""
    label_column: str | None = Field(default=None, examples=["label"])
    """Label column. Null: no targets."""
    key_column: str | None = Field(default=None, examples=["id"])
    """Column with the sample keys. Null: the image's path or URI, or the row number if there is none."""
    carry: Annotated[
        dict[str, str | None],
        BeforeValidator(_names_to_types, json_schema_input_type=dict[str, str | None] | list[str]),
    ] = Field(default={}, examples=[{"id": "int64", "captured_at": None}])
    """Columns, or fields of the `.json` member, that are copied to each prediction row: a list of names, or a
    mapping of names to Arrow types such as `int64` or `timestamp[us, UTC]`. A name that prediction files have
    already becomes `input_<name>`.
    """
    filter: list[Annotated[list[Any], Field(min_length=3, max_length=3)]] = Field(
        default=[], examples=[[["split", "=", "train"]]]
    )
    """Conditions that a row must meet, each a list of column, operator and value. Operators: `=`, `!=`, `<`,
    `<=`, `>`, `>=`, `in`, `not in`.
    """
    csv_columns: list[str] | None = Field(default=None, examples=[["bucket", "key"]])
    """Names of the columns of CSV files without a header. Null: the first line is the header."""
    check_objects: Literal["auto", "never", "always"] = Field(default="auto")
    """Whether a run finds images that were replaced under the same URI. `auto`: in buckets and local folders,
    by listing them. `always`: also on web servers, with one request per image. `never`: an image is
    identified by its URI only.
    """
    key: Literal["first-dot", "last-dot"] = Field(default="first-dot")
    """Part of a member's file name that is the sample's key. `first-dot`: the part before the first dot,
    as WebDataset does. `last-dot`: the part before the last dot.
    """
    image_member: str | None = Field(default=None, examples=["left.jpg"])
    """Extension of the member that is the image, such as `left.jpg`. Null: the first member with an image
    extension such as `jpg`, or else such as `left.jpg`.
    """
    on_damaged_shard: Literal["skip", "keep"] = Field(default="skip")
    """A shard that cannot be read to its end: `skip` labels nothing of it, `keep` labels the readable part.
    Either way the run ends with a non-zero status.
    """
    target_names: NameOrUri | list[str] | None = Field(default=None, examples=[["cat", "dog"]])
    """Names of the dataset's own classes, by integer label: a list, or the path or URI of a file as for
    `model.labels`. Null: the names in the schema of the file, if it has some; else an integer label is a
    class id of the model.
    """
    target_map: NameOrUri | dict[ClassName, ClassName] | None = Field(
        default=None, examples=[{"sneakers": "Sneaker"}]
    )
    """Name or id of the model's class for each class of the dataset: a mapping, or the path or URI of a JSON
    file with one. Several classes of the dataset may have the same class of the model. Null: classes with
    equal names.
    """
    max_image_bytes: PositiveInt = 256 * 1024**2
    """Maximum size of an encoded image, in bytes. A larger image is an error row, and is not read."""
    max_image_pixels: PositiveInt = 178_956_970  # Pillow's limit against decompression bombs
    """Maximum pixels (width times height) of an image. A larger image is an error row, and is not decoded."""

    @field_validator(*FIELD_FORMATS)
    @classmethod
    def _check_format(cls, value: Any, info: ValidationInfo) -> Any:
        """Rejects a field that the format does not use, because a run would ignore the field."""
        field, chosen = str(info.field_name), info.data.get("format")
        formats = FIELD_FORMATS[field]
        if chosen is None or chosen in formats or value == cls.model_fields[field].default:
            return value
        if chosen != "auto" or formats == ("table",):
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
        for name, kind in carry.items():
            try:
                _ = kind and arrow_type(kind)
            except ValueError:
                message = f"{kind!r} of {name!r} is not an Arrow type such as int64 or timestamp[us, UTC]"
                raise ValueError(message) from None
        return carry

    @field_validator("filter", mode="before")
    @classmethod
    def _check_conditions(cls, conditions: Any) -> Any:
        for each in conditions if isinstance(conditions, list) else [conditions]:
            is_condition = isinstance(each, list) and len(each) == 3 and isinstance(each[0], str)
            if not is_condition or each[1] not in _OPERATORS:
                raise ValueError(
                    f"expected [[column, operator, value]] with an operator of {' '.join(_OPERATORS)}"
                )
            if each[1] in ("in", "not in") and not isinstance(each[2], list):
                raise ValueError(f"the value must be a list: [[{each[0]}, {each[1]}, [{each[2]}]]]")
        return conditions

    @field_validator("image_member")
    @classmethod
    def _check_member(cls, member: str | None, info: ValidationInfo) -> str | None:
        extension = member and member.lower().removeprefix(".")
        if extension and "." in extension and info.data.get("key") == "last-dot":
            raise ValueError("an extension has no dot with key: last-dot; each image is a sample of its own")
        return extension
