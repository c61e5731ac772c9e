"""Images with one edge at a known position between pixels, and the offsets of the edges of masks."""

import torch
from torch import nn

import bpkd_sdk


class Brightness(nn.Module):
    """A network with the classes dark and light, whose logits are the mean brightness of cells of `stride` pixels."""

    def __init__(self, stride=1, size_divisor=1):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.spec = bpkd_sdk.NetworkSpec(
            name=None, num_classes=2, size_divisor=size_divisor, mean=(0.5,) * 3, std=(0.5,) * 3
        )

    def forward(self, images):
        brightness = self.pool(images).mean(1, keepdim=True)
        return torch.cat([-brightness, brightness], 1)


def images_with_edges(size, axis, margin=13):
    """Return images (2n, 3, H, W) with one edge each, and the positions (n,) of the edges.

    The first n images are dark before the edge and light after it, the others are their negatives. The positions are
    0.75 pixels apart. The pixel of an edge has the mean of both sides, weighted by their areas.
    """
    positions = torch.arange(margin + 0.125, size[axis] - margin, 0.75, dtype=torch.float64)
    light = (torch.arange(size[axis]) + 1 - positions[:, None]).clamp(0, 1)
    profile = (255 * light).round().to(torch.uint8).unflatten(1, (1, -1, 1) if axis == 0 else (1, 1, -1))
    images = profile.expand(-1, 3, *size).contiguous()
    return torch.cat([images, 255 - images]), positions


def mask_offsets(masks, positions, axis):
    """Return the offset in pixels of the edge of each mask (2n, H, W) from the position of the image's edge."""
    before = torch.cat([masks[: len(positions)] == 0, masks[len(positions) :] == 1])
    return before.double().sum(axis + 1).mean(1) - positions.repeat(2)
