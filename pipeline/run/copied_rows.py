"""Copied rows: the new file of a changed shard copies the stored rows of its unchanged images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.commit import ManifestRow, Partition, Repairs
from pipeline.config import ConfigError
from pipeline.predictions import READ_ERRORS, ErrorCategory, PredictionOptions, model_output_fields
from pipeline.read import (
    ReadOptions,
    Sample,
    Shard,
    ShardListing,
    complete_sample,
    list_samples,
    sample_table,
    whole_file,
)
from pipeline.storage import (
    ABSENT,
    ObjectChanged,
    ObjectNotFound,
    Storage,
    content_errors,
    is_under,
    map_in_threads,
    read_table,
)

#: Errors of a row and not of its image, which a run finds again.
_ROW_ERRORS = (ErrorCategory.INVALID_KEY, ErrorCategory.INVALID_CARRIED_VALUE)
#: Columns that describe the image and its predictions. The other columns follow from the current input.
_COPIED = ("version", "width", "height", "error")

#: URI and version of a prediction file.
Source = tuple[str, str]


@dataclass
class CopiedRows:
    """The stored rows that the prediction file of one shard copies.

    Attributes:
        total: number of images of the shard.
        rows: by prediction file, pairs of a position in the shard and a row of the file.
        errors: number of the rows that are error rows.
    """

    total: int
    rows: defaultdict[Source, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    errors: int = 0

    @property
    def positions(self) -> list[int]:
        """The positions of the copied rows in the shard, in the order of `rows`."""
        return [position for pairs in self.rows.values() for position, _ in pairs]

    @property
    def missing(self) -> list[int]:
        """The positions of the images to label, ascending."""
        return sorted({*range(self.total)} - {*self.positions})

    def merge(
        self, labeled: pa.Table, shard: Shard, stored: Iterable[pa.Table], options: ReadOptions
    ) -> pa.Table:
        """Returns the samples of the whole shard: those that were labeled now, and the copied rows.

        `stored` has the columns to copy of each file of `rows`, see `read_source`.
        """
        files = zip(stored, self.rows.values(), strict=True)
        rows = pa.concat_tables(table.take([row for _, row in pairs]) for table, pairs in files)
        described, samples = list_samples(shard), list[Sample]()
        for position, error in zip(self.positions, rows["error"].to_pylist(), strict=True):
            sample = described[position]
            if error is not None and error.partition(":")[0] in READ_ERRORS:
                sample = sample.fail(error)
            samples.append(complete_sample(sample, shard, options))
        described_now = sample_table(samples)
        copied = pa.table(
            {name: described_now[name] for name in described_now.column_names}
            | {name: rows[name] for name in rows.column_names}
        )
        order = np.argsort(np.concatenate([self.missing, self.positions]))
        # Without a new image, `labeled` has no carried columns.
        kept = [x for x in copied.column_names if x in labeled.column_names or x.startswith("carried.")]
        both = pa.concat_tables([labeled, copied.select(kept)], promote_options="permissive")
        return both.take(order)


class _StoredRow(NamedTuple):
    """A row of a prediction file, and the version of its image."""

    shard: str
    file: Source
    row: int
    version: str | None
    is_error: bool


def find_copied_rows(
    partition: Partition,
    shards: Iterable[Shard],
    gaining: Iterable[Shard],
    entries: Mapping[str, ManifestRow],
    losing: Collection[ManifestRow],
    options: ReadOptions,
    with_errors: bool,
) -> tuple[dict[str, CopiedRows], set[str]]:
    """Returns the rows that each shard of image files or of a table can copy, by URI of the shard.

    Also returns the shards that lost rows to others: groups of image files whose images other groups have
    now, and changed ranges of tables whose rows other ranges of the same file have now, such as after a row
    was inserted or deleted. Their prediction files must be held and removed before labeling.

    An image is unchanged if its URI and version are those of a stored row. A version that the input does not
    give, such as that of an image on a web server, is not compared.

    Args:
        partition: the stored labels.
        shards: the shards to label.
        gaining: the shards whose images may be in the labels of other groups.
        entries: manifest rows by URI.
        losing: manifest rows of other shards that may have lost images to these.
        options: how the readers find keys.
        with_errors: whether error rows are copied too; otherwise the images are read again.
    """
    shards = [shard for shard in shards if shard.members or shard.rows]
    labeled = {whole_file(shard.uri) for shard in shards if shard.uri in entries}
    shards = [shard for shard in shards if losing or whole_file(shard.uri) in labeled]
    changed = [
        entries[shard.uri]
        for shard in shards
        if shard.rows and shard.uri in entries and entries[shard.uri].version != shard.version
    ]
    of_file, shifted = defaultdict[str, dict[str | None, _StoredRow]](dict), set[str]()

    def find(shard: Shard) -> CopiedRows:
        own = of_shard.get(shard.uri)
        if own is None:
            own = _stored_rows(partition, entries.get(shard.uri, ManifestRow(shard.uri)))
        others = of_file.get(whole_file(shard.uri), {})  # of the same table
        samples = list_samples(shard)
        copied = CopiedRows(len(samples))
        for position, sample in enumerate(samples):
            stored = own.get(sample.uri) or others.get(sample.uri) or moved.get(sample.uri)
            if sample.uri not in own and sample.uri in others:
                shifted.add(others[sample.uri].shard)
            if stored is None or (stored.is_error and not with_errors):
                continue
            is_absent = sample.version == ABSENT and stored.is_error
            if not is_absent and sample.version not in (None, stored.version):
                continue
            if complete_sample(sample, shard, options).error is not None:  # the row is an error now
                continue
            copied.rows[stored.file].append((position, stored.row))
            copied.errors += stored.is_error
        return copied

    several = {row.uri: row for row in (*losing, *changed)}  # whose rows several shards may copy
    read = map_in_threads(partial(_stored_rows, partition), several.values())
    of_shard = dict(zip(several, read, strict=True))
    moved = dict(item for row in losing for item in of_shard[row.uri].items())
    for row in changed:
        of_file[whole_file(row.uri)] |= of_shard[row.uri]
    copies = list(zip(shards, map_in_threads(find, shards), strict=True))
    images = {uri: row.shard for uri, row in moved.items() if entries[row.shard].format == "images"}
    shifted |= find_regrouped(gaining if images else (), images)
    return {shard.uri: copied for shard, copied in copies if copied.rows}, shifted


def find_regrouped(shards: Iterable[Shard], group_of: Mapping[str | None, str]) -> set[str]:
    """Finds groups of image files that lost images to another group of these shards.

    `group_of` maps the URI of an image to the group under which the image is labeled.
    """
    members = ((member.uri, shard.uri) for shard in shards for member in shard.members)
    return {group_of[image] for image, group in members if group_of.get(image, group) != group}


def find_replaced_groups(partition: Partition, repairs: Repairs, listing: ShardListing) -> set[str]:
    """Returns labeled groups of image files of other inputs whose images the input selects.

    Each share finds the groups, and removes those with images that it labels: removal is idempotent. A share
    that starts later finds no file, labels its images, and removes the row of a share that died in between.
    Raises `ConfigError` if the input selects only some of the images of a group.
    """
    replaced, inputs = set[str](), listing.inputs
    rows = {**repairs.stored, **repairs.entries} if listing.format in (None, "images") else {}
    for uri, row in rows.items():
        folder = uri.rpartition("/")[0]
        is_near = any(is_under(root, folder) or is_under(folder, root) for root in inputs.roots)
        if row.format != "images" or not is_near or inputs.contains(uri):
            continue
        selected = [inputs.contains(str(image)) for image in _stored_rows(partition, row)]
        if any(selected) and not all(selected):
            raise ConfigError(
                f"input.uri: {inputs} selects some of the image files that are labeled as {uri}; they would "
                f"be labeled twice. Set input.uri to {folder}, or choose another output.uri"
            )
        if any(selected) or uri not in repairs.entries:
            replaced.add(uri)
    return replaced


def _stored_rows(partition: Partition, row: ManifestRow) -> dict[str | None, _StoredRow]:
    """Returns the rows of a shard's prediction file by URI of the image; none if there is no such file."""
    if row.output is None or row.output_version is None:
        return {}
    file = f"{partition.uri}/{row.output}", row.output_version
    try:
        with partition.storage.open(*file) as stream:
            table = read_table(stream, ["uri", "version", "error"])
    except (ObjectChanged, ObjectNotFound):  # an overlapping run replaced the file
        return {}
    columns = zip(*(table[name].to_pylist() for name in ("uri", "version", "error")), strict=True)
    # Of several rows with one URI, one without an error comes last and stays.
    rows = sorted(enumerate(columns), key=lambda row: row[1][2] is None)
    return {
        uri: _StoredRow(row.uri, file, number, version, error is not None)
        for number, (uri, version, error) in rows
        if uri is not None and (error is None or error.partition(":")[0] not in _ROW_ERRORS)
    }


def read_source(source: Source, storage: Storage, options: PredictionOptions) -> pa.Table:
    """Reads the columns of a prediction file that are copied; raises `StorageError`."""
    outputs = model_output_fields(options.embedding, options.embedding_width)
    with storage.open(*source) as file, content_errors(source[0], "a prediction file"):
        return read_table(file, [*_COPIED, *(column.name for column in outputs)])
