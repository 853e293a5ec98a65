"""Random changes of training images."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def augment(images: Tensor, *, flip: bool, shift: int) -> Tensor:
    """Flips half of the images (n, c, h, w) horizontally, and shifts each by up to `shift` pixels per axis.

    Uncovered pixels are black.
    """
    n, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + torch.randint(0, 2 * shift + 1, (n, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(0, 2 * shift + 1, (n, 1), device=device)
    if flip:
        is_flipped = torch.rand(n, 1, device=device) < 0.5
        columns = torch.where(is_flipped, columns.flip(1), columns)
    padded = F.pad(images, (shift, shift, shift, shift))
    sample = torch.arange(n, device=device).view(-1, 1, 1)
    moved = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2)
