#!/usr/bin/env bash
# SmolLM2-135M-Instruct pruned to half, distilled and exported on two CPU cores in under twenty
# minutes: examples/smollm2-135m with one candidate, few steps and text that is on every machine.
#
#     bash examples/quickstart/run.sh [OUT]        default OUT: runs/quickstart
#
# The same command goes on where it ended. QUICK=1: the flow alone.
set -euo pipefail
ROOT=$(realpath "$(dirname "$0")/../..")
export CORPUS=${CORPUS:-python} TARGETS=${TARGETS:-examples/quickstart/targets.yaml}
if [ "${QUICK:-0}" != 1 ]; then
    export ITERS=${ITERS:-32} RANK_ITERS=${RANK_ITERS:-16} WARMUP=${WARMUP:-4}
    export NEW_TOKENS=${NEW_TOKENS:-32}
fi
exec bash "$ROOT/examples/smollm2-135m/run.sh" --out "${1:-${OUT:-$ROOT/runs/quickstart}}"
