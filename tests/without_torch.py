"""Runs everything that needs no torch, in a process that cannot import it: python without_torch.py student.onnx image.png.

The ONNX file returns logits of at least two named classes, and takes images of the size of the image. Needed are the
base packages of bpkd-sdk, the extra [serve] and httpx.
"""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ABSENT = (
    "accelerate", "matplotlib", "onnx", "onnxscript", "onnxslim", "safetensors", "scipy", "segmentation_models_pytorch",
    "tensorrt", "tensorrt_rtx", "timm", "torch", "torchvision", "transformers",
)  # fmt: skip

FINDER = f"""
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
"""

# Public names that need no torch; all others must state what to install.
NAMES = {
    "bpkd_sdk": {"NetworkSpec", "Metrics", "Prediction", "Predictor", "TrainingConfig", "benchmark", "to_web"},
    "bpkd_sdk.data": {"Pair", "pair_files"},
    "bpkd_sdk.evaluation": {"MetricCounts", "Metrics"},
    "bpkd_sdk.export": {"BenchmarkReport", "BenchmarkRow", "WebReport", "benchmark", "to_web"},
    "bpkd_sdk.runtime": {
        "AcceptedImages", "FORMATS", "Format", "MatchedRuntime", "Runtime", "find_format", "match_runtime",
        "open_runtime",
    },
    "bpkd_sdk.serve": {
        "Prediction", "Predictor", "Timings", "annotate_video", "build_demo", "create_app", "draw_difference",
        "draw_overlay", "find_files", "label_boundaries", "open_models", "read_image", "read_video", "segment_files",
    },
}  # fmt: skip

# Arguments of each command that needs torch. {file} is the ONNX file.
COMMANDS = {
    "quickstart": "folder",
    "train": "pspnet_r18",
    "distill": "teacher.safetensors pspnet_r18",
    "teach": "teacher.safetensors cache",
    "compare": "--teacher teacher.safetensors --student pspnet_r18 --steps 1",
    "evaluate": "{file} --data shapes",
    "profile": "pspnet_r18",
    "inspect": "pspnet_r18",
    "models": "",
    "import": "official.pth student.safetensors",
    "export": "{file} student.engine",
    "share": "student.safetensors folder --input-size 64x64 --license mit",
    "triton": "{file} repository",
    "data check": "folder",
    "data convert": "folder other",
    "reproduce": "cityscapes/pspnet_r18 --dry-run",
    "benchmark": "{file} --data shapes",
}
# Arguments with a path that does not exist, which is found before a package is missing.
MISSING = (
    "train pspnet_r18 --data nowhere",
    "train runs/nowhere.safetensors",
    "train pspnet_r18 --data cityscapes --root nowhere",
    "distill nowhere.safetensors pspnet_r18",
    "distill teacher.safetensors runs/nowhere",
    "teach nowhere.safetensors cache",
    "compare --teacher nowhere --student pspnet_r18 --steps 1",
    "evaluate nowhere.onnx",
    "evaluate {file} --data nowhere",
    "evaluate {file} --data folder --class-map nowhere.json",
    "profile nowhere.safetensors",
    "inspect runs/nowhere",
    "import nowhere.pth student.safetensors",
    "export nowhere student.onnx",
    "export {file} student.engine --data nowhere",
    "benchmark {file} nowhere.onnx",
    "serve nowhere.onnx",
    "serve {file} --teacher nowhere",
    "predict nowhere.onnx folder --output masks",
    "predict {file} nowhere --output masks",
    "share nowhere folder --input-size 64x64 --license mit",
    "triton nowhere.onnx repository",
    "data check nowhere",
    "data convert nowhere other",
    "reproduce cityscapes/pspnet_r18 --root nowhere",
)
# Arguments whose error needs only the files, and a part of that error. "run" is the folder of a run.
EARLY = {
    "train pspnet_r18 --output run": "run contains a run already. Pass --resume",
    "distill shapes-teacher pspnet_r18 --output run": "run contains a run already. Pass --resume",
    "reproduce cityscapes/pspnet_r18 --output run": "run contains a run already. Pass --resume",
    "evaluate run": "run was trained on 'my_data/train', whose folder is not known. Pass --data",
    "evaluate {file} --stride 8": "Expected --stride to be HEIGHTxWIDTH",
    "export run student.onnx": "bpkd export run student.onnx --input-size 48x64",
    "export run student.pt --input-size 48x64": "does not write files that end in .pt",
    "export {file} student.onnx": "is an ONNX file already",
    "benchmark {file} --input-size 8": "Expected --input-size to be HEIGHTxWIDTH",
}
OTHERS = {"benchmark", "doctor", "formats", "predict", "serve"}


def run(*arguments):
    """Run the command `bpkd` in this process; return its exit code, output and errors."""
    from bpkd_sdk import cli
    from bpkd_sdk.cli import common, deployment

    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["bpkd", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for module in (common, deployment):
            module.console.file, module.errors.file = out, err
        cli.errors.file = err
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, out.getvalue(), err.getvalue()
    raise AssertionError("the command did not exit")


def problem_of(package, name):
    """Return the message of the error that the import of a name raises; None if it raises none."""
    try:
        getattr(package, name)
    except ImportError as error:
        return str(error)
    return None


def check_names():
    for module, expected in NAMES.items():
        package = importlib.import_module(module)
        problems = {name: problem_of(package, name) for name in package.__all__}
        assert {name for name, problem in problems.items() if problem is None} == expected, problems
        assert all("pip install 'bpkd-sdk[" in problem for problem in problems.values() if problem), problems
    import bpkd_sdk

    for name, extra in {"train": "train", "compare": "train", "to_onnx": "export", "quantize": "export"}.items():
        assert f"pip install 'bpkd-sdk[{extra}]'" in problem_of(bpkd_sdk, name)


def check_missing_paths(file):
    for command in MISSING:
        code, _, errors = run(*command.format(file=file).split())
        assert code == 1, (command, code, errors)
        assert errors.count("\n") == 1, (command, errors)
        assert "There is no" in errors, (command, errors)
        assert "nowhere" in errors, (command, errors)


def check_commands(file):
    """Run the commands in the current folder, with empty files in the place of those that they name."""
    import typer

    from bpkd_sdk.cli import app

    commands = dict(typer.main.get_command(app).commands)
    commands |= {f"data {name}": command for name, command in commands.pop("data").commands.items()}
    assert set(COMMANDS) | OTHERS == set(commands), set(commands)
    assert run("--help")[0] == 0
    for name in ("teacher.safetensors", "student.safetensors", "official.pth"):
        Path(name).touch()
    Path("folder").mkdir()
    for command, arguments in COMMANDS.items():
        code, _, errors = run(*command.split(), *arguments.format(file=file).split())
        lines = [line for line in errors.splitlines() if not line.startswith(("Data set:", "Loading"))]
        assert code == 1, (command, code, errors)
        assert len(lines) == 1, (command, errors)
        assert "pip install 'bpkd-sdk[" in lines[0], (command, errors)
        assert run(*command.split(), "--help")[0] == 0


def check_early_errors(file):
    run_folder = Path("run")
    run_folder.mkdir()
    (run_folder / "history.jsonl").write_text('{"step": 1}\n')
    training = {"data": "my_data/train", "crop_size": [48, 64], "step": 1, "config": {"steps": 1}}
    header = json.dumps({"__metadata__": {"bpkd": json.dumps({"training": training, "network": {"class_names": []}})}})
    content = len(header).to_bytes(8, "little") + header.encode()
    (run_folder / "last.safetensors").write_bytes(content)
    for command, expected in EARLY.items():
        code, _, errors = run(*command.format(file=file).split())
        assert (code, errors.count("\n")) == (1, 1), (command, errors)
        assert expected in errors, (command, errors)


def check_reports(file, folder):
    code, out, errors = run("doctor")
    assert code == 0, errors
    assert "needed for training and export: pip install 'bpkd-sdk[train]'" in " ".join(out.split())
    assert "CPU" in out
    code, out, errors = run("formats")
    assert code == 0, errors
    assert "ONNX" in out
    report = folder / "report.json"
    code, out, errors = run("benchmark", file, "--duration", "0.2", "--json", report)
    assert code == 0, errors + out
    content = json.loads(report.read_text())
    (row,) = content["rows"]
    assert row["problem"] is None, row
    assert row["latency"]["p50"] > 0
    assert row["params"] > 0
    assert row["macs"] > 0
    assert row["precision"], row
    assert row["agreement"] == 1
    assert content["environment"]["threads"] is None
    code, _, errors = run("benchmark", file, "--duration", "0.2", "--html", folder / "report.html")
    assert code == 1, errors
    assert "pip install 'bpkd-sdk[serve]'" in errors


def check_predictor(file, image):
    import numpy as np

    from bpkd_sdk import Predictor
    from bpkd_sdk.serve import draw_difference, draw_overlay

    predictor = Predictor(file)
    prediction = predictor(image, confidence=True, entropy=True)
    assert prediction.mask.shape == prediction.confidence.shape == prediction.entropy.shape == image.shape[:2]
    assert 0 < prediction.confidence.min() <= prediction.confidence.max() <= 1
    assert all(np.array_equal(other.mask, prediction.mask) for other in predictor([image, image]))
    assert np.array_equal(next(predictor(iter([image]))).mask, prediction.mask)
    large = np.tile(image, (2, 2, 1))
    assert predictor(large).mask.shape == large.shape[:2]
    picture = prediction.overlay(legend=True)
    assert np.array_equal(
        picture[: len(image)], draw_overlay(image, prediction.mask, predictor.palette, ignore_index=-1)
    )
    other = np.roll(prediction.mask, 3, axis=1)
    picture, difference = draw_difference(image, prediction.mask, other)
    assert picture.shape == image.shape
    assert abs(difference.share - (prediction.mask != other).mean()) < 1e-9
    return predictor, prediction


def check_mask_files(file, picture, prediction, folder):
    import numpy as np
    from PIL import Image

    code, out, errors = run("predict", file, picture, "--output", folder / "masks")
    assert code == 0, out + errors
    (mask,) = (folder / "masks").rglob("*.png")
    assert np.array_equal(np.asarray(Image.open(mask)), prediction.mask)


def check_video(predictor, image, folder):
    import av

    from bpkd_sdk.serve import annotate_video

    with av.open(str(folder / "video.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.height, stream.width = image.shape[:2]
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    frames = list(annotate_video(folder / "video.mp4", folder / "masks.mp4", lambda frame: predictor(frame).overlay()))
    assert len(frames) >= 3
    assert (folder / "masks.mp4").stat().st_size > 0


def check_service(models, content, prediction):
    import numpy as np
    from fastapi.testclient import TestClient
    from PIL import Image

    from bpkd_sdk.serve import create_app

    with TestClient(create_app(models), base_url="http://127.0.0.1") as client:
        answer = client.post("/v1/segment?format=mask", content=content)
        assert answer.status_code == 200, answer.text
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), prediction.mask)
        answer = client.post("/v1/segment", content=content).json()
        mask = np.zeros(prediction.mask.shape, np.uint8)
        for segment in answer["segments"]:
            runs, place, column = segment["rle"]["counts"], 0, np.zeros(mask.size, bool)
            for index, length in enumerate(runs):
                column[place : place + length] = index % 2 == 1
                place += length
            mask[column.reshape(mask.T.shape).T] = segment["class_id"]
        assert np.array_equal(mask, prediction.mask)
        assert client.get("/v1/models").status_code == 200


def check_page(models, content, prediction, folder):
    import cv2

    from bpkd_sdk.serve import build_demo

    names = prediction.class_names[::-1]  # labels in another order than the network's classes
    for name in ("images", "labels"):
        (folder / "examples" / name).mkdir(parents=True)
    (folder / "examples" / "images" / "a.png").write_bytes(content)
    label = len(names) - 1 - prediction.mask
    cv2.imwrite(str(folder / "examples" / "labels" / "a.png"), label)
    (folder / "examples" / "classes.json").write_text(json.dumps({"class_names": names}))
    page = build_demo(models, examples=folder / "examples")
    answers = [function.fn for function in page.fns.values() if function.name == "_open_example"]
    update = answers[0](0, models.students[0].name, 0.5, 2)
    texts = [value for value in update.values() if isinstance(value, str)]
    scores = next(text for text in texts if "Boundary IoU" in text)
    assert scores.count("<td>100.0%</td>") >= 6  # mIoU, boundary IoU and pixel accuracy of two networks
    assert any("differ in <b>0.0%</b>" in text for text in texts)


def main(file, picture):
    import numpy as np

    from bpkd_sdk.images import read_image
    from bpkd_sdk.serve import open_models

    os.environ["COLUMNS"] = "200"  # so that tables do not wrap
    file, picture = os.path.abspath(file), os.path.abspath(picture)
    content, image = Path(picture).read_bytes(), np.asarray(read_image(picture))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        check_names()
        check_commands(file)
        check_missing_paths(file)
        check_early_errors(file)
        check_reports(file, folder)
        predictor, prediction = check_predictor(file, image)
        check_video(predictor, image, folder)
        check_mask_files(file, picture, prediction, folder)
        models = open_models([file], teacher=file, device="cpu")
        check_service(models, content, prediction)
        check_page(models, content, prediction, folder)
    assert not set(ABSENT) & {name.partition(".")[0] for name in sys.modules}
    print("all works without torch")  # noqa: T201


if __name__ == "__main__":
    if len(sys.argv) == 3:  # a further process finds the packages absent from its first line on, and so do its children
        with tempfile.TemporaryDirectory() as startup:
            (Path(startup) / "sitecustomize.py").write_text(FINDER)
            code = f"import sys; sys.path.insert(0, {startup!r}); import runpy; runpy.run_path({__file__!r}, None, '__main__')"
            sys.exit(subprocess.call([sys.executable, "-c", FINDER + code, *sys.argv[1:], "absent"]))
    main(*map(str, sys.argv[1:3]))
