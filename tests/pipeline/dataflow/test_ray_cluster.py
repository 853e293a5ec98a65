"""The connection to Ray: the address, and what Ray's core writes to the terminal."""

from __future__ import annotations

import os
import sys

import pytest

from pipeline.dataflow import ClusterError, check_reachable, ray_address
from pipeline.dataflow.ray_cluster import _log_level_line_removed

LOG_LEVEL_LINE = b"logging.cc:303: Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL to 3\n"


def test_line_about_the_log_level_is_removed(capfd: pytest.CaptureFixture[str]) -> None:
    with _log_level_line_removed():
        os.write(2, LOG_LEVEL_LINE + b"out of disk space\n")
        print("starting", file=sys.stderr)
        assert capfd.readouterr().err == "starting\n"
    assert capfd.readouterr().err == "out of disk space\n"


def test_other_lines_are_written_if_ray_does_not_start(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with _log_level_line_removed():
            os.write(2, b"out of disk space\n")
            raise RuntimeError("timed out")

    with pytest.raises(RuntimeError, match="timed out"):
        fail()
    assert capfd.readouterr().err == "out of disk space\n"


def test_address_comes_from_configuration_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(None) == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_address(None) == "10.0.0.1:6379"
    assert ray_address("auto") == "auto"


def test_address_without_a_numeric_port_is_rejected() -> None:
    with pytest.raises(ClusterError, match="the port is not a number"):
        check_reachable("10.0.0.1:port")
