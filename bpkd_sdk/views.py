"""Views of an image: the same image at other sizes and mirrored, whose logits are averaged.

The logits z_v of V views are averaged as probabilities, p_c = 1/V sum of softmax(z_v)_c, and returned as logits whose
softmax is p: log p_c + m, where m is the mean over the views of logsumexp(z_v). Views that agree therefore return the
logits of each of them, so that losses over positions compare the same quantity as without views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bpkd_sdk.arrays import at_least_float32, resize_bilinear
from bpkd_sdk.classes import two_class_logits
from bpkd_sdk.output import SegmentationOutput, as_output
from bpkd_sdk.sizes import resize_images


@dataclass(frozen=True)
class Views:
    """The views of each image that a network runs on.

    Attributes:
        scales: Factors on the image size; the first one is the main view.
        flip: Whether the mirror image of every view is added.
        size_divisor: Number that both sides of a view are rounded to a multiple of.
    """

    scales: tuple[float, ...]
    flip: bool = False
    size_divisor: int = 1

    def size(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Return the (height, width) of an image at a scale; halves are rounded up.

        Examples:
            >>> Views((1.5,)).size((5, 10), 1.5), Views((1.5,), size_divisor=32).size((64, 80), 1.5)
            ((8, 15), (96, 128))
        """
        step = self.size_divisor
        height, width = (max(step, int(side * scale / step + 0.5) * step) for side in size)
        return height, width

    def logits(
        self, network: Callable[[Tensor], Tensor], images: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Run a network on all views; average their logits.

        The main view comes last, so that hooks on the network have recorded its feature map afterwards.

        Args:
            network: Function from images to logits (N, K, h, w).
            images: Images (N, channels, H, W) of any dtype.
            size: (h, w) of the result; None: the size of the main view's logits.

        Returns:
            (N, K, h, w).
        """
        whole = (images.shape[2], images.shape[3])
        every: list[Tensor] = []
        for scale in reversed(self.scales):
            view = resize_images(images, self.size(whole, scale))
            if self.flip:
                every.append(network(view.flip(3)).flip(3))
            every.append(network(view))
        size = size or (every[-1].shape[2], every[-1].shape[3])
        resized = [
            logits if tuple(logits.shape[2:]) == size else resize_bilinear(logits.float(), size) for logits in every
        ]
        return resized[0] if len(resized) == 1 else average_views(resized)


def average_views(views: list[Tensor]) -> Tensor:
    """Average the logits of views as probabilities, see the docstring of this file.

    Args:
        views: Logits (N, K, h, w) of each view, or (N, 1, h, w) for two classes.

    Returns:
        Logits of the same shape, float32 or float64.

    Examples:
        >>> views = [torch.tensor(p).log().view(1, 2, 1, 1) for p in ((0.2, 0.8), (0.6, 0.4))]
        >>> [round(p, 4) for p in average_views(views).softmax(1).flatten().tolist()]
        [0.4, 0.6]
    """
    stacked = torch.stack([at_least_float32(logits) for logits in views])
    if stacked.shape[2] == 1:
        average = average_views([two_class_logits(logits) for logits in stacked])
        return average[:, 1:] - average[:, :1]
    level = stacked.logsumexp(2, keepdim=True)
    return (stacked - level).logsumexp(0) - math.log(len(views)) + level.mean(0)


class ViewedNetwork(nn.Module):
    """Wrapper that runs a network on views of its images; the network itself is not changed.

    Its feature maps and auxiliary logits are those of the main view.

    Args:
        network: Segmentation network.
        views: Views of each image.
    """

    def __init__(self, network: nn.Module, views: Views) -> None:
        super().__init__()
        self.network = network
        self.views = views
        self.train(network.training)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Run the network on views of normalised images (N, channels, H, W)."""
        outputs: list[SegmentationOutput] = []

        def network(view: Tensor) -> Tensor:
            outputs[:] = [as_output(self.network(view))]
            return outputs[0].logits

        logits = self.views.logits(network, images)
        return replace(outputs[0], logits=logits)
