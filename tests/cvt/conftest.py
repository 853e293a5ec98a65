"""Fixtures for the tests of the model."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Registers the markers of transformers' common tests for `--strict-markers`."""
    for mark in (
        "slow",
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{mark}: used by transformers' common tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Replaces the skip reasons of transformers' common tests by one, except with -v."""
    report = yield
    if report.skipped and item.path.name == "test_common.py" and item.config.get_verbosity() <= 0:
        report.longrepr = (
            str(item.path),
            None,
            "not applicable to CvT or this machine; run with -v for reasons",
        )
    return report


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread, which is faster for small models, especially on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
