"""DuckDB with the extensions that read Delta and Iceberg tables themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def connect_with_extension(name: str) -> Any:
    """Connects to DuckDB with the extension "delta" or "iceberg"; skips the test without the extension.

    An extension is taken from the package `duckdb-extension-<name>`, or from DuckDB's own folder.
    """
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed: cvt-label[consumers]")
    connection = duckdb.connect(config={"allow_unsigned_extensions": True})
    for extension in ("avro", "iceberg") if name == "iceberg" else (name,):
        try:
            connection.execute(f"LOAD '{_find_extension(extension)}'")
        except (ImportError, duckdb.Error):
            pytest.skip(f"the extension {extension} of DuckDB {duckdb.__version__} is not installed")
    return connection


def _find_extension(name: str) -> str:
    """Returns the file of an extension in its package, or the name if there is no package."""
    if importlib.util.find_spec(f"duckdb_extension_{name}") is None:
        return name
    package = importlib.import_module(f"duckdb_extension_{name}")
    [path] = Path(package.__path__[0]).rglob(f"{name}.duckdb_extension")
    return str(path)
