"""Runtimes that run on views of their images: at other sizes, and mirrored."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from bpkd_sdk.runtime.base import Range, Runtime
from bpkd_sdk.views import Views


class ViewedRuntime(Runtime):
    """A runtime that averages its logits over views of each image.

    Args:
        runtime: Runtime that is wrapped and returns logits.
        views: Views of each image.

    Raises:
        ValueError: If there is no image size all of whose views the runtime accepts.
    """

    def __init__(self, runtime: Runtime, views: Views) -> None:
        accepts = replace(
            runtime.accepts,
            height=_image_range(runtime.accepts.height, views, runtime.name),
            width=_image_range(runtime.accepts.width, views, runtime.name),
        )
        super().__init__(runtime.name, runtime.spec, runtime.metadata, runtime.device, accepts)
        self.runtime = runtime
        self.views = views

    def infer(self, inputs: Tensor) -> Tensor:
        """Run the wrapped runtime on views of the inputs; return logits (N, K, H, W) of the images' size."""
        if not self.metadata["preprocess"]:
            return self.views.logits(self.runtime.infer, inputs, (inputs.shape[2], inputs.shape[3]))

        def network(images: Tensor) -> Any:
            return self.runtime.infer(images.permute(0, 2, 3, 1).contiguous())

        return self.views.logits(network, inputs.permute(0, 3, 1, 2), (inputs.shape[1], inputs.shape[2]))

    def logits_at_stride(self, images: Tensor) -> Tensor:
        """Run the wrapped runtime on views of images (N, channels, H, W); return logits at the main view's size."""
        return self.views.logits(self.runtime.logits_at_stride, images)


def _image_range(allowed: Range, views: Views, name: str) -> Range:
    """Return the range of an image's side, given the range of the runtime's side."""
    least, most = allowed
    smallest = math.ceil(least / min(views.scales))
    if most is None:
        return smallest, None
    largest = math.floor(most / max(views.scales))
    if largest < smallest:
        sides = f"{least} pixels" if least == most else f"{least} to {most} pixels"
        raise ValueError(
            f"teacher_scale and the scales of teacher_augment run the teacher at {', '.join(map(str, views.scales))} "
            f"times the size of an image, but {name} accepts sides of {sides} only, which fits no image. Leave the "
            "scales out, or export the teacher with dynamic_size=True."
        )
    return smallest, largest
