"""Where the time of a run goes: what each stage did, how long it took, and which of them bound the run.

Stages measure themselves, their figures ride in the chunks, and the driver adds them up.
"""

from __future__ import annotations

import threading
import time

from pipeline.statistics.stages import logger

_GPU_INTERVAL = 0.5


class GpuMeter:
    """Asks the driver twice a second how busy this process's GPU is (needs nvidia-ml-py)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shares: list[float] = []
        threading.Thread(target=self._sample, name="gpu-meter", daemon=True).start()

    def taken(self) -> dict[str, float]:
        """Sum and number of the shares (0 to 1) since they were taken last; named as `spent` has them."""
        with self._lock:
            shares, self._shares = self._shares, []
        return {"gpu.busy": sum(shares), "gpu.samples": len(shares)}

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
