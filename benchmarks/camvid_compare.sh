#!/usr/bin/env bash
# All methods with their defaults on CamVid, by the commands that anyone would type: at equal steps, at equal seconds.
#   benchmarks/camvid_compare.sh CAMVID LITE2.pth LITE0.pth [RESULTS]
# A small budget, for two cores; docs/results.md has the study with weights that were tuned. The same call goes on where
# it was stopped. Needs `bpkd` and `python` on the PATH.
set -euo pipefail
data=$(realpath "$1") lite2=$(realpath "$2") lite0=$(realpath "$3")
cd "$(dirname "$0")/.."
results=${4:-benchmarks/results/camvid-compare}
runs=runs/camvid-compare
camvid=(--data camvid --root "$data")
recipe=(--optimizer adamw --learning-rate 6e-4 --gradient-clip 10 --batch-size 8 --scale 0.75 1.5)

[ -f $runs/start/student.safetensors ] || python -m benchmarks.camvid_start $runs/start "$lite2" "$lite0"
bpkd train $runs/start/teacher.safetensors "${camvid[@]}" "${recipe[@]}" --precision bf16 --crop-size 224x320 \
  --steps 300 --checkpoint-every 50 --output $runs/teacher --resume

for budget in steps=40 seconds=40; do
  bpkd compare --methods all --teacher $runs/teacher/last.safetensors --student $runs/start/student.safetensors \
    "${camvid[@]}" "${recipe[@]}" --crop-size 192x256 --evaluate-every 20 --budget $budget --seeds 1 \
    --output $runs/${budget/=/-}
  mkdir -p "$results/${budget/=/-}"
  cp $runs/${budget/=/-}/{table.md,table.json,miou_over_time.png} "$results/${budget/=/-}/"
done
