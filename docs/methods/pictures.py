"""Draw the pictures of these pages from two trained networks.

    bpkd quickstart quickstart
    python docs/methods/pictures.py quickstart

The networks are the teacher of the quickstart and its student that is trained alone. The scenes are from the validation
split of the `shapes` data. The losses of the package compute every map, position by position, or by their gradient.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor, nn

import bpkd_sdk
from bpkd_sdk import SegmentationOutput
from bpkd_sdk.boundary import edge_masks
from bpkd_sdk.data import ShapesDataset
from bpkd_sdk.features import Capture, feature_path
from bpkd_sdk.losses import BPKDLoss, CIRKDLoss
from bpkd_sdk.losses.dist import correlation
from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.ifvd import class_cosine
from bpkd_sdk.losses.method import OutputPair
from bpkd_sdk.losses.skds import unit_cells

HERE = Path(__file__).parent
SCENES = ShapesDataset("val")
FIRST, SECOND = 19, 63  # indices of the two scenes
ON_RING = (32, 69)  # row and column of a position in the first scene


@dataclass
class Panel:
    """One map of a picture.

    Attributes:
        title: Title above the map.
        content: (H, W, 3) uint8 colours, or (H, W) numbers.
        mark: Position (row, column) that is marked in the map, or None.
        lowest: Number at the lower end of the colour scale; None for the minimum.
        highest: Number at the upper end of the colour scale; None for the maximum.
        rows: Labels of the rows.
    """

    title: str
    content: Tensor
    mark: tuple[float, float] | None = None
    lowest: float | None = None
    highest: float | None = None
    rows: tuple[str, ...] = ()


class Networks:
    """The included teacher, and the student of a quickstart folder that is trained alone."""

    def __init__(self, folder: Path) -> None:
        self.student, self.teacher = (
            bpkd_sdk.load_model(source) for source in (folder / "student_alone", "shapes-teacher")
        )

    def outputs(self, images: Tensor) -> tuple[SegmentationOutput, SegmentationOutput]:
        """Return the outputs of student and teacher for images (N, 3, H, W) uint8."""
        student, teacher = (run(network, images) for network in (self.student, self.teacher))
        return student, teacher


@torch.no_grad()
def run(network: nn.Module, images: Tensor) -> SegmentationOutput:
    """Return the logits and the last feature map of a network, resized to the images: a student has a quarter."""
    with Capture(network, [feature_path(network)]) as capture:
        logits, features = network(network.spec.normalize(images)), capture.take()
    resize = partial(F.interpolate, size=images.shape[2:], mode="bilinear", align_corners=False)
    return SegmentationOutput(resize(logits), {path: resize(content) for path, content in features.items()})


def scene(index: int) -> tuple[Tensor, Tensor]:
    """Return image (1, 3, H, W) and labels (1, H, W) of a scene, both uint8."""
    image, labels = SCENES[index]
    return image.unsqueeze(0), labels.unsqueeze(0)


def picture(image: Tensor) -> Tensor:
    """Convert an image (1, 3, H, W) to (H, W, 3)."""
    return image[0].permute(1, 2, 0)


def feature(output: SegmentationOutput) -> Tensor:
    """Return the only feature map of an output."""
    return next(iter(output.features.values()))


def bpkd(networks: Networks) -> list[Panel]:
    """Draw the trimap, and the size of the gradient of each of the two terms."""
    image, labels = scene(FIRST)
    student, teacher = networks.outputs(image)
    logits = student.logits.requires_grad_()
    terms = BPKDLoss()(logits, teacher.logits, labels)
    pull = {name: torch.autograd.grad(term, logits)[0].abs().sum(1)[0] for name, term in terms.items()}
    pull = {name: size / size.quantile(0.998) for name, size in pull.items()}
    masks = edge_masks(labels, SCENES.num_classes, (logits.shape[2], logits.shape[3]))[0]
    return [
        Panel("image", picture(image)),
        Panel("trimap: edges of all classes", masks.amax(0)),
        Panel("edges of 'pole'", masks[SCENES.class_names.index("pole")]),
        Panel("edge term: its gradient", pull["edge"], highest=1),
        Panel("body term: its gradient", pull["body"], highest=1),
    ]


def cwd(networks: Networks) -> list[Panel]:
    """Draw the spatial distributions of two classes, relative to the uniform distribution."""
    image, _ = scene(FIRST)
    student, teacher = networks.outputs(image)
    panels = [Panel("image", picture(image))]
    for name in ("ring", "pole"):
        for role, output in (("teacher", teacher), ("student", student)):
            logits = output.logits[0, SCENES.class_names.index(name)]
            share = logits.flatten().log_softmax(0).view_as(logits) + torch.tensor(logits.numel()).log()
            panels.append(Panel(f"{role}: '{name}', log$_{{10}}$", share / torch.tensor(10.0).log(), None, -2, 1.5))
    return panels


def skds(networks: Networks) -> list[Panel]:
    """Draw the similarities of one cell to all others, and the error of the student's."""
    image, _ = scene(FIRST)
    maps = [feature(output) for output in networks.outputs(image)]
    cells = [unit_cells(features, pool=2)[0] for features in maps]
    student, teacher = (rows @ rows.T for rows in cells)
    side = maps[0].shape[2] // 2
    row, column = (side // 2 for side in ON_RING)
    cell = row * side + column
    error = (student - teacher).square().mean(1)
    return [
        Panel("image, and one cell", picture(image), ON_RING),
        Panel("teacher: similarity to the cell", teacher[cell].view(side, side), (row, column), 0, 1),
        Panel("student: similarity to the cell", student[cell].view(side, side), (row, column), 0, 1),
        Panel("squared difference, mean over all cells", error.view(side, side)),
    ]


def ifvd(networks: Networks) -> list[Panel]:
    """Draw the cosine of each position's feature with the mean of its class."""
    image, labels = scene(FIRST)
    outputs = networks.outputs(image)
    members = F.one_hot(labels.flatten(1).long(), SCENES.num_classes).mT.float()
    student, teacher = (class_cosine(feature(output).flatten(2), members).view(labels[0].shape) for output in outputs)
    return [
        Panel("image", picture(image)),
        Panel("teacher: cosine with own class's mean", teacher, None, 0, 1),
        Panel("student: cosine with own class's mean", student, None, 0, 1),
        Panel("squared difference", (student - teacher).square()),
    ]


def cirkd(networks: Networks) -> list[Panel]:
    """Draw the similarities of one position to another image and to the memory."""
    torch.manual_seed(0)
    image, other = scene(FIRST)[0], scene(SECOND)[0]
    panels = [Panel("image, and one position", picture(image), ON_RING), Panel("another image", picture(other))]
    pairs = zip(networks.outputs(image), networks.outputs(other), strict=True)
    for role, (own, others) in reversed(list(zip(("student", "teacher"), pairs, strict=True))):
        position = F.normalize(feature(own)[0, :, *ON_RING], dim=0)
        cosine = torch.einsum("d,dhw->hw", position, F.normalize(feature(others)[0], dim=0))
        panels.append(Panel(f"{role}: similarity to the position", cosine, None, 0, 1))
    memory = filled_memory(networks)
    position = F.normalize(feature(networks.outputs(image)[1])[0, :, *ON_RING], dim=0)
    panels.append(Panel("teacher: similarity to the memory", memory @ position, None, 0, 1, SCENES.class_names))
    return panels


def filled_memory(networks: Networks, batches: int = 8, shown: int = 64) -> Tensor:
    """Return the memory of positions (C, shown, D) after some batches of training scenes."""
    scenes = ShapesDataset("train")
    method = CIRKDLoss(kd_weight=0, minibatch_weight=0, region_weight=0, pixel_queue=shown * SCENES.num_classes)
    for begin in range(0, 8 * batches, 8):
        images, labels = (torch.stack(part) for part in zip(*(scenes[begin + i] for i in range(8)), strict=True))
        outputs = networks.outputs(images)
        if begin == 0:
            method.prepare(*outputs)
        method(*outputs, labels)
    return method.pixels.entries


def canonical(networks: Networks) -> list[Panel]:
    """Draw both terms, position by position."""
    image, _ = scene(FIRST)
    student, teacher = networks.outputs(image)
    f_student, f_teacher = feature(student), feature(teacher)
    best = torch.linalg.lstsq(f_student[0].flatten(1).T, f_teacher[0].flatten(1).T).solution.T[:, :, None, None]
    logits = (output.logits.flatten(2) for output in (student, teacher))
    divergence = softmax_kl(*logits, dim=1).view(image.shape[2:])
    distance = (F.conv2d(f_student, best) - f_teacher)[0].square().mean(0)
    predictions = [torch.tensor(SCENES.palette)[output.logits[0].argmax(0)] for output in (teacher, student)]
    return [
        Panel("image", picture(image)),
        Panel("teacher", predictions[0]),
        Panel("student", predictions[1]),
        Panel("logits: KL", divergence, highest=divergence.quantile(0.995).item()),
        Panel("features: squared error", distance, highest=distance.quantile(0.995).item()),
    ]


def dist(networks: Networks) -> list[Panel]:
    """Draw both distances, position by position and class by class."""
    image, _ = scene(FIRST)
    logits = OutputPair(*networks.outputs(image)).logits
    student, teacher = (z.softmax(1) for z in logits)
    positions = 1 - correlation(student, teacher, (1,))[0]
    classes = 1 - correlation(student, teacher, (0, 2, 3))
    predictions = [torch.tensor(SCENES.palette)[z[0].argmax(0)] for z in reversed(logits)]
    return [
        Panel("image", picture(image)),
        Panel("teacher", predictions[0]),
        Panel("student", predictions[1]),
        Panel("inter: 1 - correlation over classes", positions, None, 0, 1),
        Panel("intra: 1 - correlation over positions", classes[:, None], None, 0, 1, SCENES.class_names),
    ]


def draw(panels: list[Panel], path: Path) -> None:
    """Draw the panels side by side, as a PNG of 256 colours, which halves the size of the file."""
    figure, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 2.9), layout="constrained", dpi=105)
    for axis, panel in zip(axes, panels, strict=True):
        shown = axis.imshow(
            panel.content, cmap="magma", vmin=panel.lowest, vmax=panel.highest, interpolation="nearest", aspect="auto"
        )
        axis.set_title(panel.title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks(range(len(panel.rows)), panel.rows, fontsize=8)
        axis.set_box_aspect(1)
        if panel.mark:
            axis.plot(panel.mark[1], panel.mark[0], "o", markersize=7, markerfacecolor="none", color="white")
            axis.plot(panel.mark[1], panel.mark[0], "o", markersize=9, markerfacecolor="none", color="black")
        if panel.content.ndim == 2:
            bar = figure.colorbar(shown, ax=axis, orientation="horizontal", shrink=0.9, pad=0.03)
            bar.ax.tick_params(labelsize=7)
            bar.locator = MaxNLocator(4)
    figure.savefig(path)
    plt.close(figure)
    full = Image.open(path).convert("RGB")
    colours = full.quantize(method=Image.Quantize.MAXCOVERAGE)
    full.quantize(palette=colours, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def main(folder: Path) -> None:
    """Draw all pictures, in the folder of this file."""
    networks = Networks(folder)
    for panels in (bpkd, cwd, skds, ifvd, cirkd, canonical, dist):
        path = HERE / f"{panels.__name__}.png"
        draw(panels(networks), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
