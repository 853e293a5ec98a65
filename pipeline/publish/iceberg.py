"""An Iceberg table of labels, written by `pyiceberg`, whose configuration has the catalog."""

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.predictions import LABEL_SCHEMA, ROW_GROUP_ROWS
from pipeline.publish.label_table import PUBLISHED_SCHEMA, TOKEN_KEY, Increment, LabelTable
from pipeline.storage import StorageError, library_errors, require_package

#: pyiceberg does not compare a longer list with the range of shards in a file.
_LISTED = 200
_ISOLATION = "write.delete.isolation-level"
_PROPERTIES = {
    "write.parquet.row-group-limit": str(ROW_GROUP_ROWS),
    # By default, a range has 16 characters: the start of all URIs.
    "write.metadata.metrics.column.shard": "full",
}


class IcebergTable(LabelTable):
    """The rows of one model in an Iceberg table; see `LabelTable`. A publication is one snapshot."""

    _table: Any

    def __init__(self, name: str, model: str) -> None:
        self.name, self._model = f"iceberg:{name}", model
        catalog, _, self._identifier = name.partition(".")
        require_package("pyiceberg", "iceberg", self.name)
        from pyiceberg.catalog import load_catalog

        where = f"~/.pyiceberg.yaml, PYICEBERG_CATALOG__{catalog.upper()}__URI"
        with library_errors(self.name, f"the catalog {catalog} cannot be used (configuration: {where})"):
            self._catalog = load_catalog(catalog)
            _ensure(lambda: self._catalog.table_exists(self._identifier), self._create)
        self._open()

    def _open(self) -> None:
        with library_errors(self.name, "cannot be read as an Iceberg table"):
            self._table = table = self._catalog.load_table(self._identifier)
            schema, snapshot = table.schema().as_arrow(), table.current_snapshot()
        self.version = snapshot.snapshot_id if snapshot is not None else None
        self._check_columns(schema, _is_by_model(table.spec()))
        if (level := table.properties.get(_ISOLATION, "serializable")) != "serializable":
            raise StorageError(self.name, f"the table has {_ISOLATION}={level}; set it to serializable")

    def read_published(self) -> pa.Table:  # noqa: D102
        from pyiceberg.expressions import EqualTo

        keys, found = PUBLISHED_SCHEMA.names[:3], PUBLISHED_SCHEMA.empty_table()
        if self.version is None:
            return found
        with library_errors(self.name, "cannot be read"):
            for task in self._table.scan(EqualTo("model", self._model)).plan_files():
                if not _is_by_model(self._table.specs()[task.file.spec_id]):
                    cause = "has files that are not partitioned by model; publish to a new table"
                    raise StorageError(self.name, f"the table {cause}")
                counts = self._read(task, *keys).group_by(keys).aggregate([([], "count_all")])
                counts = counts.rename_columns(PUBLISHED_SCHEMA.names).cast(PUBLISHED_SCHEMA)
                found = pa.concat_tables([found, counts])
        return found.group_by(keys).aggregate([("rows", "sum")]).rename_columns(PUBLISHED_SCHEMA.names)

    def _commit(self, increment: Increment) -> int:
        from pyiceberg.expressions import EqualTo
        from pyiceberg.table.snapshots import Operation

        added, removed = list[Any](), list[Any]()
        for file, kept in self._affected_files(increment):
            removed.append(file)
            if len(kept):
                added.append(self._write(kept))
        added += map(self._write, increment.rows)
        # pyiceberg deletes manifests after a refused commit, also if this commit was executed before, by a
        # request whose response was lost.
        delete = self._table.io.delete
        self._table.io.delete = lambda file: None if file.endswith(".avro") else delete(file)
        with self._table.transaction() as transaction:
            update = transaction.update_snapshot(snapshot_properties={TOKEN_KEY: increment.token})
            with update.overwrite() as snapshot:
                # Conflicts with files that another writer adds to the model. pyiceberg would repeat an append
                # after that, although the other writer may have added the same shards.
                snapshot.delete_by_predicate(EqualTo("model", self._model))
                if not removed:  # readers of new rows skip snapshots of other operations
                    snapshot._operation = Operation.APPEND
                for file in removed:
                    snapshot.delete_data_file(file)
                for file in added:
                    snapshot.append_data_file(file)
        return int(snapshot.snapshot_id)  # the current one may be later

    def _find(self, token: str) -> int | None:
        snapshots = (each for each in self._table.snapshots() if each.summary is not None)
        return next((each.snapshot_id for each in snapshots if each.summary.get(TOKEN_KEY) == token), None)

    def _affected_files(self, increment: Increment) -> Iterator[tuple[Any, pa.Table]]:
        """Yields the files that have rows to remove, and the other rows of each file."""
        from pyiceberg.expressions import AlwaysFalse, And, EqualTo, In, Or

        column, values = increment.column, increment.removed
        lists = (values[i : i + _LISTED] for i in range(0, len(values), _LISTED))
        condition = Or(AlwaysFalse(), AlwaysFalse(), *(In(column, each) for each in lists))
        with library_errors(self.name, "cannot be read"):
            for task in self._table.scan(And(EqualTo("model", self._model), condition)).plan_files():
                is_removed = pc.is_in(self._read(task, column)[column], value_set=pa.array(values))
                if pc.any(is_removed).as_py():
                    yield task.file, self._read(task).filter(pc.invert(is_removed))

    def _read(self, task: Any, *columns: str) -> pa.Table:
        """Reads columns of a file, or all columns, without deleted rows."""
        from pyiceberg.expressions import AlwaysTrue
        from pyiceberg.io.pyarrow import ArrowScan

        names = columns or LABEL_SCHEMA.names
        schema = self._table.schema().select(*names)
        scan = ArrowScan(self._table.metadata, self._table.io, schema, AlwaysTrue())
        return scan.to_table([task]).select(names)

    def _write(self, rows: pa.Table) -> Any:
        """Writes rows as one file, and returns the file."""
        from pyiceberg.io.pyarrow import write_file
        from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
        from pyiceberg.table import WriteTask

        table = self._table
        values = [PartitionFieldValue(field, self._model) for field in table.spec().fields]
        partition = PartitionKey(values, table.spec(), table.schema())
        batches = rows.to_batches(ROW_GROUP_ROWS)
        task = WriteTask(uuid.uuid4(), 0, table.schema(), batches, partition_key=partition)
        with library_errors(self.name, "the rows cannot be written"):
            return next(write_file(table.io, table.metadata, iter([task])))

    def _create(self) -> None:
        """Creates an empty table, and its namespace if needed."""
        from pyiceberg.transforms import IdentityTransform

        catalog, namespace = self._catalog, self._identifier.rpartition(".")[0]
        with library_errors(self.name, "the table cannot be created"):
            _ensure(lambda: catalog.namespace_exists(namespace), lambda: catalog.create_namespace(namespace))
            create = catalog.create_table_transaction(self._identifier, LABEL_SCHEMA, properties=_PROPERTIES)
            with create as transaction:
                with transaction.update_spec() as spec:
                    spec.add_identity("model")
                with transaction.update_sort_order() as order:
                    order.asc("label", IdentityTransform()).asc("score", IdentityTransform())


def _is_by_model(spec: Any) -> bool:
    return [f"{field.transform}({field.name})" for field in spec.fields] == ["identity(model)"]


def _ensure(exists: Callable[[], bool], create: Callable[[], object]) -> None:
    """Creates something that does not exist; another writer may be faster."""
    if exists():
        return
    try:
        create()
    except Exception:  # catalogs raise different classes
        if not exists():
            raise
