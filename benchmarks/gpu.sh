#!/usr/bin/env bash
# All checks that need an NVIDIA GPU, for any machine with the package's dependencies: tests, then timings as JSON.
#   benchmarks/gpu.sh [FOLDER FOR RESULTS]
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-benchmarks/results/gpu}
mkdir -p "$output"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
python3 -m pytest -q tests/test_cuda.py
python3 benchmarks/boundary.py --output "$output/boundary.json"
