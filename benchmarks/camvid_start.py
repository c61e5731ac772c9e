"""Networks to start from, for the commands of `benchmarks/camvid_compare.sh`: encoders with ImageNet weights.

    python -m benchmarks.camvid_start FOLDER LITE2.pth LITE0.pth

`benchmarks/camvid_study.py` says where the weights come from. A checkpoint is what the commands take a network with
weights of its own from.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import bpkd_sdk
from benchmarks.camvid_study import load_encoder
from bpkd_sdk.data.public import CAMVID_CLASSES

TEACHER, STUDENT = "smp/FPN/timm-tf_efficientnet_lite2", "smp/PAN/timm-tf_efficientnet_lite0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("weights", type=Path, nargs=2, help="of the teacher's encoder, of the student's")
    options = parser.parse_args()
    for role, name, weights in zip(("teacher", "student"), (TEACHER, STUDENT), options.weights, strict=True):
        network = bpkd_sdk.create_model(name, len(CAMVID_CLASSES))
        load_encoder(network, weights)
        network.spec = replace(network.spec, mean=(0.5,) * 3, std=(0.5,) * 3)
        bpkd_sdk.save_model(network, options.folder / f"{role}.safetensors")


if __name__ == "__main__":
    main()
