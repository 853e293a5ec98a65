"""How large a CvT is, and how much it computes."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cvt.configuration import CvtConfig
from cvt.modeling import CvtForImageClassification


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes: weights, biases and class tokens, not batch norm's statistics."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(config: CvtConfig, height: int, width: int) -> int:
    """Multiply-accumulates of the classification of one image.

    Counts convolutions, linear layers and both products of attention; neither biases nor normalisation,
    softmax and activations. Runs the model without data, so neither memory nor time depend on its size.

    The figures of arXiv 2103.15808 (4.5, 7.1 and 193.2 billion for CvT-13 and CvT-21 at 224 pixels and
    CvT-W24 at 384) are up to 1.5 % below these.

    Args:
        config: the model's.
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    with torch.device("meta"), torch.no_grad():
        model = CvtForImageClassification(config).eval()
        image = torch.empty(1, config.num_channels, height, width)
        with FlopCounterMode(display=False) as counter:
            model(image)
    return counter.get_total_flops() // 2  # it counts multiplication and addition apart
