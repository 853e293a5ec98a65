"""Fixtures of the tests of the model."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marks of transformers' common tests, which `--strict-markers` refuses otherwise."""
    for mark in (
        "slow",
        "accelerate_tests",
        "flash_attn_test",
        "flash_attn_3_test",
        "flash_attn_4_test",
        "torch_compile_test",
    ):
        config.addinivalue_line("markers", f"{mark}: of transformers' common tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of transformers' common tests, sums up those that don't apply; with -v, each says why it doesn't."""
    report = yield
    if report.skipped and item.path.name == "test_common.py" and item.config.get_verbosity() <= 0:
        report.longrepr = str(item.path), None, "of what CvT, or this machine, has not; -v tells which"
    return report


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: faster than two for models this small, and much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
