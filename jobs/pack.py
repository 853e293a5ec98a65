"""Packs images into tars: `python -m jobs.pack INPUT SHARDS`, or `cvt-label pack INPUT SHARDS`."""

import io
import json
import re
import shlex
import sqlite3
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from pydantic import ByteSize, Field, TypeAdapter
from rich.filesize import decimal

from jobs import console
from jobs.progress import ProgressView
from pipeline import load_job_config
from pipeline.config import LABEL_NEW, Config, ConfigError, make_storage
from pipeline.decode.cpu import FORMATS
from pipeline.predictions import ErrorCategory, sample_error
from pipeline.read import ReadOptions, Sample, read_samples
from pipeline.read.samples import ShardError
from pipeline.read.shards import IMAGE_EXTENSIONS
from pipeline.read.targets import parse_label
from pipeline.run import Plan
from pipeline.run.planning import open_listing
from pipeline.storage import ABSENT, temporary_folder
from pipeline.text import pluralize

#: A tar is one request to a bucket, which may have 5 GB.
_SIZE = TypeAdapter(Annotated[ByteSize, Field(gt=0, le=4 * 1024**3)])
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic", "JPEG XL": "jxl"}
_UNSAFE, _MAX_KEY_BYTES = re.compile(r'[.:*?"<>|\\\x00-\x1f\x7f]|_(?=_MACOSX)'), 200
_COUNT_KEY = "INSERT INTO keys VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
#: Settings of the input that the tars need too.
_KEPT = {"target_names", "target_map", "max_image_bytes", "max_image_pixels"}


@console.exit_on_error()
def pack(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="URI as `input.uri`.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Empty folder for the tars.")],
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Size of a tar, at most 4GiB.")] = "1GiB",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration of a labeling job.")
    ] = None,
    set: console.SetOption = None,
) -> None:
    """Pack the images of any input into WebDataset tars.

    Millions of small files are slow to list and to read; tars of a gigabyte are not.

    Each image is stored unchanged, with its label (`.cls`), and its URI, key and `input.carry` (`.json`).

    Exit status: 0 if everything is packed; 2 if the command line or the configuration is not valid, or SHARDS
    is not empty; 3 if images, labels or shards could not be read (all others are packed); 4 if the input or
    SHARDS cannot be accessed.
    """
    fields = {"input.uri": input, "output.uri": shards, "model.path": "fashion-mnist"}  # no model is loaded
    overrides = [f"{field}={json.dumps(value)}" for field, value in fields.items()]
    job = load_job_config(config, [*overrides, *(set or ())])
    try:
        max_bytes = _SIZE.validate_python(shard_size)
    except ValueError:
        raise ConfigError(f"--shard-size {shard_size}: write a size such as 500MB, at most 4GiB") from None
    packer = _Packer(job)
    with ProgressView("packing") as view, temporary_folder() as temporary:
        packer.pack(max_bytes, temporary, view)
    packer.print_summary(config or Path("job.yaml"))
    sys.exit(console.ExitStatus.INCOMPLETE if packer.failed else console.ExitStatus.OK)


class _Packer:
    """Reads samples and writes tars; counts what is packed, and the failures by cause."""

    def __init__(self, job: Config) -> None:
        self.job, self.counts, self.failed = job, Counter[str](), Counter[str]()
        self.storage, self.listing = make_storage(job.storage), open_listing(job)
        if (found := next(self.storage.list(job.output.uri), None)) is not None:
            raise ConfigError(
                f"SHARDS: not empty, it has {found.uri}; choose an empty folder, or delete this one"
            )
        # The labels stay as they are: the job that labels the tars finds their targets.
        section = job.input.model_copy(update={"target_names": None, "target_map": None})
        self.options = ReadOptions.from_config(section, (), job.read)
        self.types = dict[str, str | None](source_uri="string", source_key="string")

    def pack(self, max_bytes: int, temporary: Path, view: ProgressView) -> None:
        """Writes the tars; one tar, and all keys, are temporary files."""
        keys = sqlite3.connect(temporary / "keys", isolation_level=None)
        keys.executescript("PRAGMA journal_mode=off; CREATE TABLE keys (key PRIMARY KEY, times); BEGIN")
        with (temporary / "tar").open("w+b") as file:
            tar = tarfile.TarFile(fileobj=file, mode="w")
            for key, members in chain(self._read(), [("", {})]):
                while members and (times := keys.execute(_COUNT_KEY, (key,)).fetchone()[0]) > 1:
                    key += f"-{times}"
                for extension, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                if tar.offset >= (max_bytes if members else 1):  # or after the last sample
                    tar.close()
                    self.storage.write(f"{self.job.output.uri}/{self.counts['tars']:05d}.tar", file, ABSENT)
                    self.counts["tars"] += 1
                    file.truncate(file.seek(0))
                    tar = tarfile.TarFile(fileobj=file, mode="w")
                view.show_progress(self._describe())

    def _read(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Yields a key and the members by extension of each sample that can be read."""
        for shard in self.listing:
            try:
                for sample in read_samples(self.storage, shard, self.options):
                    sample.uri = sample.uri or shard.object.uri
                    if members := self._image_and_label(sample):
                        members["json"] = self._json(sample, is_json=shard.format == "webdataset")
                        self.counts.update(samples=1, labels="cls" in members, bytes=len(sample.image or b""))
                        yield _safe_key(sample.key), members
            except ShardError as error:
                self._fail(f"unreadable shard: {error}")

    def _image_and_label(self, sample: Sample) -> dict[str, bytes]:
        image, label, names = sample.image or b"", sample.label, sample.label_names
        kind = next((name for name, start, _ in FORMATS if start.match(image)), "")
        if sample.error is None and not kind:
            category = ErrorCategory.UNSUPPORTED_FORMAT if image else ErrorCategory.EMPTY_IMAGE
            sample.fail(sample_error(category, f"the file starts with {image[:12]!r}"))
        if sample.error is not None:
            self._fail(sample.error, sample)
            return {}
        members = {_EXTENSIONS.get(kind, kind.lower()): image}
        if names is not None and self.job.input.target_names is None and isinstance(label, int):
            label = names[label] if 0 <= label < len(names) else None
        if label is not None and label == label:  # not NaN
            members["cls"] = parse_label(label)[0].encode()
        elif sample.unmatched is not None:
            self._fail(f"unreadable label: {sample.unmatched}", sample)
        return members

    def _json(self, sample: Sample, is_json: bool) -> bytes:
        """Returns the `.json` member. Without a type in `input.carry`, fields of JSON are JSON text."""
        fields: dict[str, object] = {"source_uri": sample.uri, "source_key": sample.key}
        for (name, kind), value in zip(self.options.carry.items(), sample.carried, strict=True):
            is_text = pa.types.is_temporal(value.type) and not pa.types.is_duration(value.type)
            found = value.cast(pa.string()).as_py() if is_text else value.as_py()
            found = json.loads(found) if is_json and kind is None and value.is_valid else found
            fields[name] = found.decode(errors="backslashreplace") if isinstance(found, bytes) else found
            if value.is_valid and name not in self.types and (kind or not is_json):
                self.types[name] = _type_of_json(fields[name], str(value.type))
        return json.dumps(fields, ensure_ascii=False, default=str).encode()

    def _fail(self, error: str, sample: Sample | None = None) -> None:
        self.failed[error.partition(":")[0]] += 1
        name = "" if sample is None else f"{sample.uri}: "
        if sample is not None and not name.endswith(f"{sample.key}: "):
            name += f"{sample.key!r}: "
        console.print_notice(f"not packed: {name}{error}")

    def _describe(self) -> str:
        counts = self.counts
        labels, tars = pluralize(counts["labels"], "label"), pluralize(counts["tars"], "tar")
        return f"{pluralize(counts['samples'], 'image')}, {labels}, {decimal(counts['bytes'])}, in {tars}"

    def print_summary(self, config: Path) -> None:
        """Prints the counts, and the command that labels the tars."""
        section = self.job.input.model_dump(include=_KEPT, exclude_defaults=True)
        section |= {"uri": self.job.output.uri, "carry": dict.fromkeys(self.options.carry) | self.types}
        command = ["cvt-label", "label", "--config", str(config), "--set", f"input={json.dumps(section)}"]
        failed = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(self.failed.items()))
        fields = {"packed": self._describe()}
        if failed:
            fields["not packed"] = f"{self.failed.total():,} ({failed})"
        if self.listing.ignored:
            fields["ignored"] = Plan(self.listing, LABEL_NEW).describe_ignored()
        console.print_fields({**fields, "output": self.job.output.uri, "to label": shlex.join(command)})


def _safe_key(key: str) -> str:
    """Returns a key without dots, which would end it, and without what a file name cannot have."""
    key = re.sub(r"^(\w+:/|\.(?=/))", "", key)
    stem, _, extension = key.rpartition(".")
    name = _UNSAFE.sub("_", stem if extension.lower() in IMAGE_EXTENSIONS else key)
    return re.sub("/+", "/", name.encode()[-_MAX_KEY_BYTES:].decode(errors="ignore")).strip("/") or "_"


def _type_of_json(value: object, kind: str) -> str | None:
    """Returns the name of an Arrow type if a value of the `.json` member can be read as this type."""
    try:
        pa.scalar(value).cast(pa.type_for_alias(kind))
    except (ValueError, NotImplementedError):
        return None
    return kind
