"""The process of a section of `cvt-label benchmark gpu`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from jobs.benchmarks.contenders import PIPELINE
from jobs.benchmarks.gpu_checks import (
    check_graphs,
    check_memory,
    check_nvjpeg,
    check_precisions,
    check_streams,
)
from jobs.benchmarks.gpu_rates import (
    machine,
    measure_compiled,
    measure_decoding,
    measure_limits,
    measure_model,
    measure_pipeline,
)
from jobs.benchmarks.sections import Report, Row, run_as_section

SECTIONS: dict[str, Callable[[Row, Report], None]] = {
    "machine": machine,
    "nvjpeg": check_nvjpeg,
    "precisions": check_precisions,
    "limits": measure_limits,
    "decoding": measure_decoding,
    "model": measure_model,
    "memory": check_memory,
    "streams": check_streams,
    "pipeline": measure_pipeline,
    "graphs": check_graphs,
    "ray": partial(measure_pipeline, command=PIPELINE),
    "compiled": measure_compiled,
}


if __name__ == "__main__":
    run_as_section(SECTIONS)
