"""Fixtures for the code of the documentation."""

from __future__ import annotations

import pytest

from tests.docs.example_labels import ExampleLabels


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory: pytest.TempPathFactory) -> ExampleLabels:
    return ExampleLabels(tmp_path_factory.mktemp("embeddings"), "float16")


@pytest.fixture(scope="module")
def without_embeddings(tmp_path_factory: pytest.TempPathFactory) -> ExampleLabels:
    return ExampleLabels(tmp_path_factory.mktemp("default"))
