"""The client of Ray's Jobs API, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.schedule import JobClient


def test_long_log_is_polled_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    client = object.__new__(JobClient)
    logs = iter(["a" * 10, "a" * 5_000_000, "a" * 5_000_000 + "end"])
    jobs = (SimpleNamespace(is_finished=is_last) for is_last in (False, False, True))
    monkeypatch.setattr(client, "job", lambda job_id: next(jobs))
    monkeypatch.setattr(client, "logs", lambda job_id: next(logs))
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    written: list[str] = []
    assert client.follow("job", written.append).is_finished
    assert pauses == [1.0, 5.0]
    assert [len(text) for text in written] == [10, 4_999_990, 3]
