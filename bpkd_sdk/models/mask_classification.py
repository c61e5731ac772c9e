"""Networks that classify masks (MaskFormer, Mask2Former, OneFormer, EoMT of transformers), with logits per pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpkd_sdk.errors import no_network
from bpkd_sdk.models.spec import get_spec, set_spec

PREFIX = "transformers/"
ONEFORMER = "OneFormerForUniversalSegmentation"  # the network that also takes a text, "the task is semantic"

# Networks that classify masks; the value is whether the library resizes the masks to the image before their sigmoid.
# The others resize the scores.
MASK_CLASSIFIERS = {
    "MaskFormerForInstanceSegmentation": False,
    ONEFORMER: False,
    "Mask2FormerForUniversalSegmentation": True,
    "EomtForUniversalSegmentation": True,
    "EomtDinov3ForUniversalSegmentation": True,
}
_LEAST_SCORE = torch.finfo(torch.float32).tiny  # so that the logarithm of a score of 0 is finite


class MaskClassificationNetwork(nn.Module):
    """A network that classifies masks, as a network with logits per pixel.

    The network predicts Q masks, and classes with a "no object" class for each of them. By its authors' rule, which is
    `post_process_semantic_segmentation` in the library, the score of class c in a pixel is
    sum_q softmax(classes_q)[c] sigmoid(mask_q), without the "no object" class. The logits are the logarithms of these
    scores. So their softmax is each class's share of all scores, a temperature T gives shares of the scores to the
    power of 1 / T, and the logsumexp of several classes is the logarithm of their summed scores. The softmax of the
    scores themselves, which lie in 0..1 where one mask covers a pixel, would be almost uniform: with 150 classes, a
    score of 1 would become a probability of 0.018.

    Args:
        network: `MaskFormerForInstanceSegmentation`, `Mask2FormerForUniversalSegmentation`,
            `OneFormerForUniversalSegmentation` or `EomtForUniversalSegmentation`.
        task_inputs: Token ids (1, L) of the task, for OneFormer only:
            ``processor(images, task_inputs=["semantic"])["task_inputs"]``.

    Raises:
        TypeError: If the network is of another class.
        ValueError: If `task_inputs` is missing for OneFormer, or passed for another network.
    """

    def __init__(self, network: nn.Module, task_inputs: Tensor | None = None) -> None:
        super().__init__()
        kind = type(network).__name__
        if not classifies_masks(network):
            raise TypeError(f"Expected a network of {', '.join(MASK_CLASSIFIERS)}, but got {kind}.")
        if (kind == ONEFORMER) != (task_inputs is not None):
            raise ValueError(
                f"{kind} needs the tokens of its task. Open its folder with load_model('{PREFIX}<folder>'), or pass "
                "MaskClassificationNetwork(network, processor(images, task_inputs=['semantic'])['task_inputs'])."
                if kind == ONEFORMER
                else f"{kind} takes no `task_inputs`."
            )
        self.network = network
        self.resize_masks = MASK_CLASSIFIERS[kind]
        self.task_inputs: Tensor | None
        self.register_buffer("task_inputs", task_inputs, persistent=False)
        set_spec(self, get_spec(network))
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to logits (N, C, H, W): the logarithms of the scores."""
        if self.task_inputs is None:
            output = self.network(images)
        else:
            output = self.network(images, self.task_inputs.expand(images.shape[0], -1))
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]
        masks = output.masks_queries_logits.float()
        if self.resize_masks:
            masks = _resize(masks, images)
        scores = torch.einsum("nqc,nqhw->nchw", classes, masks.sigmoid())
        if not self.resize_masks:
            scores = _resize(scores, images)
        return scores.clamp(min=_LEAST_SCORE).log()


def _resize(maps: Tensor, images: Tensor) -> Tensor:
    return F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=False)


def fix_mask_probabilities(network: nn.Module) -> None:
    """Turn EoMT's buffer of probabilities into numbers, in place: it branches on them, which no trace can follow."""
    for module in network.modules():
        buffer = module._buffers.pop("attn_mask_probs", None)
        if buffer is not None:
            module.attn_mask_probs = buffer.tolist()  # type: ignore[assignment]  # torch declares tensors or modules


def classifies_masks(network: nn.Module) -> bool:
    """Return whether a module is a network of the library that classifies masks."""
    return type(network).__name__ in MASK_CLASSIFIERS and type(network).__module__.startswith("transformers.")


def adapt_network(network: nn.Module) -> nn.Module:
    """Return a module with logits per pixel: the module itself, or one around a network that classifies masks.

    Raises:
        TypeError: If the network is not a module.
    """
    if not isinstance(network, nn.Module):
        expected = "a torch module, as create_model(name, num_classes) builds and load_model(path) opens it"
        raise no_network(network, expected)
    return MaskClassificationNetwork(network) if classifies_masks(network) else network
