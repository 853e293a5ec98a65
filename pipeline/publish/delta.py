"""A Delta Lake table of labels, written by `deltalake`."""

import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from operator import methodcaller
from typing import Any

import pyarrow as pa

from pipeline.config import ConfigError
from pipeline.predictions import LABEL_SCHEMA
from pipeline.publish.label_table import PUBLISHED_SCHEMA, TOKEN_KEY, Increment, LabelTable
from pipeline.storage import ABSENT, Storage, consume_in_thread, library_errors, require_package

#: deltalake uses another location, or fails, if a path contains one of these.
_UNSUPPORTED = re.compile(r"[\x00-\x1f\x7f#?:\[\]\\^|]|%[0-9a-fA-F]{2}")
_FILE_BYTES = 128 * 1024**2
#: deltalake holds several batches, and an unfinished row group, which embeddings make large.
_BATCH_ROWS, _ROW_GROUP_ROWS = 1024, 16_384
_MICROSECONDS = """'Timestamp(Microsecond, Some("UTC"))'"""


class DeltaTable(LabelTable):
    """The rows of one model in a Delta table; see `LabelTable`.

    A publication is a transaction of an application, `cvt-label/model=<model>`. Of two concurrent
    transactions of one application, Delta refuses the second, also if both only add rows.
    """

    _table: Any

    def __init__(self, storage: Storage, uri: str, model: str) -> None:
        self.name, self._storage, self._uri, self._model = f"delta:{uri}", storage, uri, model
        if found := _UNSUPPORTED.search(uri.partition("://")[2] or uri):
            raise ConfigError(f"{self.name}: the path of a Delta table must not contain {found[0]!r}")
        require_package("deltalake", "delta", self.name)
        # Listing first reports access failures with the messages of `storage`.
        if next(storage.list(f"{uri}/_delta_log"), None) is None:
            self._create()
        self._open()

    def _open(self) -> None:
        import deltalake

        options = self._storage.object_store_options(self._uri)  # with the current credentials
        with library_errors(self.name, "cannot be read as a Delta table"):
            self._table = deltalake.DeltaTable(self._uri, storage_options=options)
        self.version = self._table.version()
        is_by_model = self._table.metadata().partition_columns == ["model"]
        self._check_columns(pa.schema(self._table.schema()), is_by_model)

    def read_published(self) -> pa.Table:  # noqa: D102
        from deltalake import QueryBuilder

        query = (
            "SELECT shard, source, output_version, count(*) AS rows FROM labels "
            f"WHERE model = {_quote(self._model)} GROUP BY shard, source, output_version"
        )
        with library_errors(self.name, "cannot be read"):
            # pyarrow reads the rows without Python's lock, so that other threads run meanwhile.
            found = pa.table(QueryBuilder().register("labels", self._table).execute(query))
        return found.cast(PUBLISHED_SCHEMA)

    def _commit(self, increment: Increment) -> int:
        # A generator expression would keep a table while the next one is made.
        batches = chain.from_iterable(map(methodcaller("to_batches", _BATCH_ROWS), increment.rows))
        consume_in_thread(partial(self._write, increment), batches)
        return int(self._table.version())

    def _find(self, token: str) -> int | None:
        found = (entry["version"] for entry in self._table.history() if entry.get(TOKEN_KEY) == token)
        return next(found, None)

    def _write(self, increment: Increment, batches: Iterator[pa.RecordBatch]) -> None:
        from deltalake import CommitProperties, Transaction, WriterProperties, write_deltalake

        app = f"cvt-label/model={self._model}"
        options: dict[str, Any] = {"mode": "append"}
        if increment.removed:
            options = {"mode": "overwrite", "predicate": self._predicate(increment)}
        write_deltalake(
            self._table,
            pa.RecordBatchReader.from_batches(LABEL_SCHEMA, batches),
            target_file_size=_FILE_BYTES,
            writer_properties=WriterProperties(compression="ZSTD", max_row_group_size=_ROW_GROUP_ROWS),
            commit_properties=CommitProperties(
                custom_metadata={TOKEN_KEY: increment.token},
                app_transactions=[Transaction(app, (self._table.transaction_version(app) or 0) + 1)],
            ),
            **options,
        )

    def _predicate(self, increment: Increment) -> str:
        """Returns the SQL condition of the rows to remove. The rows to add must fulfill it too."""
        removed = f"{increment.column} IN ({', '.join(map(_quote, increment.removed))})"
        added = f"published_at = arrow_cast({_quote(increment.published_at.isoformat())}, {_MICROSECONDS})"
        return f"model = {_quote(self._model)} AND ({removed} OR {added})"

    def _create(self) -> None:
        """Creates an empty table, unless there is one by now."""
        import deltalake
        from deltalake.exceptions import CommitFailedError

        probe = f"{self._uri}/cvt-label-probe-{secrets.token_hex(8)}"  # VACUUM removes orphaned probes
        self._storage.update(probe, lambda _: b"", ABSENT)  # refuses a store without conditional writes
        self._storage.delete(probe)
        # The commit fails if another writer creates the table meanwhile.
        with library_errors(self.name, "the table cannot be created"), suppress(CommitFailedError):
            deltalake.DeltaTable.create(
                self._uri,
                deltalake.Schema.from_arrow(LABEL_SCHEMA),
                "ignore",
                ["model"],
                configuration={"delta.enableChangeDataFeed": "true"},
                storage_options=self._storage.object_store_options(self._uri),
            )


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
