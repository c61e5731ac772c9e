#!/usr/bin/env bash
# All that needs an NVIDIA GPU, for any machine that has one and the package's dependencies, in less than ten minutes:
# the tests, the boundary and the losses on CUDA, engines built, audited, compared and timed. A part that fails does not
# stop the others; the exit code is 1 then.
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
raise SystemExit(None if torch.cuda.is_available() else "torch sees no CUDA device: nothing to do here. Run `bpkd doctor`.")
PYTHON

part machine 30 python3 -c '
import dataclasses, json, sys
from bpkd_sdk.export.benchmark import Environment
json.dump(dataclasses.asdict(Environment.here()), open(sys.argv[1], "w"), indent=1)' "$output/machine.json"
part tests 260 python3 -m pytest -q -p no:cacheprovider tests/test_cuda.py
part boundary 50 python3 benchmarks/boundary.py --output "$output/boundary.json"
part losses 60 python3 -c '
import sys, pathlib
from benchmarks import losses
print(losses.table(losses.run("cuda", losses.all_cases(losses.CLASSES), pathlib.Path(sys.argv[1]), quick=False)))' "$output"
part engines 195 python3 -m benchmarks.engines --output "$output"

echo "Results: $output"
if ((${#failed[@]})); then
  echo "Failed: ${failed[*]}"
  exit 1
fi
