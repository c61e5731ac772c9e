"""Training parts of the CamVid study: the teacher, the tuning, the ablation, and the comparisons at equal budgets."""

import copy
import shutil
from dataclasses import asdict
from typing import Any

from rich.console import Console

import bpkd_sdk
from benchmarks.camvid.methods import CANDIDATES, READINGS
from benchmarks.camvid.setup import Study
from bpkd_sdk.comparison.run import RESULT_FILE, read_run
from bpkd_sdk.comparison.setup import BASELINE
from bpkd_sdk.data import FileDataset
from bpkd_sdk.losses import DistillationLoss

TEACHER_STEPS = 700
TUNING_STEPS = 100
ABLATION_STEPS = 150
BUDGETS = {"steps": 300, "seconds": 100}
SEEDS = 3

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


def train_teacher(study: Study) -> None:
    """Train the teacher."""
    result = bpkd_sdk.train(
        study.new_teacher(),
        study.open_data(),
        **TEACHER_RECIPE,
        steps=TEACHER_STEPS,
        output_dir=study.runs / "teacher",
        resume=True,
    )
    costs = {}
    for role, network in (("teacher", study.new_teacher()), ("student", study.new_student())):
        profile = bpkd_sdk.profile(network, input_size=(384, 480))
        costs[role] = {"params": profile.params, "macs_384x480": profile.macs}
    miou_by_step = {record["step"]: record["metrics"]["miou"] for record in result.history if "metrics" in record}
    scores = {"miou_by_step": miou_by_step, "metrics": result.metrics.to_dict()}
    study.save({"teacher": {"steps": TEACHER_STEPS} | costs | scores})


def tune(study: Study) -> None:
    """Train with every candidate, with one seed; the best candidate of each method has the highest mIoU."""
    candidates = {f"{method} {name}": loss for method, losses in CANDIDATES.items() for name, loss in losses.items()}
    compare(
        study, "tune", study.open_tuning_data(), candidates, seeds=1, steps=TUNING_STEPS, evaluate_every=TUNING_STEPS
    )
    records = study.records()
    miou = {name: records[f"tune/{name}/seed0"]["metrics"].get("miou", 0.0) for name in candidates}
    best = {
        method: max(losses, key=lambda name, method=method: miou[f"{method} {name}"])
        for method, losses in CANDIDATES.items()
    }
    study.save({"tune/best": best})


def ablate(study: Study) -> None:
    """Train with every reading of BPKD, with two seeds, on the data of the tuning."""
    data = study.open_tuning_data()
    compare(study, "ablation", data, READINGS, seeds=2, steps=ABLATION_STEPS, evaluate_every=ABLATION_STEPS)


def compare_at_equal(unit: str, study: Study) -> None:
    """Compare every method at its best, with equal steps or equal seconds.

    BPKD is also compared without its edge term, without its body term, and with its former default weights; CWD also
    with the weight of BPKD's body term, which was not among its candidates.
    """
    best = study.records()["tune/best"]
    methods = {method: CANDIDATES[method][best[method]] for method in CANDIDATES}
    methods["bpkd no edges"] = without_term("edge", methods["bpkd"])
    methods["bpkd no bodies"] = without_term("body", methods["bpkd"])
    methods["bpkd edge 10 body 5"] = CANDIDATES["bpkd"]["edge 10 body 5"]
    methods["cwd 2"] = READINGS["cwd 2"]
    budget = {unit: BUDGETS[unit]}
    compare(study, part_of(unit), study.open_data(), methods, seeds=SEEDS, **budget, evaluate_every=100)


def part_of(unit: str) -> str:
    """Return the name of the part with equal steps or equal seconds."""
    return f"{unit}-{BUDGETS[unit]}"


def without_term(term: str, method: DistillationLoss) -> DistillationLoss:
    method = copy.deepcopy(method)
    method.weights = {**method.weights, term: 0.0}
    return method


def compare(
    study: Study,
    part: str,
    data: tuple[FileDataset, FileDataset],
    methods: dict[str, DistillationLoss],
    *,
    seeds: int,
    **options: Any,
) -> None:
    """Run `bpkd_sdk.compare`, and save one record per finished run, also after an interrupt."""
    folder = study.runs / part
    try:
        comparison = bpkd_sdk.compare(
            study.load_teacher(),
            study.new_student,
            data,
            methods=methods,
            seeds=seeds,
            output_dir=folder,
            **STUDENT_RECIPE | options,
        )
    finally:
        folders = [folder / name / f"seed{seed}" for seed in range(seeds) for name in (BASELINE, *methods)]
        runs = [read_run(path) for path in folders if (path / RESULT_FILE).is_file()]
        study.save({f"{part}/{run.method}/seed{run.seed}": asdict(run) for run in runs})
    study.save({part: {"settings": comparison.settings, "teacher": comparison.teacher}})
    picture = study.output / "camvid" / f"{part}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "miou_over_time.png", picture)
    Console().print(comparison)
