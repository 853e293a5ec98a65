"""How much a CvT computes. Measuring how fast belongs to `jobs.benchmarks`."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification


def count_macs(config: CvtConfig, height: int, width: int) -> int:
    """Counts the multiply-accumulates of classifying one image of a height and width in pixels.

    Counts convolutions, linear layers and both products of attention; no biases, norms, softmax and
    activations. Runs the model without data, so that neither memory nor time depend on its size. The figures
    of arXiv 2103.15808 (4.5, 7.1 and 193.2 billion for CvT-13 and CvT-21 at 224 pixels and CvT-W24 at 384)
    are up to 1.5 % lower.
    """
    with torch.device("meta"), torch.no_grad():
        model = CvtForImageClassification(config).eval()
        image = torch.empty(1, config.num_channels, height, width)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return int(counter.get_total_flops()) // 2  # it counts multiplication and addition apart
