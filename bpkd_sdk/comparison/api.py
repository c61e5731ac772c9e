"""`compare`: every method and the student alone, seed by seed under one budget, resumable run by run."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from bpkd_sdk.comparison.report import Comparison
from bpkd_sdk.comparison.run import (
    LOG_EVERY,
    RESULT_FILE,
    SCORES,
    Budget,
    ComparisonSetup,
    Methods,
    Run,
    Student,
    Teacher,
    named_methods,
    read_run,
    run_one,
    time_per_step,
)
from bpkd_sdk.data import SegmentationDataset, open_dataset
from bpkd_sdk.data.dataset import expect_dataset
from bpkd_sdk.errors import differences, import_optional, listed
from bpkd_sdk.evaluation import evaluate
from bpkd_sdk.files import read_json, write_json
from bpkd_sdk.losses import DistillationLoss
from bpkd_sdk.losses.method import describe
from bpkd_sdk.progress import console
from bpkd_sdk.runtime import Runtime, TorchRuntime
from bpkd_sdk.training.accelerator import create_accelerator
from bpkd_sdk.training.config import TrainingConfig
from bpkd_sdk.training.prepare import default_crop, student_order

LOCK_FILE = "lock"  # held by the process that is at work in its folder
SET_HERE = {"steps": "budget", "seed": "seeds"}  # options of a run, and what they follow from


def compare(
    teacher: Teacher,
    student: Student,
    data: str | Path | tuple[SegmentationDataset, SegmentationDataset],
    *,
    methods: Methods = "all",
    budget: str,
    seeds: int = 3,
    output_dir: str | Path = "runs/comparison",
    **options: Any,
) -> Comparison:
    """Distill one student by several methods, and train it alone, on equal terms.

    With one seed all methods start from the same weights of the student and see the same crops in the same order.
    Called again with the same arguments, it goes on where it was stopped; methods and seeds can be added. Called by
    several processes at the same time, each with a GPU or cores of its own, these share the runs.

    Args:
        teacher: A module in eval mode, its checkpoint, or an exported file that `distill` takes.
        student: A name that `create_model` knows, or a function from a number of classes to a module: built anew for
            each run, with random weights that follow from the seed. Or a module or a checkpoint that every run starts
            from.
        data: "shapes", a folder (see `open_dataset`), or a pair (train, val).
        methods: "all"; names, in a list or with commas between, where "bpkd+cwd" is both together; or a mapping from
            names of your own to methods as `distill` takes them: ``{"no edges": BPKDLoss(edge_weight=0)}``.
        budget: Of each run: "steps=300", or "seconds=600" of training, evaluation left out. For seconds every method
            is timed first, on this machine and in the real loop, and gets the steps that fit.
        seeds: Number of runs of each method; their seeds are 0, 1, ...
        output_dir: Everything goes here, see `Comparison`.
        **options: Fields of `TrainingConfig` for all runs alike, for example ``evaluate_every=50``.

    Raises:
        TypeError: For an unknown option.
        ValueError: For arguments out of their range, networks that do not fit the data, or a folder that holds runs of
            other settings; the differences are named.
        FileNotFoundError: If the teacher is not there.
        ImportError: Without matplotlib.
        KeyboardInterrupt: After Ctrl-C, once a checkpoint is written.
    """
    import_optional("matplotlib", "compare")
    if seeds < 1:
        raise ValueError(f"Expected `seeds` to be at least 1, but got {seeds}.")
    setup = _create_setup(teacher, student, data, Budget.parse(budget), options)
    chosen = named_methods(methods, setup.train.num_classes, setup.train.ignore_index)
    if options.get("check_data", True):
        setup.train.check_for_training()
        setup.val.check()
    student_order(setup.new_student(0), setup.train, TrainingConfig.from_options(options))
    if options.get("check_teacher", True):
        setup.check_teacher()
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    places = {(seed, name): folder / name / f"seed{seed}" for seed, name in product(range(seeds), chosen)}
    with FileLock(folder / LOCK_FILE):
        settings = _settle(folder / "settings.json", setup.settings())
        own = {name: _settle(folder / name / "method.json", describe(method)) for name, method in chosen.items()}
        comparison = Comparison(settings, _teacher_scores(setup, folder / "teacher.json"), [], folder)
    try:
        with FileLock(folder / LOCK_FILE):
            plans = {name: _plan(setup, name, method, folder) for name, method in chosen.items()}
        with closing(_claimed(places)) as claimed:
            for (seed, name), place in claimed:
                number = 1 + list(places).index((seed, name))
                title = f"Run {number} of {len(places)}: {name}, seed {seed}, {plans[name]['steps']} steps"
                console.print(title, highlight=False)
                facts = settings | {"method": own[name], "plan": plans[name]}
                run_one(setup, name, chosen[name], seed=seed, folder=place, settings=facts)
    except KeyboardInterrupt:
        finished = len(_finished(places))
        raise KeyboardInterrupt(
            f"{finished} of {len(places)} runs are finished in {folder}; the same call goes on with the rest"
        ) from None
    finally:
        comparison.runs.extend(_finished(places))
        if comparison.runs:
            comparison.write()
    return comparison


Places = Mapping[tuple[int, str], Path]  # the folder of each run, by seed and method


def _claimed(places: Places) -> Generator[tuple[tuple[int, str], Path]]:
    """The unfinished runs, each closed to other processes while it is done.

    What another process is doing comes last, and is waited for: it may have given up.
    """
    left = dict(places)
    for timeout in (0, -1):
        for run, place in list(left.items()):
            place.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(place / LOCK_FILE, timeout=timeout):
                    if not (place / RESULT_FILE).is_file():
                        yield run, place
            except Timeout:
                continue
            del left[run]


def _finished(places: Places) -> list[Run]:
    return [read_run(place) for place in places.values() if (place / RESULT_FILE).is_file()]


def _create_setup(
    teacher: Teacher,
    student: Student,
    data: str | Path | tuple[SegmentationDataset, SegmentationDataset],
    budget: Budget,
    options: dict[str, Any],
) -> ComparisonSetup:
    for option, argument in SET_HERE.items():
        if option in options:
            raise TypeError(f"`{option}` of the runs follows from `{argument}`; leave it out.")
    config = TrainingConfig.from_options(options)
    if config.labels == "teacher":
        raise ValueError("labels='teacher' leaves nothing to train the student alone with, which methods are held to.")
    if isinstance(teacher, (str, Path)) and not Path(teacher).is_file():
        raise FileNotFoundError(f"Expected `teacher` to be a trained module or its file, but there is no {teacher}.")
    accelerator = create_accelerator(config)
    if accelerator.num_processes > 1:
        raise ValueError("compare() times one process; start it without a launcher.")
    if isinstance(data, (str, Path)):
        data = open_dataset(data, split="train"), open_dataset(data, split="val")
    if not isinstance(data, tuple) or None in data:
        raise ValueError("Expected `data` to be a name, a folder, or a pair of training and validation data.")
    train, val = data
    for index, dataset in enumerate(data):
        expect_dataset(dataset, f"data[{index}]")
        dataset.check_classes()
    shared = {name: value for name, value in config.to_dict().items() if name not in SET_HERE}
    shared |= {"check_data": False, "check_teacher": False}  # both are checked once, before the first run
    setup = ComparisonSetup(teacher, student, train, val, budget, accelerator.device, shared)
    if config.crop_size is None:
        # One size for all: what suits the student alone may not suit the teacher.
        setup.options["crop_size"] = default_crop(train, [setup.new_student(0), setup.open_teacher()])
    return setup


def _settle(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write settings down, or hold them against those that were written before."""
    now: dict[str, Any] = json.loads(json.dumps(settings))
    if not path.is_file():
        write_json(path, now)
        return now
    if changed := differences(read_json(path), now):
        raise ValueError(
            f"{path.parent} holds runs of other settings, which cannot stand in one table with these:\n"
            f"{listed(changed)}\nPass the same settings, or another output_dir."
        )
    return now


def _teacher_scores(setup: ComparisonSetup, path: Path) -> dict[str, float]:
    if not path.is_file():
        width = setup.options["boundary_width"]
        guide = setup.open_teacher()
        scores = evaluate(
            guide if isinstance(guide, Runtime) else TorchRuntime(guide, setup.device, name="the teacher"),
            setup.val,
            boundary_width=width,
            device=setup.device,
            match_classes=setup.options["match_classes"],
        )
        write_json(path, scores.to_dict())
    scores = read_json(path)
    return {name: scores[name] for name in SCORES}


def _plan(setup: ComparisonSetup, name: str, method: DistillationLoss | None, folder: Path) -> dict[str, Any]:
    """Steps of each run of a method, once it is tried, and timed for a budget of seconds; what fails fails here."""
    path, budget = folder / name / "plan.json", setup.budget
    if not path.is_file():
        console.print(f"Trying {name}", highlight=False)
        if budget.unit == "steps":
            _trial(setup, method, 1)
            write_json(path, {"steps": int(budget.amount)})
        else:
            ms_per_step = time_per_step(lambda steps: _trial(setup, method, steps), budget.amount)
            write_json(path, {"steps": budget.steps(ms_per_step), "ms_per_step": ms_per_step})
    plan: dict[str, Any] = read_json(path)
    return plan


def _trial(setup: ComparisonSetup, method: DistillationLoss | None, steps: int) -> list[dict[str, Any]]:
    """The history of a short run without evaluation, which leaves nothing."""
    with TemporaryDirectory() as scratch:
        options = {"steps": steps, "log_every": LOG_EVERY, "evaluate_every": steps, "trackers": (), "seed": 0}
        return setup.fit(method, setup.new_student(0), None, Path(scratch), **options).history
