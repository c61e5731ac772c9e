"""Compare what it takes to run a student: time to the first mask, peak memory, and installed size.

    python -m benchmarks.footprint [--ultralytics PYTHON]

Each program is a new process that reads one photo, opens one file and segments the photo. The programs take turns, in
several rounds after one that warms the disk cache; figures are medians over the rounds. "plain onnxruntime" is the
shortest program without this package, see docs/deploy.md. "installed alone" is a new virtual environment with this
package and its own dependencies; "with all extras" is the environment that runs the benchmark. Installed sizes are
those of all packages without compiled bytecode, in millions of bytes. All masks of the same file must be equal.
`--ultralytics` names a Python with ultralytics, whose loader then runs its own smallest segmentation network, exported
to ONNX with random weights. Linux only.
"""

import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.records import Records, make_parser, markdown_table

STUDENT, SIZE, ROUNDS = "smp/Linknet/tu-test_resnet", (256, 256), 9
ROOT = Path(__file__).parents[1]

# Each program ends in `mask`, uint8 (H, W).
PLAIN = """
import numpy as np, onnxruntime
from PIL import Image
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
image = np.asarray(Image.open(sys.argv[2]).convert("RGB"))[None]
mask = session.run(None, {session.get_inputs()[0].name: image})[0][0]
"""
PREDICTOR = """
from bpkd_sdk import Predictor
mask = Predictor(sys.argv[1], device="cpu")(sys.argv[2]).mask
"""
ULTRALYTICS = """
from ultralytics import YOLO
result = YOLO(sys.argv[1], task="segment")(sys.argv[2], device="cpu", verbose=False)[0]
import numpy as np
mask = np.zeros(result.orig_shape, np.uint8)
"""
REPORT = """
import json, zlib
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"peak_bytes": 1024 * int(peak), "crc": zlib.crc32(mask.tobytes()), "torch": "torch" in sys.modules}))
"""


def run(python: Path, program: str, *arguments: Path) -> dict[str, Any]:
    """Run a program in a new process; return its seconds from the start to its mask, its peak memory and the mask."""
    start = time.perf_counter()
    command = [python, "-P", "-c", "import sys\n" + program + REPORT, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = next((line for line in process.stdout if line.startswith("{")), "")  # others are ultralytics' messages
    seconds = time.perf_counter() - start
    if process.wait():
        raise SystemExit(f"{python} failed on:\n{program}")
    return {"seconds": seconds} | json.loads(line)


def install(folder: Path, extras: str) -> Path:
    """Make a virtual environment with the last commit of this package and some extras, and return its Python."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", folder / "bin/python"]
    venv.create(folder, with_pip=False)
    source = folder / "source"  # a clone: the last commit, without other files
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), source], check=True)
    package = f"{source}{extras}"
    subprocess.run([*pip, "install", "--no-compile", "-c", ROOT / "constraints.txt", package], check=True)
    return folder / "bin/python"


def installed_bytes(python: Path) -> int:
    """Return the size of an environment's packages, without compiled bytecode."""
    folder = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    files = (path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sum(path.stat().st_size for path in files)


def make_files(folder: Path) -> tuple[Path, Path, Path]:
    """Write a checkpoint of the student, its ONNX file, and a photo of its size."""
    import torch
    from PIL import Image

    import bpkd_sdk
    from bpkd_sdk.data import ShapesDataset

    checkpoint, file, photo = folder / "student.safetensors", folder / "student.onnx", folder / "photo.png"
    torch.manual_seed(0)
    model = bpkd_sdk.create_model(STUDENT, 8).eval()
    bpkd_sdk.save_model(model, checkpoint)
    bpkd_sdk.to_onnx(model, file, input_size=SIZE)
    image, _ = ShapesDataset("val", length=1, size=SIZE)[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(photo)
    return checkpoint, file, photo


def export_ultralytics(python: Path, folder: Path) -> Path:
    """Export ultralytics' smallest segmentation network with random weights to ONNX, and return the file."""
    code = f"from ultralytics import YOLO; print(YOLO('yolo11n-seg.yaml').export(format='onnx', imgsz={SIZE[0]}))"
    subprocess.run([python, "-c", code], cwd=folder, check=True, capture_output=True)
    return next(folder.glob("*.onnx"))


def tables(records: Records) -> str:
    """Return the medians of each program and their relation to plain ONNX Runtime, and the installed sizes."""
    runs = records.runs
    seconds = {key: statistics.median(run["seconds"]) for key, run in runs.items()}
    memory = {key: statistics.median(run["peak_bytes"]) / 1e6 for key, run in runs.items()}
    base = next(iter(runs))
    programs = markdown_table(
        ["program", "start to first mask, s", "all rounds", "times plain", "peak memory, MB", "MB above plain"],
        [
            [
                key,
                f"{seconds[key]:.2f}",
                f"{min(run['seconds']):.2f}–{max(run['seconds']):.2f}",
                f"{seconds[key] / seconds[base]:.2f}",
                f"{memory[key]:.0f}",
                f"{memory[key] - memory[base]:.0f}",
            ]
            for key, run in runs.items()
        ],
    )
    sizes = [[f"`{name}`", f"{size / 1e6:.0f}"] for name, size in records.setting["installed_bytes"].items()]
    return f"{programs}\n{markdown_table(['installation', 'MB'], sizes)}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/footprint", help="folder of the environment")
    parser.add_argument("--ultralytics", type=Path, metavar="PYTHON", help="Python of an environment with ultralytics")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    alone, here = install(arguments.folder / "alone", ""), Path(sys.executable)
    sizes = {
        "bpkd-sdk": installed_bytes(alone),
        "bpkd-sdk[serve,triton]": installed_bytes(install(arguments.folder / "serve", "[serve,triton]")),
        "bpkd-sdk[all,dev]": installed_bytes(here),
    }
    checkpoint, file, photo = make_files(arguments.folder)
    programs = {
        "plain onnxruntime, installed alone": (alone, PLAIN, file, photo),
        "Predictor, installed alone": (alone, PREDICTOR, file, photo),
        "Predictor, with all extras": (here, PREDICTOR, file, photo),
        "Predictor of the checkpoint, with all extras": (here, PREDICTOR, checkpoint, photo),
    }
    if arguments.ultralytics:
        own = export_ultralytics(arguments.ultralytics, arguments.folder)
        programs["ultralytics, its own ONNX file, with torch"] = (arguments.ultralytics, ULTRALYTICS, own, photo)
    setting = {
        "student": STUDENT,
        "size": SIZE,
        "file_bytes": file.stat().st_size,
        "installed_bytes": sizes,
        "rounds": ROUNDS,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "onnxruntime", "torch")},
    }
    results: dict[str, list[dict[str, Any]]] = {key: [] for key in programs}
    for round_number in range(ROUNDS + 1):
        for key, program in programs.items():
            result = run(*program)
            if round_number:
                results[key].append(result)
    crcs = {result["crc"] for key, runs in results.items() if file in programs[key] for result in runs}
    if len(crcs) != 1:
        raise SystemExit("The masks of the same file differ.")
    records = Records(arguments.output / "footprint.jsonl", setting)
    records.update(
        {
            key: {
                "seconds": [result["seconds"] for result in runs],
                "peak_bytes": [result["peak_bytes"] for result in runs],
                "loads_torch": runs[0]["torch"],
            }
            for key, runs in results.items()
        }
    )
    records.write_table(tables(records))


if __name__ == "__main__":
    main()
