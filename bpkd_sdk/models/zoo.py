"""The paper's eight networks and the two variants that official files use, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from bpkd_sdk.errors import check_choice
from bpkd_sdk.models import imagenet
from bpkd_sdk.models.blocks import initialize
from bpkd_sdk.models.decoders import AuxiliaryHead, ConcatHead, Head, ISAHead, PSPHead, SeparableASPPHead
from bpkd_sdk.models.encoders import Backbone, HRNet, MobileNetV2, ResNet
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


@dataclass(frozen=True)
class ZooEntry:
    """One network of the zoo.

    Attributes:
        name: What `create_model` takes.
        backbone: Builds the backbone.
        head: Class of the decode head.
        channels: Width of the decode head.
        aux_channels: Width of the auxiliary head, or None where the network has none.
        stride: Input size over logits size.
        paper_gflops: The paper's FLOPs column, in its convention (150 classes, 512x512), or None for a variant.
        paper_params: The paper's parameters column in millions, or None for a variant.
        imagenet: Key of `imagenet.SOURCES` whose weights fit the backbone, or None where there are none.
        variant_of: The table's network that this one is a variant of, or None.
    """

    name: str
    backbone: Callable[[], Backbone]
    head: type[Head]
    channels: int
    aux_channels: int | None
    stride: int
    paper_gflops: float | None = None
    paper_params: float | None = None
    imagenet: str | None = None
    variant_of: str | None = None

    @property
    def has_aux_head(self) -> bool:
        """Whether the network can be built with ``aux_head=True``."""
        return self.aux_channels is not None


_R18, _R101 = partial(ResNet, 18), partial(ResNet, 101)
_R101_TIMM, _MV2_TIMM = "resnet101c.gluon_in1k", "mobilenetv2_100.ra_in1k"

_ENTRIES = (
    ZooEntry("pspnet_r101", _R101, PSPHead, 512, 256, 8, 256.89, 68.07, _R101_TIMM),
    ZooEntry("pspnet_r18", _R18, PSPHead, 128, 64, 8, 54.53, 12.82),
    ZooEntry("hrnetv2p_w48", partial(HRNet, "w48"), ConcatHead, 720, None, 4, 95.64, 65.95, "hrnet_w48.ms_in1k"),
    ZooEntry(
        "hrnetv2p_w18s", partial(HRNet, "w18s"), ConcatHead, 270, None, 4, 10.49, 3.97, "hrnet_w18_small_v2.ms_in1k"
    ),
    ZooEntry("deeplabv3plus_r101", _R101, SeparableASPPHead, 512, 256, 4, 255.67, 62.68, _R101_TIMM),
    ZooEntry("deeplabv3plus_mv2", MobileNetV2, SeparableASPPHead, 512, 256, 4, 69.60, 15.35, _MV2_TIMM),
    ZooEntry("isanet_r101", _R101, ISAHead, 512, 256, 8, 228.21, 56.80, _R101_TIMM),
    ZooEntry("isanet_r18", _R18, ISAHead, 128, 64, 8, 54.33, 12.46),
    ZooEntry(
        "pspnet_r18b",
        partial(ResNet, 18, deep_stem=False),
        PSPHead,
        128,
        64,
        8,
        imagenet="resnet18.tv_in1k",
        variant_of="pspnet_r18",
    ),
    ZooEntry(
        "deeplabv3plus_mv2_ch128",
        MobileNetV2,
        SeparableASPPHead,
        128,
        64,
        4,
        imagenet=_MV2_TIMM,
        variant_of="deeplabv3plus_mv2",
    ),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ENTRIES}


def build(
    name: str, num_classes: int, *, aux_head: bool = False, backbone_weights: str | None = None
) -> SegmentationNetwork:
    """Build a network of the zoo with random weights, or with a backbone trained on ImageNet.

    Args:
        name: A key of `ZOO`.
        num_classes: Channels of the logits.
        aux_head: Add the auxiliary training head; see `ZooEntry.has_aux_head`.
        backbone_weights: None, or "imagenet" (downloaded by timm).

    Raises:
        ValueError: For an unknown name, an auxiliary head where there is none, or weights that do not exist.
        RuntimeError: If timm cannot download the weights.
    """
    check_choice("name", name, ZOO)
    check_choice("backbone_weights", backbone_weights, (None, "imagenet"))
    entry = ZOO[name]
    if aux_head and not entry.has_aux_head:
        raise ValueError(f"{name!r} has no auxiliary head; build it with aux_head=False.")
    backbone = entry.backbone()
    network = SegmentationNetwork(
        backbone,
        entry.head(backbone.out_channels, entry.channels, num_classes),
        AuxiliaryHead(backbone.out_channels, entry.aux_channels, num_classes)
        if aux_head and entry.aux_channels
        else None,
        NetworkSpec(name=name, num_classes=num_classes, aux_head=aux_head),
    )
    initialize(network)
    if backbone_weights is not None:
        imagenet.load(network.backbone, name, entry.imagenet)
    return network
