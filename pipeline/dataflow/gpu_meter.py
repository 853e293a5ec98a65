"""How busy the GPU of this process is."""

import logging
import threading
import time

from pipeline.statistics import StageMetrics

logger = logging.getLogger("cvt_label")

_GPU_INTERVAL = 0.5


class GpuMeter:
    """Asks the driver twice a second how busy this process's GPU is (needs nvidia-ml-py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: list[float] = []
        threading.Thread(target=self._sample, name="gpu-meter", daemon=True).start()

    def take(self) -> StageMetrics:
        """Sum and number of the samples since the last call."""
        with self._lock:
            shares, self._shares = self._shares, []
        return StageMetrics(gpu_busy=sum(shares), gpu_samples=len(shares))

    def _sample(self) -> None:
        import torch

        while True:
            try:
                share = torch.cuda.utilization() / 100
            except Exception as error:  # of three kinds at least; labelling goes on without
                logger.warning("GPU utilisation is not measured: %s", error)
                return
            with self._lock:
                self._shares.append(share)
            time.sleep(_GPU_INTERVAL)
