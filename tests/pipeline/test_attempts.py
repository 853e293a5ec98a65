from __future__ import annotations

import subprocess
import sys

from pipeline.attempts import Attempts


def test_work_that_kills_its_workers_keeps_its_error() -> None:
    attempts = Attempts(max_attempts=2)
    assert attempts.start("reading", "process 1") == (1, 0, None)
    attempts.add_result("reading", 1)
    attempts.add_result("reading", 2)
    assert attempts.start("reading", "process 2") == (2, 2, None)
    attempts.add_result("reading", 1)
    cause = "2 workers died while reading, the last one in process 2; ray.task_retries limits the attempts"
    assert attempts.start("reading", "process 3") == (2, 2, cause)
    assert attempts.start("reading", "process 4") == (2, 2, cause)


def test_finished_work_may_be_repeated() -> None:
    attempts = Attempts(max_attempts=1)
    for _ in range(3):  # Ray repeats finished work whose results were on a lost node
        assert attempts.start("decoding", "process 1").error is None
        attempts.finish("decoding")


def test_process_of_the_counter_imports_little() -> None:
    code = "import sys, pipeline.attempts; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "pydantic", "pipeline.config"}.intersection(done.stdout.split())
