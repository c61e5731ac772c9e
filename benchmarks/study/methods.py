"""Methods of the study, each made from the weights of its terms, and the ways to state BPKD's edge term."""

from collections.abc import Callable, Mapping

from torch import Tensor

from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.losses import (
    BPKDLoss,
    CanonicalKDLoss,
    CIRKDLoss,
    Composition,
    CWDLoss,
    DistillationLoss,
    DISTLoss,
    IFVDLoss,
    SKDSLoss,
)
from bpkd_sdk.losses.bpkd import post_mask
from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.method import OutputPair

WEIGHTS = (0.3, 1.0, 3.0, 10.0)  # candidates of the tuning, for each term

# Methods by the weight of one term.
SINGLE: dict[str, Callable[[float], DistillationLoss]] = {
    "kd": lambda weight: CanonicalKDLoss(logit_weight=weight, feature_weight=0),
    "cwd": lambda weight: CWDLoss(weight=weight),
    "body": lambda weight: BPKDLoss(edge_weight=0, body_weight=weight),
    "edge": lambda weight: BPKDLoss(edge_weight=weight, body_weight=0),
    "dist": lambda weight: DISTLoss(inter_weight=weight, intra_weight=weight),
    "skds": lambda weight: SKDSLoss(pixel_weight=weight),
    "ifvd": lambda weight: IFVDLoss(kd_weight=weight),
    "cirkd": lambda weight: CIRKDLoss(kd_weight=weight),
}
TUNED = ("kd", "cwd", "body", "edge", "dist")  # terms that are tuned alone
LIKE_KD = ("skds", "ifvd", "cirkd")  # their pixel-wise term is KD's, and takes its weight; others keep their defaults
# Second terms, tuned with the best weight of the first.
SECOND = {"bpkd": ("body", "edge"), "kd+cwd": ("kd", "cwd"), "canonical": ("kd", "feature")}

Weights = Mapping[str, float]


def method_name(weights: Weights) -> str:
    """Return the name of a method in the study: its terms and their weights."""
    return " ".join(f"{term} {weight:g}" for term, weight in weights.items())


def create(weights: Weights) -> DistillationLoss:
    """Create a method from the weights of its terms."""
    weights = dict(weights)
    parts: list[DistillationLoss] = []
    if "feature" in weights:
        return CanonicalKDLoss(logit_weight=weights["kd"], feature_weight=weights["feature"])
    if "body" in weights and "edge" in weights:
        parts.append(BPKDLoss(edge_weight=weights.pop("edge"), body_weight=weights.pop("body")))
    parts = [SINGLE[term](weight) for term, weight in weights.items()] + parts
    return parts[0] if len(parts) == 1 else Composition(parts)


def named(*choices: Weights) -> dict[str, DistillationLoss]:
    """Return methods by their names."""
    return {method_name(weights): create(weights) for weights in choices}


class NoPreMask(BPKDLoss):
    """BPKD without the pre-mask: its edge term does not multiply the logits by the trimap before the softmax."""

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        student, teacher = outputs.logits
        masks = edge_masks(labels, outputs.num_classes, tuple(student.shape[2:]), self.width, self.ignore_index)
        weight = post_mask(masks, alpha=self.alpha, class_reduction=self.class_reduction, edge_count=self.edge_count)
        phi = softmax_kl(student.flatten(2), teacher.flatten(2), dim=1)
        return super().terms(outputs, labels) | {"edge": (phi * weight).sum() / len(student)}


# BPKD by the form of its edge term, from the weights of edge and body.
EDGE_FORMS: dict[str, Callable[[float, float], BPKDLoss]] = {
    "mean": lambda edge, body: BPKDLoss(edge_weight=edge, body_weight=body),
    "pooled": lambda edge, body: BPKDLoss(edge_weight=edge, body_weight=body, class_reduction="pooled"),
    "no pre-mask": lambda edge, body: NoPreMask(edge_weight=edge, body_weight=body),
}
QUIET_EDGE = 0.3  # second loudness at which the forms are compared: that of "mean" with this weight


def edge_forms(best: Weights, sizes: Mapping[str, float]) -> dict[str, DistillationLoss]:
    """Return BPKD with each form of the edge term, as loud as "mean" at its best weight, and at `QUIET_EDGE`.

    Args:
        best: Tuned weights of edge and body.
        sizes: Size of the edge term of each form at the start of training, with weight 1.
    """
    methods: dict[str, DistillationLoss] = named(best)  # "mean" at its best weight, which is in the factorial too
    for loudness in (best["edge"], QUIET_EDGE):
        for form, create_form in EDGE_FORMS.items():
            weight = float(f"{loudness * sizes['mean'] / sizes[form]:.3g}")
            if form != "mean" or loudness != best["edge"]:
                methods[f"{form} as loud as {loudness:g}"] = create_form(weight, best["body"])
    return methods
