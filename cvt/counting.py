"""Counts the operations of a CvT. `jobs.benchmarks` measures speed."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification


def count_macs(config: CvtConfig, height: int, width: int) -> int:
    """Counts the multiply-accumulate operations (MACs) to classify one image.

    The count includes convolutions, linear layers and both matrix products of attention. The count excludes
    biases, norms, softmax and activations. The model runs without data, so memory and time do not depend on
    its size. The values of arXiv 2103.15808 are up to 1.5 % lower: 4.5, 7.1 and 193.2 billion for CvT-13 and
    CvT-21 at 224 pixels and for CvT-W24 at 384 pixels.

    Args:
        config: configuration of the model.
        height: height of the image in pixels.
        width: width of the image in pixels.
    """
    with torch.device("meta"), torch.no_grad():
        model = CvtForImageClassification(config).eval()
        image = torch.empty(1, config.num_channels, height, width)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return int(counter.get_total_flops()) // 2  # FLOPs count multiplication and addition separately
