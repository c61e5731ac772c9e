"""The critic of SKDS and IFVD: a network that tells the student's score maps from the teacher's.

Its training is hidden from the loop: in training mode each call first makes one step of the critic, on detached maps,
and then scores the student's. So the critic's parameters require no gradient outside that step, which keeps them out
of the student's optimiser, and the moments of its own Adam are buffers, which puts them into the method's state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.method import Outputs, WeightedTerms, built, mean_over_processes

CriticLoss = Literal["hinge", "wgan-gp"]

LEARNING_RATE, BETAS, EPSILON = 4e-4, (0.9, 0.99), 1e-8  # IFVD's and CIRKD's
PENALTY_WEIGHT = 10.0
MIN_SIDE = 4


def generator_loss(student_scores: Tensor) -> Tensor:
    """What the student minimises, for either loss of the critic: -mean D(S).

    Args:
        student_scores: The critic's scores, any shape.

    Returns:
        Scalar, of either sign.
    """
    return -student_scores.mean()


def critic_loss(student_scores: Tensor, teacher_scores: Tensor, kind: CriticLoss) -> Tensor:
    """What the critic minimises, without the gradient penalty.

    "hinge": mean max(0, 1 - D(T)) + mean max(0, 1 + D(S)); "wgan-gp": mean D(S) - mean D(T).

    Args:
        student_scores: The critic's scores, any shape.
        teacher_scores: Any shape.
        kind: Which.

    Returns:
        Scalar.

    Example:
        >>> critic_loss(torch.tensor([0.5]), torch.tensor([2.0]), "hinge").item()
        1.5
    """
    if kind == "hinge":
        return (1 - teacher_scores).relu().mean() + (1 + student_scores).relu().mean()
    return student_scores.mean() - teacher_scores.mean()


def gradient_penalty(critic: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """WGAN-GP's penalty: mean (|| dD(x) / dx || - 1)^2 at a random point x between each two maps.

    Args:
        critic: Maps (N, C, h, w) -> scores.
        student: (N, C, h, w).
        teacher: (N, C, h, w).

    Returns:
        Scalar, 0 or above.
    """
    share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    between = torch.lerp(student, teacher, share).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).flatten(1).mean(1).sum(), between, create_graph=True)
    steepness: Tensor = torch.linalg.vector_norm(slope, dim=(1, 2, 3))
    return (steepness - 1).square().mean()


class Critic(nn.Module):
    """Score maps (N, C, h, w) -> scores (N, 1, h', w').

    Batch norm of the input, then up to four convolutions of stride 2 with spectral norm and 64, 128, 256 and 512
    channels, as many as leave 4 positions a side, self-attention after the last two of the four, and a 4x4 convolution.

    Args:
        num_classes: C.
        side: The smaller of h and w, 4 or above.
    """

    def __init__(self, num_classes: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(num_classes)]
        channels = num_classes
        for width in (64, 128, 256, 512)[: int(math.log2(side / MIN_SIDE))]:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
            if width >= 256:
                layers.append(SelfAttention(width))
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, MIN_SIDE))

    def forward(self, maps: Tensor) -> Tensor:
        """Higher where the maps look like the teacher's."""
        scores: Tensor = self.layers(maps)
        return scores


class SelfAttention(nn.Module):
    """x + gamma * attention over all positions (Zhang et al., arXiv 1805.08318); gamma starts at 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> the same shape."""
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        weights = (query.mT @ key).softmax(2)
        attended: Tensor = (value @ weights.mT).view_as(x)
        return x + self.gamma * attended


class Adversary(nn.Module):
    """A critic that trains itself: (student's maps, teacher's maps) -> the student's loss.

    Args:
        kind: Loss of the critic.

    Raises:
        ValueError: For another kind.
    """

    def __init__(self, kind: CriticLoss) -> None:
        super().__init__()
        check_choice("critic_loss", kind, get_args(CriticLoss))
        self.kind: CriticLoss = kind
        self.critic: Critic | None = None
        self.updates: Tensor
        self.mean: Tensor
        self.square: Tensor

    def build(self, maps: Tensor) -> None:
        """A new critic for maps (N, C, h, w) of training size; what they hold does not matter.

        Raises:
            ValueError: If the maps are smaller than 4 x 4.
        """
        height, width = maps.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"Expected logits of at least {MIN_SIDE} x {MIN_SIDE} for a critic, but got {height} x {width}. "
                "Take a larger crop_size, or a method with adversarial_weight=0."
            )
        self.critic = Critic(maps.shape[1], min(height, width)).to(maps.device).requires_grad_(False)
        size = sum(weight.numel() for weight in self.critic.parameters())
        self.register_buffer("updates", torch.zeros((), device=maps.device))
        self.register_buffer("mean", torch.zeros(size, device=maps.device))
        self.register_buffer("square", torch.zeros(size, device=maps.device))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One step of the critic if in training mode, then `generator_loss` of the student's maps (N, C, h, w)."""
        student, teacher = student.float(), teacher.float()
        critic = built(self.critic, self)
        if self.training:
            self._train(critic, student.detach(), teacher)
        return generator_loss(critic(student))

    @torch.enable_grad()
    def _train(self, critic: Critic, student: Tensor, teacher: Tensor) -> None:
        weights = list(critic.requires_grad_(True).parameters())
        loss = critic_loss(critic(student), critic(teacher), self.kind)
        if self.kind == "wgan-gp":
            loss = loss + PENALTY_WEIGHT * gradient_penalty(critic, student, teacher)
        gradients = torch.autograd.grad(loss, weights)
        critic.requires_grad_(False)
        change = self._adam(mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients])))
        parts = torch.split(change, [weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.add_(part.view_as(weight))

    def _adam(self, gradient: Tensor) -> Tensor:
        """What Adam adds to the weights (Kingma and Ba, arXiv 1412.6980), all of them as one vector."""
        first, second = BETAS
        self.updates += 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        mean = self.mean / (1 - first**self.updates)
        square = self.square / (1 - second**self.updates)
        return -LEARNING_RATE * mean / (square.sqrt() + EPSILON)


class AdversarialTerms(WeightedTerms):
    """A method with a critic, whose term is called "adversarial".

    Args:
        num_classes: As in `WeightedTerms`.
        ignore_index: Likewise.
        weights: Likewise; without one for "adversarial" no critic is built.
        critic_loss: Loss of the critic.

    Raises:
        ValueError: For another loss, and as `WeightedTerms`.
    """

    def __init__(
        self, num_classes: int | None, ignore_index: int, weights: Mapping[str, float], critic_loss: CriticLoss
    ) -> None:
        super().__init__(num_classes, ignore_index, weights)
        self.critic_loss: CriticLoss = critic_loss
        self.adversary = Adversary(critic_loss)

    def build(self, outputs: Outputs) -> None:
        """The critic; see `DistillationLoss.prepare`."""
        if self.weights["adversarial"]:
            self.adversary.build(outputs.logits[0])
