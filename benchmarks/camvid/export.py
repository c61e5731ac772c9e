"""Export part of the CamVid study: the best student in every format, in accuracy and in latency."""

import json

import bpkd_sdk
from benchmarks.camvid.setup import Study
from benchmarks.camvid.training import part_of
from bpkd_sdk.comparison.run import read_run
from bpkd_sdk.export import benchmark, quantize, to_onnx

INPUT_SIZE = (360, 480)


def export(study: Study) -> None:
    """Export the best student of the comparison at equal steps, and measure it beside its teacher."""
    train, val = study.open_data()
    folders = [folder for folders in study.finished_runs(part_of("steps")).values() for folder in folders]
    folder = max(folders, key=lambda folder: read_run(folder).metrics["miou"])
    best, student = read_run(folder), study.load_student(folder)
    paths = {precision: folder / f"{precision}.onnx" for precision in ("fp32", "fp16", "int8")}
    to_onnx(student, paths["fp32"], input_size=INPUT_SIZE)
    to_onnx(student, paths["fp16"], input_size=INPUT_SIZE, precision="fp16")
    quantization = quantize(paths["fp32"], paths["int8"], train).to_dict() | {"path": paths["int8"].name}
    artifacts = {"teacher, torch": study.load_teacher(), "student, torch": student}
    artifacts |= {f"student, ONNX {precision.upper()}": path for precision, path in paths.items()}
    measured = benchmark(list(artifacts.values()), input_size=INPUT_SIZE)
    record = {
        "method": best.method,
        "seed": best.seed,
        "quantization": quantization,
        "metrics": {name: bpkd_sdk.evaluate(artifact, val).to_dict() for name, artifact in artifacts.items()},
        "benchmark": json.loads(measured.to_json()),
    }
    study.save({"export": record})
