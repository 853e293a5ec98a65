"""An Iceberg catalog whose client repeats commits, as clients and proxies do after a lost response."""

from __future__ import annotations

from typing import Any

from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table.update import AddSnapshotUpdate


class RepeatingCatalog(SqlCatalog):
    """Executes each commit of a snapshot, and then reports the conflict that a second request would get."""

    def commit_table(self, table: Any, requirements: Any, updates: Any) -> Any:
        response = super().commit_table(table, requirements, updates)
        if any(isinstance(update, AddSnapshotUpdate) for update in updates):
            raise CommitFailedException("Requirement failed: branch main has changed")
        return response
