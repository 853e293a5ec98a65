"""Publications that are killed, disturbed or overtaken at a chosen step.

A publication runs in a child process, and reaches the S3 server through a proxy in this process.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.commit import Partition
from pipeline.publish import publish_labels
from pipeline.storage import Storage
from tests.fault_proxy import FaultProxy, Request
from tests.pipeline.publish.tables import Dataset, reload_catalogs

#: Modules that a publication imports when needed. A child process has them from the start.
_PRELOADED = ["deltalake", "pyiceberg.catalog.sql", "pyiceberg.io.pyarrow", "pyiceberg.table"]
_SQL_COMMIT = "sqlalchemy.engine.default.DefaultDialect.do_commit"


@dataclass(frozen=True)
class Step:
    """A moment of a publication: before or after a request to the S3 server or a commit of the SQL catalog.

    Attributes:
        name: method and path of the request, or `COMMIT`.
        is_done: whether the request or the commit was executed. The publication has no response yet.
    """

    name: str
    is_done: bool

    @property
    def is_write(self) -> bool:
        """Whether the step is a write. pyiceberg writes an object by three requests."""
        return self.name.startswith(("PUT ", "POST ", "DELETE ", "COMMIT"))

    @property
    def is_visible_write(self) -> bool:
        """Whether others can see the result: not a part of an upload that is completed later."""
        return self.is_write and not self.name.endswith("?uploads") and "?partNumber=" not in self.name

    @property
    def is_table_commit(self) -> bool:
        """Whether the step is the last write to the S3 server before a new version of an existing table."""
        number = re.search(r"/_delta_log/(\d+)\.json|/metadata/(\d+)-[^/]*\.metadata\.json", self.name)
        return number is not None and self.is_visible_write and int(number[1] or number[2]) > 0


@dataclass(frozen=True)
class Outcome:
    """The result that a publication reports.

    Attributes:
        version: the version of the table.
        is_new: whether the publication reports a transaction.
        error: the error as text.
    """

    version: int | None = None
    is_new: bool = False
    error: str | None = None


#: Called at each step, with the id of the publishing process.
Reaction = Callable[[Step, int], None]


def publish_in_child(
    dataset: Dataset,
    proxy: FaultProxy,
    react: Reaction = lambda *_: None,
    kill_after_s: float | None = None,
) -> Outcome | None:
    """Publishes a dataset in a child process, through a proxy; returns None if the process was killed.

    The child waits while `react` runs. (A publication in this process would block: deltalake holds the global
    lock of Python during some requests, and the proxy needs the lock.)
    """
    here, there = multiprocessing.Pipe()
    is_endpoint = ("__S3__ENDPOINT", "AWS_ENDPOINT_URL_S3")
    environment = {
        key: proxy.url if key.endswith(is_endpoint) else value for key, value in os.environ.items()
    }
    child = _context().Process(target=_publish, args=(environment, dataset.uri, dataset.to, there))
    child.start()
    there.close()
    timer = threading.Timer(kill_after_s or 3600, child.kill)
    timer.start()
    lock, outcome = threading.Lock(), None

    def reached(step: Step) -> None:
        with lock:
            react(step, child.pid or 0)

    def watch(is_done: bool) -> Callable[[Request], None]:
        return lambda request: reached(Step(f"{request.method} {request.path}", is_done))

    proxy.before, proxy.after = watch(False), watch(True)
    try:
        while outcome is None and here.poll(60):
            message = here.recv()
            if isinstance(message, Outcome):
                outcome = message
            else:
                reached(message)
                here.send(None)
    except (EOFError, ConnectionError):
        pass  # the child was killed
    finally:
        timer.cancel()
        child.join(60)
        proxy.before = proxy.after = lambda _: None
        here.close()
    assert outcome is not None or child.exitcode == -signal.SIGKILL, child.exitcode
    return outcome


def kill(process: int, step: Step) -> None:
    """Kills a publication at a step. A request that was not executed is dropped."""
    os.kill(process, signal.SIGKILL)
    if not step.is_done:
        raise ConnectionAbortedError


class SavedTable:
    """The state of a dataset's table: its objects and, for Iceberg, the file of the catalog."""

    def __init__(self, dataset: Dataset, catalog: Path) -> None:
        self._dataset, self._catalog, self._copy = dataset, catalog, catalog.with_suffix(".saved")
        self._versions = dataset.objects(dataset.table)
        self._contents = {uri: dataset.storage.read(uri) for uri in self._versions}
        if catalog.exists():
            shutil.copy(catalog, self._copy)

    def restore(self) -> None:
        """Makes the table what it was."""
        storage, now = self._dataset.storage, self._dataset.objects(self._dataset.table)
        for uri in now.keys() - self._versions.keys():
            storage.delete(uri)
        for uri, content in self._contents.items():
            if now.get(uri) != self._versions[uri]:
                storage.write(uri, content)
        self._catalog.unlink(missing_ok=True)
        if self._copy.exists():
            shutil.copy(self._copy, self._catalog)


def _publish(environment: dict[str, str], uri: str, to: str, parent: Connection) -> None:
    """Publishes in this child process; reports commits of the SQL catalog, and the result, to the parent."""
    os.environ |= environment
    if to.startswith("iceberg:"):
        reload_catalogs()
        mock.patch(_SQL_COMMIT, _reported_commit(parent)).start()
    try:
        done = publish_labels(Partition.open(Storage(), uri), to)
        parent.send(Outcome(done.version, done.published_at is not None))
    except Exception as error:
        parent.send(Outcome(error=f"{type(error).__name__}: {error}"))


def _reported_commit(parent: Connection) -> Callable[..., None]:
    """Returns a commit of SQLAlchemy that waits for the parent before and after the commit."""
    from sqlalchemy.engine.default import DefaultDialect

    do_commit = DefaultDialect.do_commit

    def commit(self: Any, connection: Any) -> None:
        if connection.in_transaction:
            parent.send(Step("COMMIT", False))
            parent.recv()
            do_commit(self, connection)
            parent.send(Step("COMMIT", True))
            parent.recv()

    return commit


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_PRELOADED])
    return context
