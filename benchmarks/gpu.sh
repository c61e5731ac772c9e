#!/usr/bin/env bash
# Run everything that needs an NVIDIA GPU in less than ten minutes: the tests on CUDA, the boundary and the losses, and
# the engines, which are built, audited, compared and timed. It needs the package's dependencies. If a part fails, the
# others continue, and the exit code is 1.
#   benchmarks/gpu.sh [FOLDER FOR RESULTS]
set -uo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/gpu}
mkdir -p "$output"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
failed=()

part() { # NAME SECONDS COMMAND...
  echo "== $1"
  local begin=$SECONDS name=$1 limit=$2
  shift 2
  if timeout --kill-after=5 "$limit" "$@"; then
    echo "== $name: done in $((SECONDS - begin)) s"
  else
    echo "== $name: FAILED after $((SECONDS - begin)) s"
    failed+=("$name")
  fi
}

python3 - <<'PYTHON' || exit 1
import torch
raise SystemExit(None if torch.cuda.is_available() else "torch finds no CUDA device, so there is nothing to run. Run `bpkd doctor`.")
PYTHON

part machine 30 python3 -c '
import dataclasses, json, sys
from bpkd_sdk.export.benchmark import Environment
json.dump(dataclasses.asdict(Environment.here()), open(sys.argv[1], "w"), indent=1)' "$output/machine.json"
part tests 260 python3 -m pytest -q -p no:cacheprovider tests/test_cuda.py
part boundary 50 python3 -m benchmarks.boundary --output "$output"
part losses 60 python3 -m benchmarks.losses --devices cuda --output "$output"
part engines 195 python3 -m benchmarks.engines --output "$output"

echo "Results: $output"
if ((${#failed[@]})); then
  echo "Failed: ${failed[*]}"
  exit 1
fi
