"""Measures the utilization of the GPU that this process uses."""

import logging
import threading
import time

from pipeline.statistics import StageMetrics

logger = logging.getLogger("cvt_label")

#: Seconds between two samples of the utilization.
_INTERVAL_S = 0.5


class GpuMeter:
    """Samples the utilization in a background thread; needs nvidia-ml-py."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._samples: list[float] = []
        threading.Thread(target=self._sample, name="gpu-meter", daemon=True).start()

    def collect(self) -> StageMetrics:
        """Returns the sum and the number of the samples since the last call; a sample is from 0 to 1."""
        with self._lock:
            samples, self._samples = self._samples, []
        return StageMetrics(gpu_busy=sum(samples), gpu_samples=len(samples))

    def _sample(self) -> None:
        import torch

        while True:
            try:
                utilization = torch.cuda.utilization() / 100
            except Exception as error:  # of several types; labeling continues without this measurement
                logger.warning("GPU utilization is not measured: %s", error)
                return
            with self._lock:
                self._samples.append(utilization)
            time.sleep(_INTERVAL_S)
