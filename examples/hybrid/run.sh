#!/usr/bin/env bash
# A hybrid Mamba model pruned and distilled on two CPU cores: the corpus of from-scratch, a teacher
# from random weights, its heads, head channels, MLPs and sub-layers cut by activations and by
# chance, both distilled.
#
#     bash examples/hybrid/run.sh [OUT]        default OUT: runs/hybrid
#
# Started again, it goes on after the last finished step, and training after its last checkpoint.
# QUICK=1 makes everything tiny: the flow in about a minute, no result worth reading.
set -euo pipefail
ROOT=$(realpath "$(dirname "$0")/../..")
OUT=$(realpath -m "${1:-${OUT:-$ROOT/runs/hybrid}}")
cd "$ROOT"
source tools/venv.sh hf

# Sizes. Those of the environment win:  TEACHER_ITERS=2000 OUT=runs/long bash ...
if [ "${QUICK:-0}" = 1 ]; then
    : "${VOCAB_SIZE:=512}" "${SEQ_LENGTH:=32}" "${TEACHER_ITERS:=4}" "${DISTILL_ITERS:=4}"
    : "${CALIBRATION_SAMPLES:=16}" "${EVAL_ITERS:=2}" "${TEACHER_WARMUP:=1}" "${DISTILL_WARMUP:=1}"
fi
: "${VOCAB_SIZE:=2048}" "${SEQ_LENGTH:=128}" "${MICRO_BATCH:=8}" "${BATCH:=16}"
: "${TEACHER_ITERS:=120}" "${TEACHER_LR:=3e-3}" "${TEACHER_MIN_LR:=3e-4}" "${TEACHER_WARMUP:=20}"
: "${DISTILL_ITERS:=40}" "${DISTILL_LR:=2e-3}" "${DISTILL_MIN_LR:=2e-4}" "${DISTILL_WARMUP:=5}"
: "${CALIBRATION_SAMPLES:=64}" "${EVAL_ITERS:=8}"
EVALS=1 # of a run, at its end
SETTINGS="VOCAB_SIZE SEQ_LENGTH MICRO_BATCH BATCH TEACHER_ITERS TEACHER_LR TEACHER_MIN_LR
    TEACHER_WARMUP DISTILL_ITERS DISTILL_LR DISTILL_MIN_LR DISTILL_WARMUP CALIBRATION_SAMPLES
    EVAL_ITERS"
MODEL=(--hybrid-layer-pattern "M-M-M*-M-M*-" --hidden-size 192 --ffn-hidden-size 512
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 32
    --mamba-num-heads 12 --mamba-head-dim 32 --mamba-num-groups 4 --mamba-state-dim 32
    --squared-relu --position-embedding-type none --max-position-embeddings 256
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0)
TARGETS=(--target-mamba-num-heads 8 --target-mamba-head-dim 24 --target-mamba-layers 4
    --target-ffn-hidden-size 320 --target-mlp-layers 4)

# shellcheck source=../common/small.sh
source examples/common/small.sh

# prune NAME FLAGS...: under tensor parallelism; the teacher was trained under data parallelism.
prune() {
    local name=$1
    shift
    rm -rf "${OUT:?}/$name" # of a start that was killed between the checkpoint and the end
    launch prune.py --load "$OUT/teacher" --save "$OUT/$name" --tensor-model-parallel-size 2 \
        "${TRAIN_DATA[@]}" "${SHAPE[@]}" --calibration-samples "$CALIBRATION_SAMPLES" \
        "${TARGETS[@]}" --scores "$OUT/$name.safetensors" --plan "$OUT/$name.json" "$@"
}

# Loss and KL to the teacher of what nothing has trained.
evaluate() {
    launch pretrain_distill.py "${DATA[@]}" "${SHAPE[@]}" --global-batch-size "$BATCH" \
        --skip-train --lr "$DISTILL_LR" --eval-iters "$EVAL_ITERS" \
        --load "$OUT/$1" --teacher-load "$OUT/teacher" --save "$OUT/$1-untouched"
}

keep_settings "$SETTINGS"
make_data
step teacher train teacher "$TEACHER_ITERS" "$TEACHER_LR" "$TEACHER_MIN_LR" "$TEACHER_WARMUP" \
    "${MODEL[@]}"
step pruned prune pruned
step chance prune chance --importance random
for name in pruned chance; do
    step "$name-untouched" evaluate "$name"
    step "$name-distilled" train "$name-distilled" \
        "$DISTILL_ITERS" "$DISTILL_LR" "$DISTILL_MIN_LR" "$DISTILL_WARMUP" \
        --load "$OUT/$name" --teacher-load "$OUT/teacher"
done
python examples/hybrid/report.py --output "$OUT"
