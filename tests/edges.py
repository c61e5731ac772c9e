"""Images with one edge at known places between pixels, and how far the edges of masks lie from there."""

import torch
from torch import nn

import bpkd_sdk


class Brightness(nn.Module):
    """A network with the classes dark and light, whose logits are the brightness of cells of `stride` pixels."""

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
    """Images (2n, 3, H, W), dark before an edge and light behind it, then light before and dark behind; places (n,).

    The places lie 0.75 pixels apart; the pixel that holds an edge has the mean of both sides by their areas.
    """
    places = torch.arange(margin + 0.125, size[axis] - margin, 0.75, dtype=torch.float64)
    light = (torch.arange(size[axis]) + 1 - places[:, None]).clamp(0, 1)
    profile = (255 * light).round().to(torch.uint8).unflatten(1, (1, -1, 1) if axis == 0 else (1, 1, -1))
    images = profile.expand(-1, 3, *size).contiguous()
    return torch.cat([images, 255 - images]), places


def mask_offsets(masks, places, axis):
    """How many pixels the edge of each mask (2n, H, W) lies behind the place of the image's."""
    before = torch.cat([masks[: len(places)] == 0, masks[len(places) :] == 1])
    return before.double().sum(axis + 1).mean(1) - places.repeat(2)
