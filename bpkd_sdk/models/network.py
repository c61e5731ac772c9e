"""A backbone with its heads: the one class that all networks of the zoo are."""

from __future__ import annotations

from torch import Tensor, nn

from bpkd_sdk.models.backbones import Backbone
from bpkd_sdk.models.heads import AuxiliaryHead, Head
from bpkd_sdk.models.spec import NetworkSpec
from bpkd_sdk.output import SegmentationOutput


class SegmentationNetwork(nn.Module):
    """Image (N, 3, H, W), normalised -> logits (N, C, h, w) at the head's own stride.

    Args:
        backbone: Makes the feature maps.
        decode_head: Makes the logits.
        auxiliary_head: Runs in training mode only, or None.
        spec: Name, classes and normalisation.
    """

    def __init__(
        self, backbone: Backbone, decode_head: Head, auxiliary_head: AuxiliaryHead | None, spec: NetworkSpec
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor | SegmentationOutput:
        """Logits; in training mode with an auxiliary head a `SegmentationOutput` that has both heads' logits."""
        features = self.backbone(images)
        logits: Tensor = self.decode_head(features)
        if self.training and self.auxiliary_head is not None:
            return SegmentationOutput(logits, aux_logits=self.auxiliary_head(features))
        return logits
