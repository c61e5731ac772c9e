"""Networks without training whose masks follow the image: the class of a pixel is the nearest of five colours."""

import torch
import torch.nn.functional as F
from torch import nn

import bpkd_sdk

COLORS = {
    "shadow": (35, 35, 40),
    "asphalt": (105, 105, 110),
    "sky": (225, 230, 240),
    "plants": (75, 90, 45),
    "bricks": (130, 80, 60),
}
PALETTE = ((52, 58, 70), (0, 114, 178), (86, 180, 233), (0, 158, 115), (213, 94, 0))


class NearestColor(nn.Module):
    """A network that computes logits from colours, averaged over squares of `blur` pixels, with stride `stride`."""

    def __init__(self, blur: int, stride: int) -> None:
        super().__init__()
        self.blur, self.stride = blur, stride
        colors = torch.tensor(list(COLORS.values())) / 255
        self.classify = nn.Conv2d(3, len(colors), 1)
        self.classify.weight.data = 80 * colors[:, :, None, None]
        no_ties = torch.linspace(0, 0.0123, len(colors))
        self.classify.bias.data = no_ties - 40 * (colors**2).sum(1)
        self.spec = bpkd_sdk.NetworkSpec(
            None, len(COLORS), class_names=tuple(COLORS), palette=PALETTE, mean=(0, 0, 0), std=(1, 1, 1)
        )
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        smooth = F.avg_pool2d(images, self.blur, self.stride, self.blur // 2, count_include_pad=False)
        return self.classify(smooth)


def teacher() -> NearestColor:
    """Create a network with stride 1."""
    return NearestColor(blur=3, stride=1)


def student() -> NearestColor:
    """Create a network with stride 8, whose masks are coarser than those of the teacher."""
    return NearestColor(blur=9, stride=8)
