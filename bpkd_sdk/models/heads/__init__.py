"""The heads of the zoo: feature maps of a backbone -> logits (N, C, h, w)."""

from __future__ import annotations

from bpkd_sdk.models.heads.aspp import SeparableASPPHead
from bpkd_sdk.models.heads.base import Head
from bpkd_sdk.models.heads.fcn import AuxiliaryHead, ConcatHead
from bpkd_sdk.models.heads.isa import ISAHead
from bpkd_sdk.models.heads.psp import PSPHead

__all__ = ["AuxiliaryHead", "ConcatHead", "Head", "ISAHead", "PSPHead", "SeparableASPPHead"]
