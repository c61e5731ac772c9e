"""Parts of the study that train, with all of its budgets."""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock

import bpkd_sdk
from benchmarks.study import methods
from benchmarks.study.methods import LIKE_KD, SECOND, TUNED, WEIGHTS, edge_forms, method_name, named
from benchmarks.study.scores import mean, measure_edge_widths
from benchmarks.study.setup import Study
from bpkd_sdk.comparison.api import LOCK_FILE
from bpkd_sdk.comparison.run import RESULT_FILE, read_run
from bpkd_sdk.comparison.setup import BASELINE, step_times
from bpkd_sdk.files import read_json, write_json
from bpkd_sdk.losses import Composition, DistillationLoss

TEACHER_STEPS = 3000
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
CURVE_STEPS = (300, 1000, 3000, 9000)
MAIN_STEPS = 3000  # steps of each run in the factorial, among the edge forms, and among the methods
TUNING_STEPS = MAIN_STEPS // 4
TUNING_SEEDS, CURVE_SEEDS, METHOD_SEEDS, LITE0_SEEDS = 2, 3, 3, 2
SECONDS = 120
LITE0_STEPS, LITE0_RATE = 2000, 6e-4
LOUDNESS_STEPS = 20

PLATEAU_FROM = 0.8  # share of the steps after which a converged run moves less than the plateau rule allows
PROCESSES = 2  # that are expected to share the runs, in the estimates
TRIAL_STEPS, TRIAL_LOG = 20, 5

RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "gradient_clip": 10.0,
    "channels_last": True,
    "precision": "fp32",
    "device": "cpu",
    "check_data": False,
    "check_teacher": False,
}
TEACHER_VIEWS = ("flip", 0.75, 1.25)
TEACHER_RECIPE: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 6e-4,
    "gradient_clip": 10.0,
    "scale": (0.75, 1.5),
    "channels_last": True,
    "batch_size": 4,
    "crop_size": (352, 480),  # whole images, to a multiple of 32
    "precision": "bf16",
    "evaluate_every": 300,
    "checkpoint_every": 50,
    "log_every": 10,
    "seed": 0,
}

Methods = Mapping[str, DistillationLoss]


@dataclass(frozen=True)
class Job:
    """Runs of some methods in one folder, whose runs have one budget.

    Attributes:
        folder: Name of the folder.
        methods: Methods by name; the student alone is always one of them.
        seeds: Runs of each method.
        steps: Steps of each run.
        seconds: Seconds of each run instead of steps.
        rate: Learning rate; None: the tuned one.
        tuning: Whether the data are those of the tuning.
        student: "dense" or "lite0".
        cached: Whether the teacher's cache is used; otherwise the teacher runs at every step, with one view.
    """

    folder: str
    methods: Methods
    seeds: int
    steps: int | None = None
    seconds: int | None = None
    rate: float | None = None
    tuning: bool = False
    student: str = "dense"
    cached: bool = True


def train_teacher(study: Study) -> None:
    """Train CamVid's teacher; that of shapes is in the package."""
    steps, history = 0, []
    if study.name == "camvid":
        steps = study.share(TEACHER_STEPS, least=2)
        torch.manual_seed(0)
        splits = study.open_files() if study.fraction == 1 else study.open_data()
        network, folder = study.new_teacher(), study.teacher_folder
        result = bpkd_sdk.train(network, splits, **TEACHER_RECIPE, steps=steps, output_dir=folder, resume=True)
        network, history = result.model, result.history
    else:
        network = bpkd_sdk.load_model("shapes-teacher").float()
    _, val = study.open_data()
    scores = bpkd_sdk.evaluate(network, val)
    macs = bpkd_sdk.profile(network, input_size=study.world.crop_size).macs
    curve = {record["step"]: record["metrics"]["miou"] for record in history if "metrics" in record}
    with TemporaryDirectory() as scratch:
        widths = measure_edge_widths(Path(scratch), network, val, (3,))
    record = {"steps": steps, "macs": macs, "miou_by_step": curve, "metrics": scores.to_dict(), "edge_widths": widths}
    study.save({"teacher": record})


def teach(study: Study) -> None:
    """Write the teacher's cache for the training images, and for those of the tuning."""
    teacher = study.load_teacher()
    caches = {False: study.world.views, True: study.world.tuning_views}
    for tuning, views in caches.items():
        if views is None:
            continue
        train, _ = study.open_data(tuning=tuning)
        start, folder = time.monotonic(), study.cache(tuning=tuning)
        was_there = (folder / "cache.json").is_file()
        bpkd_sdk.teach(
            teacher,
            train,
            folder,
            transform=study.world.transform,
            views=views,
            features=True,
            crop_size=study.world.crop_size,
            scale=study.world.scale,
            batch_size=study.world.batch_size,
            teacher_augment=TEACHER_VIEWS,
            precision="fp32",
            device="cpu",
            channels_last=True,
            check_teacher=False,
            check_data=False,
        )
        if not was_there:  # not resumed, so that the time is that of all views
            seconds = time.monotonic() - start
            study.save({f"cache/{folder.name}": {"seconds": seconds, "images": len(train), "views": views}})


def tune_rate(study: Study) -> None:
    """Choose the learning rate: the highest mean mIoU of the student alone."""
    steps = study.share(TUNING_STEPS)
    jobs = [Job(f"rate-{rate:g}", {}, TUNING_SEEDS, steps, rate=rate, tuning=True) for rate in RATES]
    run(study, "rate", jobs)
    scores = {job.rate: mean_miou(study, job.folder, BASELINE) for job in jobs}
    study.save({"rate": {"learning_rate": max(scores, key=scores.__getitem__), "miou": scores}})


def tune(study: Study) -> None:
    """Choose the weight of every term: the highest mean mIoU. Second terms are tuned with the best first ones."""
    candidates = [{term: weight} for term in TUNED for weight in WEIGHTS]
    job = Job("tune", named(*candidates), TUNING_SEEDS, study.share(TUNING_STEPS), tuning=True)
    run(study, "tune, first terms", [job])
    best = {term: _best(study, [{term: weight} for weight in WEIGHTS]) for term in TUNED}
    best |= {name: {name: best["kd"]["kd"]} for name in LIKE_KD}
    seconds = {
        name: [{**best[first], second: weight} for weight in WEIGHTS] for name, (first, second) in SECOND.items()
    }
    job = Job(job.folder, named(*chain.from_iterable(seconds.values())), TUNING_SEEDS, job.steps, tuning=True)
    run(study, "tune, second terms", [job])
    study.save({"tune": {**best, **{name: _best(study, choices) for name, choices in seconds.items()}}})


def _best(study: Study, choices: Sequence[dict[str, float]]) -> dict[str, float]:
    return max(choices, key=lambda weights: mean_miou(study, "tune", method_name(weights)))


def mean_miou(study: Study, folder: str, method: str) -> float:
    """Return the mean mIoU over seeds; 0 for a run that failed."""
    prefix = f"{study.name}/{folder}/{method}/seed"
    return mean(run["metrics"].get("miou", 0.0) for key, run in study.records().items() if key.startswith(prefix))


def curve(study: Study) -> None:
    """Train {alone, CWD, BPKD, KD + CWD} with each budget."""
    best = study.record("tune")
    chosen = named(best["cwd"], best["bpkd"], best["kd+cwd"])
    run(study, "curve", [main_job(study, chosen, CURVE_SEEDS, steps) for steps in CURVE_STEPS])


def factorial(study: Study) -> None:
    """Train {pixel KD} x {body} x {edge}."""
    cells = named(*(cell for cell in factorial_cells(study.record("tune")) if cell))
    run(study, "factorial", [main_job(study, cells, study.world.seeds)])


def factorial_cells(best: Mapping[str, Mapping[str, float]]) -> list[dict[str, float]]:
    """Return the weights of the eight cells; those of the first are empty: the student alone."""
    weights = {**best["kd"], **best["bpkd"]}
    return [
        {term: weights[term] for term, is_on in zip(("kd", "body", "edge"), cell, strict=True) if is_on}
        for cell in product((False, True), repeat=3)
    ]


def edges(study: Study) -> None:
    """Train with each form of the edge term at equal loudness, and with the body term only."""
    best = study.record("tune")["bpkd"]
    chosen = edge_forms(best, _loudness(study)) | named({"body": best["body"]})
    run(study, "edges", [main_job(study, chosen, METHOD_SEEDS)])


def _loudness(study: Study) -> dict[str, float]:
    """Measure the mean edge term of each form, with weight 1, over the same batches at the start of training."""
    with FileLock(study.runs / study.name / "loudness.lock"):
        if f"{study.name}/loudness" not in study.records():
            small = 1e-6  # so that the labels alone train the student
            forms = [create_form(small, 0) for create_form in methods.EDGE_FORMS.values()]
            job = main_job(study, {}, 1)
            terms = try_run(study, job, Composition(forms), steps=LOUDNESS_STEPS, log_every=LOUDNESS_STEPS)[0]["terms"]
            sizes = [term / small for name, term in terms.items() if name.endswith("/edge")]
            study.save({"loudness": dict(zip(methods.EDGE_FORMS, sizes, strict=True))})
    return study.record("loudness")


def compare_methods(study: Study) -> None:
    """Train with every method at its tuned weight; those of primary questions with the seeds of the factorial."""
    best = study.record("tune")
    primary = named(best["bpkd"], best["cwd"], best["kd"], best["dist"])
    others = named(*(best[name] for name in ("skds", "ifvd", "cirkd", "canonical", "kd+cwd")))
    jobs = [main_job(study, primary, study.world.seeds), main_job(study, primary | others, METHOD_SEEDS)]
    run(study, "methods", jobs)


def compare_seconds(study: Study) -> None:
    """Train for equal seconds, with the teacher's time in them, and with the cache."""
    best = study.record("tune")
    chosen = named(best["cwd"], best["bpkd"], best["kd"], best["dist"])
    seconds = study.share(SECONDS, least=2)
    jobs = [
        Job(f"seconds-{name}", chosen, METHOD_SEEDS, seconds=seconds, cached=cached)
        for name, cached in (("teacher", False), ("cache", True))
    ]
    run(study, "seconds", jobs)


def train_lite0(study: Study) -> None:
    """Train the second student, on CamVid only, with the weights that were tuned for the first."""
    if study.name != "camvid":
        print("lite0: only in the world camvid.")
        return
    best = study.record("tune")
    chosen, steps = named(best["cwd"], best["bpkd"]), study.share(LITE0_STEPS)
    run(study, "lite0", [Job("lite0", chosen, LITE0_SEEDS, steps, rate=LITE0_RATE, student="lite0")])


def main_job(study: Study, chosen: Methods, seeds: int, steps: int = MAIN_STEPS) -> Job:
    """Return runs of the dense student on all data; the runs of one budget are shared by the parts."""
    return Job(f"steps-{steps}", chosen, seeds, study.share(steps))


def run(study: Study, part: str, jobs: Sequence[Job]) -> None:
    """Print the hours that the jobs take, run them, and save one record per finished run, also after an interrupt."""
    print(f"{study.name}, {part}: about {estimate(study, jobs):.2f} hours with {PROCESSES} processes", flush=True)
    for job in jobs:
        budget = {"steps": job.steps} if job.steps else {"seconds": job.seconds}
        folder = study.runs / study.name / job.folder
        options = options_of(study, job)
        # Evaluated where the plateau rule looks, and at the end. The tuning and runs of equal seconds only at the end.
        is_judged = job.steps is not None and not job.tuning
        options["evaluate_every"] = max(1, int(PLATEAU_FROM * job.steps)) if is_judged else 10**9
        try:
            bpkd_sdk.compare(
                study.load_teacher(),
                study.student(job.student),
                study.open_data(tuning=job.tuning),
                methods=dict(job.methods),
                seeds=job.seeds,
                output_dir=folder,
                **budget,
                **options,
            )
        finally:
            save_runs(study, job, folder)


def options_of(study: Study, job: Job) -> dict[str, Any]:
    """Return the options that all runs of a job share."""
    world = study.world
    options = RECIPE | {
        "batch_size": world.batch_size,
        "crop_size": world.crop_size,
        "scale": world.scale,
        "transform": world.transform,
        "learning_rate": job.rate or study.record("rate")["learning_rate"],
    }
    if job.cached:
        options |= {"teacher_cache": str(study.cache(tuning=job.tuning)), "teacher_augment": TEACHER_VIEWS}
    return options


def save_runs(study: Study, job: Job, folder: Path) -> None:
    """Save the finished runs of a job, with the accuracy in the band of 3 pixels."""
    _, val = study.open_data(tuning=job.tuning)
    new_student, records = study.student(job.student), {}
    finished = [
        path
        for name, seed in product((BASELINE, *job.methods), range(job.seeds))
        if ((path := folder / name / f"seed{seed}") / RESULT_FILE).is_file()
    ]
    for path in finished:
        run, widths = read_run(path), {}
        if run.error is None:
            with FileLock(path / LOCK_FILE):  # another process may measure the same run
                student = bpkd_sdk.load_model(path / "last.safetensors", model=new_student(val.num_classes))
                widths = measure_edge_widths(path, student, val, (3,))
        record = asdict(run)
        settings = record.pop("settings")
        record |= {"arguments": settings["method"], "edge_widths": widths}
        records[f"{job.folder}/{run.method}/seed{run.seed}"] = record
    study.save(records)


def estimate(study: Study, jobs: Sequence[Job]) -> float:
    """Estimate the hours of the runs that are not finished, from short trials on this machine."""
    seconds, counted = 0.0, set[Path]()
    for job in jobs:
        for name, method in {BASELINE: None, **job.methods}.items():
            folders = {study.runs / study.name / job.folder / name / f"seed{seed}" for seed in range(job.seeds)}
            missing = {path for path in folders - counted if not (path / RESULT_FILE).is_file()}
            counted |= missing
            if missing:
                costs = _costs(study, job, method)
                training = job.seconds or (job.steps or 0) * costs["ms_per_step"] / 1000
                # Each run is scored four times: twice within it, for the counts of each image, and for the 3 px band.
                seconds += len(missing) * (training + 4 * costs["evaluation"])
    return seconds / 3600 / PROCESSES


def _costs(study: Study, job: Job, method: DistillationLoss | None) -> dict[str, float]:
    """Return the milliseconds of a step and the seconds of an evaluation; measured once for each kind of method."""
    kind = f"{job.student} {BASELINE if method is None else method.name}"
    if method is not None and not job.cached:
        kind += " with the teacher"
    path = study.runs / study.name / "costs.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        costs = read_json(path) if path.is_file() else {}
        if kind not in costs:
            times = step_times(try_run(study, job, method, steps=TRIAL_STEPS, log_every=TRIAL_LOG))
            costs[kind] = {"ms_per_step": min(times)}
            _, val = study.open_data(tuning=job.tuning)
            start = time.monotonic()
            bpkd_sdk.evaluate(study.student(job.student)(val.num_classes), val)
            costs[kind]["evaluation"] = time.monotonic() - start
            write_json(path, costs)
    return costs[kind]


def try_run(study: Study, job: Job, method: DistillationLoss | None, *, steps: int, log_every: int) -> list[Any]:
    """Train for a few steps in a temporary folder, and return the history."""
    train, _ = study.open_data(tuning=job.tuning)
    student, options = study.student(job.student)(train.num_classes), options_of(study, job)
    options |= {"steps": steps, "log_every": log_every, "evaluate_every": steps}
    with TemporaryDirectory() as scratch:
        if method is None:
            options = {name: value for name, value in options.items() if not name.startswith(("teacher", "check_t"))}
            return bpkd_sdk.train(student, (train, None), output_dir=scratch, **options).history
        teacher = study.load_teacher()
        return bpkd_sdk.distill(
            teacher, student, (train, None), method=copy.deepcopy(method), output_dir=scratch, **options
        ).history
