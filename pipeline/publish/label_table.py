"""The contract of a consumer table: its columns, its shards, and a transaction that replaces some of them."""

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import pyarrow as pa

from pipeline.predictions import LABEL_SCHEMA
from pipeline.storage import StorageError, library_errors

#: The shards of one model in a table, with their number of rows.
PUBLISHED_SCHEMA = pa.schema(
    {"shard": pa.string(), "source": pa.string(), "output_version": pa.string(), "rows": pa.int64()}
)

#: The key of a publication's token in the metadata of its transaction.
TOKEN_KEY = "cvt_label.publication"


class TableChangedError(Exception):
    """Another writer committed first: the table is no longer at the version that was read."""


@dataclass(frozen=True)
class Increment:
    """Rows to add to a table and rows to remove from it, in one transaction.

    Attributes:
        rows: rows to add, as sorted tables with `LABEL_SCHEMA`. Can be iterated over once.
        published_at: the value of `published_at` in these rows.
        column, removed: rows of the model are removed if they have one of these values in this column.
        token: identifies the transaction in the table's history, also if its response was lost.
    """

    rows: Iterable[pa.Table]
    published_at: datetime
    column: str
    removed: Sequence[str]
    token: str = field(default_factory=lambda: secrets.token_hex(16))


class LabelTable(ABC):
    """The rows of one model in a table, at the version of the table when it was opened.

    Opening creates the table if needed. Every method may raise `StorageError`.

    Attributes:
        name: the table, as users name it.
        version: Delta's version or Iceberg's snapshot id; None if there is no snapshot.
    """

    name: str
    version: int | None = None

    @abstractmethod
    def read_published(self) -> pa.Table:
        """Returns the model's shards in the table, with `PUBLISHED_SCHEMA`."""

    def commit(self, increment: Increment) -> int:
        """Commits an increment; returns the new version.

        Raises `TableChangedError` if another writer committed first: open the table again.
        """
        try:
            return self._commit(increment)
        except StorageError:
            raise
        except Exception as error:
            before = self.version
            self._open()
            with library_errors(self.name, "cannot be read"):
                committed = self._find(increment.token)
            if committed is not None:
                return committed  # only the response was lost
            if self.version != before:
                raise TableChangedError(f"{self.name}: another writer committed first") from error
            with library_errors(self.name, "the transaction was not committed"):
                raise

    @abstractmethod
    def _open(self) -> None:
        """Opens the current version; sets `version`."""

    @abstractmethod
    def _commit(self, increment: Increment) -> int: ...

    @abstractmethod
    def _find(self, token: str) -> int | None:
        """Returns the version that the transaction with this token committed, if it did."""

    def _check_columns(self, schema: pa.Schema, is_by_model: bool) -> None:
        """Raises `StorageError` if labels do not fit into the table."""
        # Libraries differ in the sizes of offsets, and in the names of list items.
        found, expected = (
            {column.name: re.sub(r"large_|_view|\w+: ", "", str(column.type)) for column in columns}
            for columns in (schema, LABEL_SCHEMA)
        )
        problem = None if is_by_model else "is not partitioned by exactly model"
        for name in {**expected, **found}:
            if found.get(name) != expected.get(name):
                problem = f"has {found.get(name, 'no')} column {name}, expected {expected.get(name, 'none')}"
        if problem:
            raise StorageError(self.name, f"the table {problem}; publish to a new table")
