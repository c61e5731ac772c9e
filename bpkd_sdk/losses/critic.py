"""The critic of SKDS and IFVD: a network that is trained to distinguish the student's logits from the teacher's.

`Adversary` trains its critic itself, so that the training loop does not need code for it. In training mode each call
first makes one step of the critic, on detached logits, and then scores the student's logits. Outside that step the
parameters of the critic do not require a gradient, which keeps them out of the student's optimiser. The moments of the
critic's Adam are buffers, which makes them part of the method's state.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from bpkd_sdk.errors import check_choice
from bpkd_sdk.losses.method import require_prepared
from bpkd_sdk.losses.tensors import mean_over_processes

CriticLoss = Literal["hinge", "wgan-gp"]

LEARNING_RATE, BETAS, EPSILON = 4e-4, (0.9, 0.99), 1e-8  # of IFVD's and CIRKD's code
PENALTY_WEIGHT = 10.0
MIN_SIDE = 4  # smallest height and width of the logits, in positions


def generator_loss(student_scores: Tensor) -> Tensor:
    """Compute the loss that the student minimises, for either loss of the critic: -mean D(S).

    This is equation (3) of docs/methods/skds.md.

    Args:
        student_scores: Scores of the student's logits, of any shape.

    Returns:
        Scalar, of either sign.

    Examples:
        >>> generator_loss(torch.tensor([0.5, 1.5])).item()
        -1.0
    """
    return -student_scores.mean()


def critic_loss(student_scores: Tensor, teacher_scores: Tensor, kind: CriticLoss) -> Tensor:
    """Compute the loss that the critic minimises, without the gradient penalty.

    "hinge" is mean max(0, 1 - D(T)) + mean max(0, 1 + D(S)), equation (4) of docs/methods/skds.md; "wgan-gp" is
    mean D(S) - mean D(T).

    Args:
        student_scores: Scores of the student's logits, of any shape.
        teacher_scores: Scores of the teacher's logits, of any shape.
        kind: Loss, "hinge" or "wgan-gp".

    Returns:
        Scalar.

    Examples:
        >>> critic_loss(torch.tensor([0.5]), torch.tensor([2.0]), "hinge").item()
        1.5
    """
    if kind == "hinge":
        return (1 - teacher_scores).relu().mean() + (1 + student_scores).relu().mean()
    return student_scores.mean() - teacher_scores.mean()


def gradient_penalty(critic: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Compute WGAN-GP's penalty: mean (|| dD(x) / dx || - 1)^2 at a random point x between each pair of logits.

    Args:
        critic: Module that maps (N, C, h, w) to scores.
        student: Logits (N, C, h, w).
        teacher: Logits (N, C, h, w).

    Returns:
        Scalar, 0 or above.

    Examples:
        >>> gradient_penalty(nn.Identity(), torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)).item()
        0.0
    """
    share = torch.rand(len(student), 1, 1, 1, device=student.device, dtype=student.dtype)
    between = torch.lerp(student, teacher, share).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).flatten(1).mean(1).sum(), between, create_graph=True)
    steepness: Tensor = torch.linalg.vector_norm(slope, dim=(1, 2, 3))
    return (steepness - 1).square().mean()


class Critic(nn.Module):
    """Network that maps logits (N, C, h, w) to scores (N, 1, h', w').

    The layers are batch norm, up to four convolutions of stride 2 with spectral norm and 64, 128, 256 and 512 channels,
    and a 4x4 convolution. The number of strided convolutions is the largest that leaves 4 positions per side.
    Self-attention follows the convolutions of 256 and 512 channels.

    Args:
        num_classes: C, the number of channels of the logits.
        side: The smaller one of h and w, 4 or above.
    """

    def __init__(self, num_classes: int, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm2d(num_classes)]
        channels = num_classes
        for width in (64, 128, 256, 512)[: int(math.log2(side / MIN_SIDE))]:
            layers += [spectral_norm(nn.Conv2d(channels, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.1)]
            if width >= 256:
                layers.append(CriticAttention(width))
            channels = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, MIN_SIDE))

    def forward(self, logits: Tensor) -> Tensor:
        """Score the logits; a higher score means more similar to the teacher's logits."""
        scores: Tensor = self.layers(logits)
        return scores


class CriticAttention(nn.Module):
    """Self-attention over all positions (Zhang et al., arXiv 1805.08318): x + gamma * attention(x); gamma starts at 0.

    Args:
        channels: Channels of x, 8 or above.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, channels // 8, 1)
        self.key = nn.Conv2d(channels, channels // 8, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, h, w) to the same shape."""
        query, key, value = (part(x).flatten(2) for part in (self.query, self.key, self.value))
        weights = (query.mT @ key).softmax(2)
        attended: Tensor = (value @ weights.mT).view_as(x)
        return x + self.gamma * attended


class Adversary(nn.Module):
    """A critic together with its optimiser; calling it trains the critic and returns the student's loss.

    Args:
        kind: Loss of the critic, "hinge" or "wgan-gp".

    Raises:
        ValueError: If `kind` is another value.
    """

    def __init__(self, kind: CriticLoss) -> None:
        super().__init__()
        check_choice("critic_loss", kind, get_args(CriticLoss))
        self.kind: CriticLoss = kind
        self.critic: Critic | None = None
        self.updates: Tensor
        self.mean: Tensor
        self.square: Tensor

    def build(self, logits: Tensor) -> None:
        """Build a new critic.

        Args:
            logits: Any logits (N, C, h, w) of the training size; only their shape and device are used.

        Raises:
            ValueError: If the logits are smaller than 4 x 4.
        """
        height, width = logits.shape[2:]
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"Expected logits of at least {MIN_SIDE} x {MIN_SIDE} for a critic, but got {height} x {width}. "
                "Increase crop_size, or set adversarial_weight=0."
            )
        self.critic = Critic(logits.shape[1], min(height, width)).to(logits.device).requires_grad_(False)
        size = sum(weight.numel() for weight in self.critic.parameters())
        self.register_buffer("updates", torch.zeros((), device=logits.device))
        self.register_buffer("mean", torch.zeros(size, device=logits.device))
        self.register_buffer("square", torch.zeros(size, device=logits.device))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Make one step of the critic if in training mode, then compute `generator_loss` of the student's logits.

        Args:
            student: Logits (N, C, h, w).
            teacher: Logits (N, C, h, w); they receive no gradient.
        """
        student, teacher = student.float(), teacher.float()
        critic = require_prepared(self.critic, self)
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
        update = self._adam(mean_over_processes(torch.cat([gradient.flatten() for gradient in gradients])))
        parts = torch.split(update, [weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.add_(part.view_as(weight))

    def _adam(self, gradient: Tensor) -> Tensor:
        """Compute Adam's update of the weights (Kingma and Ba, arXiv 1412.6980), all weights as one vector."""
        first, second = BETAS
        self.updates += 1
        self.mean.lerp_(gradient, 1 - first)
        self.square.lerp_(gradient.square(), 1 - second)
        mean = self.mean / (1 - first**self.updates)
        square = self.square / (1 - second**self.updates)
        return -LEARNING_RATE * mean / (square.sqrt() + EPSILON)
