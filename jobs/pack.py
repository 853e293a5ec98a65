"""Packs images into tars: `cvt-label pack INPUT SHARDS`."""

import io
import json
import shlex
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import pyarrow as pa
import typer
from pydantic import ByteSize, Field, TypeAdapter

from jobs import console
from jobs.progress import ProgressView
from pipeline import load_job_config
from pipeline.config import Config, ConfigError, make_storage
from pipeline.decode.cpu import FORMATS, unsupported_format
from pipeline.read import NoShardsError, ReadOptions, Sample, Shard, read_samples
from pipeline.read.samples import ShardError
from pipeline.read.targets import parse_label
from pipeline.run.planning import open_listing
from pipeline.storage import ABSENT, StorageError
from pipeline.text import arrow_type

#: A tar is one request to a bucket, which may have 5 GB.
_SIZE = TypeAdapter(Annotated[ByteSize, Field(gt=0, le=4 * 1024**3)]).validate_python
_EXTENSIONS = {"JPEG": "jpg", "TIFF": "tif", "HEIF": "heic", "JPEG XL": "jxl"}
_REMEDY = "run the command again with an empty folder for SHARDS"
#: Settings of the input that the tars need too.
_KEPT = {"target_names", "target_map", "max_image_bytes", "max_image_pixels"}


def pack(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="URI as `input.uri`.")],
    shards: Annotated[str, typer.Argument(metavar="SHARDS", help="Empty folder for the tars.")],
    shard_size: Annotated[
        Any, typer.Option(metavar="SIZE", parser=_SIZE, help="Size of a tar, such as 500MB.")
    ] = "1GiB",
    config: console.JobConfigOption = None,
    set: console.SetOption = None,
) -> None:
    """Pack the images of any input into WebDataset tars.

    Each image is stored unchanged, with its label (`.cls`), and its URI, key and `input.carry` (`.json`).
    Millions of small files are slow to list and to read; such tars are not.

    More exit statuses: 2 if SHARDS is not empty; 3 if images, labels or shards could not be read (all others
    are packed).
    """
    fields = {"input.uri": input, "output.uri": shards, "model.path": "fashion-mnist"}  # no model is loaded
    job = load_job_config(config, [*(f"{name}={json.dumps(fields[name])}" for name in fields), *(set or ())])
    packer = _Packer(job)
    with ProgressView("packing") as view:
        try:
            packer.pack(shard_size, view)
        except (StorageError, NoShardsError, OSError) as error:
            raise StorageError(packer.folder, f"incomplete: {error}; {_REMEDY}") from error
    packer.print_summary(config, [each for each in set or () if not each.startswith("input")])
    if packer.failed:
        console.print_notice(f"correct what is not packed, or exclude it by input.exclude, and {_REMEDY}")
        sys.exit(console.ExitStatus.INCOMPLETE)


class _Packer:
    """Reads samples and writes tars; counts what is packed, and the failures by cause."""

    def __init__(self, job: Config) -> None:
        self.input, self.folder, self.storage = job.input, job.output.uri, make_storage(job.storage)
        self.listing = open_listing(job)
        if (found := next(self.storage.list(self.folder), None)) is not None:
            raise ConfigError(f"SHARDS: not empty, it has {found.uri}; delete it, or choose an empty folder")
        # The labels stay as they are: the job that labels the tars finds their targets.
        section = job.input.model_copy(update={"target_names": None, "target_map": None})
        self.options = ReadOptions(section, job.read)
        self.counts, self.failed = Counter(images=0, labels=0, bytes=0, tars=0), Counter[str]()
        self.types = dict[str, str | None](source_uri="string", source_key="string")

    def pack(self, max_bytes: int, view: ProgressView) -> None:
        """Writes the tars; each is a temporary file first, and ends with the sample that reaches the size."""
        samples = self._read()
        for number, first in enumerate(samples):
            with TemporaryFile() as file:
                with tarfile.TarFile(fileobj=file, mode="w") as tar:
                    for members in chain([first], samples):
                        for name, content in members.items():
                            info = tarfile.TarInfo(name)
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
                        view.show_progress(self._describe(), self.counts["images"])
                        if tar.offset >= max_bytes:
                            break
                # The first tar claims the folder.
                self.storage.write(f"{self.folder}/{number:05d}.tar", file, None if number else ABSENT)
            self.counts["tars"] += 1

    def _read(self) -> Iterator[dict[str, bytes]]:
        """Yields the members by name of each sample that can be read."""
        for shard in self.listing:
            try:
                for sample in read_samples(self.storage, shard, self.options):
                    if members := self._members(sample, shard):
                        yield members
            except ShardError as error:
                self._fail("unreadable shard", str(error))

    def _fail(self, cause: str, message: str) -> None:
        self.failed[cause] += 1
        console.print_notice(f"not packed: {message}")

    def _members(self, sample: Sample, shard: Shard) -> dict[str, bytes]:
        """Returns the members of a sample by name; none if it has no image."""
        place = sample.uri or f"{shard.object.uri}: {sample.key!r}"
        image, label, names = sample.image or b"", sample.label, sample.label_names
        kind = next((name for name, pattern, _ in FORMATS if pattern.match(image)), None)
        if kind is None:
            error = sample.error or unsupported_format(image)
            self._fail(error.partition(":")[0], f"{place}: {error}")
            return {}
        key = f"{self.counts['images']:09d}"
        members = {f"{key}.{_EXTENSIONS.get(kind, kind.lower())}": image}
        if names is not None and self.input.target_names is None and isinstance(label, int):
            label = names[label] if 0 <= label < len(names) else None
        if label is not None and label == label:  # not NaN
            members[f"{key}.cls"] = parse_label(label)[0].encode()
            self.counts["labels"] += 1
        elif sample.unmatched is not None:
            self._fail("unreadable label", f"{place}: only the label: {sample.unmatched}")
        if sample.merged:
            self._fail("merged image", f"{place}: {sample.merged} further images; see input.image_member")
        fields: dict[str, object] = {"source_uri": sample.uri or shard.object.uri, "source_key": sample.key}
        for (name, kind), value in zip(self.input.carry.items(), sample.carried, strict=True):
            if shard.format == "webdataset" and kind is None:  # JSON, whose type is open
                fields[name] = json.loads(value.as_py() or "null")
                continue
            fields[name] = _to_json(value)
            if value.is_valid and name not in self.types:
                self.types[name] = None
                # Not all types can be read from JSON.
                with suppress(ValueError, TypeError, OverflowError, NotImplementedError):
                    pa.scalar(fields[name]).cast(arrow_type(str(value.type)))
                    self.types[name] = str(value.type)
        members[f"{key}.json"] = json.dumps(fields, ensure_ascii=False, default=str).encode()
        self.counts.update(images=1, bytes=len(image))
        return members

    def _describe(self) -> str:
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.items())

    def print_summary(self, config: Path | None, overrides: Iterable[str]) -> None:
        """Prints the counts, and the command that labels the tars."""
        section = self.input.model_dump(include=_KEPT, exclude_defaults=True) | {"uri": self.folder}
        section["carry"] = dict.fromkeys(self.input.carry) | self.types
        command = ["cvt-label", "label", "--config", str(config or "job.yaml")]
        for override in (*overrides, f"input={json.dumps(section)}"):
            command += ["--set", override]
        failed = ", ".join(f"{cause}: {count:,}" for cause, count in sorted(self.failed.items()))
        fields = {"packed": self._describe(), "not packed": failed or "0"}
        fields |= {"ignored": self.listing.describe_ignored(), "output": self.folder}
        console.print_fields(fields | {"to label": shlex.join(command)})


def _to_json(value: pa.Scalar) -> object:
    """Returns a value for `json.dumps`, which makes text of decimals and of times in lists."""
    if pa.types.is_duration(value.type):
        value = value.cast(pa.int64())  # in the unit of the type
    elif pa.types.is_temporal(value.type):
        value = value.cast(pa.string())
    found: object = value.as_py()
    return found.decode(errors="backslashreplace") if isinstance(found, bytes) else found
