"""Finds the stored rows of unchanged images in changed shards: a run copies them and labels the others."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from pipeline.commit import CopiedRows, ManifestRow, Partition
from pipeline.config import ConfigError
from pipeline.predictions import ErrorCategory
from pipeline.read import ReadOptions, Shard, ShardListing, complete_sample, list_samples, whole_file
from pipeline.storage import ABSENT, ObjectChanged, ObjectNotFound, is_under, read_table

_THREADS = 16
#: Errors of a row and not of its image, which a run finds again.
_ROW_ERRORS = (ErrorCategory.INVALID_KEY, ErrorCategory.INVALID_CARRIED_VALUE)


class _StoredRow(NamedTuple):
    """A row of a prediction file, and the version of its image."""

    shard: str
    file: tuple[str, str]  # URI and version
    row: int
    version: str | None
    is_error: bool


def find_copied_rows(
    partition: Partition,
    shards: Iterable[Shard],
    entries: Mapping[str, ManifestRow],
    losing: Iterable[ManifestRow],
    options: ReadOptions,
    with_errors: bool,
) -> tuple[dict[str, CopiedRows], set[str]]:
    """Returns the rows that each shard of image files or of a table can copy, by URI of the shard.

    Also returns the changed ranges of tables whose rows other ranges of the same file have now, such as after
    a row was inserted or deleted. Their prediction files must be held and removed before labeling.

    An image is unchanged if its URI and version are those of a stored row. A version that the input does not
    give, such as that of an image on a web server, is not compared.

    Args:
        partition: the stored labels.
        shards: the shards to label.
        entries: manifest rows by URI.
        losing: manifest rows of other shards that may have lost images to these.
        options: how the readers find keys.
        with_errors: whether error rows are copied too; otherwise the images are read again.
    """
    losing, shards = [*losing], [shard for shard in shards if shard.members or shard.rows]
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
            copied.rows.setdefault(stored.file, []).append((position, stored.row))
            copied.errors += stored.is_error
        return copied

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="copy") as pool:
        several = {row.uri: row for row in (*losing, *changed)}  # whose rows several shards may copy
        read = pool.map(partial(_stored_rows, partition), several.values())
        of_shard = dict(zip(several, read, strict=True))
        moved = dict(item for row in losing for item in of_shard[row.uri].items())
        for row in changed:
            of_file[whole_file(row.uri)] |= of_shard[row.uri]
        copies = list(zip(shards, pool.map(find, shards), strict=True))
        return {shard.uri: copied for shard, copied in copies if copied.rows}, shifted


def find_replaced_groups(
    partition: Partition, entries: Mapping[str, ManifestRow], listing: ShardListing
) -> set[str]:
    """Returns labeled groups of image files of other inputs whose images the input selects.

    Raises `ConfigError` if the input selects only some of the images of a group.
    """
    replaced, inputs = set[str](), listing.inputs
    for uri, row in entries.items() if listing.format in (None, "images") else ():
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
        if any(selected):
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
