"""Methods of the CamVid study: the candidates of the tuning, and the variants of BPKD in the ablation."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from benchmarks.study.methods import NoPreMask
from bpkd_sdk.data.public import CAMVID_CLASSES
from bpkd_sdk.losses import (
    BPKDLoss,
    CanonicalKDLoss,
    CIRKDLoss,
    Composition,
    CWDLoss,
    DistillationLoss,
    IFVDLoss,
    SKDSLoss,
)
from bpkd_sdk.losses.method import OutputPair


class AtLabelSize(BPKDLoss):
    """BPKD on logits that are resized to the labels; `BPKDLoss` uses the logits at their own size."""

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        student, teacher = (
            replace(output, logits=F.interpolate(output.logits, labels.shape[1:], mode="bilinear", align_corners=False))
            for output in (outputs.student, outputs.teacher)
        )
        return super().terms(OutputPair(student, teacher), labels)


# Three candidates per method: the paper's weights where its authors' code has its own, the defaults of this package
# before the study, and others. For BPKD the study had the paper's weights with the sum over classes.
CANDIDATES: dict[str, dict[str, DistillationLoss]] = {
    "bpkd": {
        "paper": BPKDLoss(edge_weight=50, body_weight=20, class_reduction="sum"),
        "edge 10 body 5": BPKDLoss(edge_weight=10, body_weight=5),
        "edge 1 body 2": BPKDLoss(edge_weight=1, body_weight=2),
    },
    # BPKD with the pixel-wise divergence that is also a term of SKDS, IFVD and CIRKD.
    "bpkd with kd": {
        f"kd 5 edge {edge} body {body}": Composition(
            [CanonicalKDLoss(logit_weight=5, feature_weight=0), BPKDLoss(edge_weight=edge, body_weight=body)]
        )
        for edge, body in ((10, 5), (3, 3), (1, 2))
    },
    "cwd": {"paper": CWDLoss.paper(), "logit 5": CWDLoss(weight=5), "logit 1": CWDLoss(weight=1)},
    "skds": {"paper": SKDSLoss.paper(), "pixel 5": SKDSLoss(pixel_weight=5), "pixel 15": SKDSLoss(pixel_weight=15)},
    "ifvd": {
        "paper": IFVDLoss.paper(len(CAMVID_CLASSES)),
        "kd 5": IFVDLoss(kd_weight=5),
        "kd 15": IFVDLoss(kd_weight=15),
    },
    "cirkd": {
        "kd 5": CIRKDLoss(kd_weight=5),
        "kd 15": CIRKDLoss(kd_weight=15),
        "kd 5 contrast 0.1": CIRKDLoss(kd_weight=5, minibatch_weight=0.1, pixel_weight=0.1, region_weight=0.1),
    },
    "canonical": {
        "logit 5": CanonicalKDLoss(logit_weight=5),
        "logit 15": CanonicalKDLoss(logit_weight=15),
        "logit 5 feature 5": CanonicalKDLoss(logit_weight=5, feature_weight=5),
    },
}

TUNED = {"edge_weight": 1, "body_weight": 2}
# BPKD with one change at a time, and CWD with the weight of BPKD's body term.
READINGS: dict[str, DistillationLoss] = {
    "edge 1 body 2": BPKDLoss(**TUNED),
    "edge 0": BPKDLoss(**TUNED | {"edge_weight": 0}),
    "edge 0.3": BPKDLoss(**TUNED | {"edge_weight": 0.3}),
    "edge 3": BPKDLoss(**TUNED | {"edge_weight": 3}),
    "body 5": BPKDLoss(**TUNED | {"body_weight": 5}),
    "sum over classes": BPKDLoss(**TUNED, class_reduction="sum"),
    "divided by mass": BPKDLoss(**TUNED, edge_count="mass"),
    "temperature 4": BPKDLoss(**TUNED, temperature=4),
    "width 3": BPKDLoss(**TUNED, width=3),
    "width 15": BPKDLoss(**TUNED, width=15),
    "void guard": BPKDLoss(**TUNED, void="guard"),
    "no pre-mask": NoPreMask(**TUNED),
    "upsampled logits": AtLabelSize(**TUNED),
    "cwd 2": CWDLoss(weight=2),
}
