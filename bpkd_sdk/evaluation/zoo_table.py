"""The cost of the zoo's networks, counted from the networks themselves, beside the paper's figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bpkd_sdk.evaluation.profile import profile
from bpkd_sdk.models.zoo import ZOO, build


@dataclass(frozen=True)
class ZooRow:
    """One network at the paper's setting: 150 classes, 512x512, parameters with the auxiliary head.

    Attributes:
        name: What `create_model` takes.
        params: Counted.
        paper_params: In the paper, in millions; None for a network that is not in its table.
        paper_macs: Counted in the paper's convention.
        paper_gflops: In the paper; None likewise.
        macs: Of convolutions, linear layers and matrix products alone.
        stride: Input size over logits size.
    """

    name: str
    params: int
    paper_params: float | None
    paper_macs: int
    paper_gflops: float | None
    macs: int
    stride: int


def measured_zoo() -> Iterator[ZooRow]:
    """A row for every network of the zoo; nothing is computed but shapes."""
    for entry in ZOO.values():
        with torch.device("meta"):
            network = build(entry.name, 150, aux_head=entry.has_aux_head)
        cost = profile(network)
        yield ZooRow(
            entry.name, cost.params, entry.paper_params, cost.paper_macs, entry.paper_gflops, cost.macs, entry.stride
        )
