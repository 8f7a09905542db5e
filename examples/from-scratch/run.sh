#!/usr/bin/env bash
# The whole method on two CPU cores in about nine minutes: a corpus and a tokenizer, a teacher from
# random weights, its pruned half, distillation, two controls, generated text and a report.
#
#     bash examples/from-scratch/run.sh [OUT]        default OUT: runs/from-scratch
#
# Started again, it goes on after the last finished step, and training after its last checkpoint.
# QUICK=1 makes everything tiny: the flow in about a minute, no result worth reading.
set -euo pipefail
ROOT=$(realpath "$(dirname "$0")/../..")
OUT=$(realpath -m "${1:-${OUT:-$ROOT/runs/from-scratch}}")
cd "$ROOT"
source tools/venv.sh hf,plot

# Sizes. Those of the environment win:  TEACHER_ITERS=2000 OUT=runs/long bash ...
if [ "${QUICK:-0}" = 1 ]; then
    : "${VOCAB_SIZE:=512}" "${SEQ_LENGTH:=32}" "${LAYERS:=2}" "${HIDDEN:=32}" "${FFN:=64}"
    : "${KV_CHANNELS:=16}" "${TEACHER_ITERS:=4}" "${DISTILL_ITERS:=4}" "${EVAL_ITERS:=2}"
    : "${EVALS:=2}" "${CALIBRATION_SAMPLES:=16}" "${NEW_TOKENS:=4}" "${STUDENT_HIDDEN:=24}"
    : "${STUDENT_FFN:=32}" "${TEACHER_WARMUP:=1}" "${DISTILL_WARMUP:=1}"
fi
: "${VOCAB_SIZE:=2048}" "${SEQ_LENGTH:=128}" "${MICRO_BATCH:=8}" "${BATCH:=16}"
: "${LAYERS:=4}" "${HIDDEN:=256}" "${FFN:=704}" "${HEADS:=4}" "${QUERY_GROUPS:=2}"
: "${KV_CHANNELS:=64}" "${TEACHER_ITERS:=1000}" "${TEACHER_LR:=3e-3}" "${TEACHER_MIN_LR:=3e-4}"
: "${STUDENT_HIDDEN:=192}" "${STUDENT_FFN:=384}" "${CALIBRATION_SAMPLES:=256}"
: "${DISTILL_ITERS:=150}" "${DISTILL_LR:=2e-3}" "${DISTILL_MIN_LR:=2e-4}"
: "${TEACHER_WARMUP:=50}" "${DISTILL_WARMUP:=20}" "${EVALS:=5}" "${EVAL_ITERS:=16}"
: "${NEW_TOKENS:=80}"
SETTINGS="VOCAB_SIZE SEQ_LENGTH MICRO_BATCH BATCH LAYERS HIDDEN FFN HEADS QUERY_GROUPS KV_CHANNELS
    TEACHER_ITERS TEACHER_LR TEACHER_MIN_LR STUDENT_HIDDEN STUDENT_FFN CALIBRATION_SAMPLES
    DISTILL_ITERS DISTILL_LR DISTILL_MIN_LR TEACHER_WARMUP DISTILL_WARMUP EVALS
    EVAL_ITERS NEW_TOKENS"
PROMPTS=($'def read_lines(path):\n    """Return the lines of a file."""\n' "The following table")

# shellcheck source=../common/small.sh
source examples/common/small.sh

prune() {
    rm -rf "$OUT/pruned" # of a start that was killed between the checkpoint and the end
    launch prune.py --load "$OUT/teacher" --save "$OUT/pruned" --tensor-model-parallel-size 2 \
        "${TRAIN_DATA[@]}" "${SHAPE[@]}" --calibration-samples "$CALIBRATION_SAMPLES" \
        --target-hidden-size "$STUDENT_HIDDEN" --target-ffn-hidden-size "$STUDENT_FFN" \
        --scores "$OUT/scores.safetensors" --plan "$OUT/plan.json"
}

from_scratch() { # the pruned model's sizes, which its checkpoint writes down as flags
    local sizes
    read -ra sizes <"$OUT/pruned/release/megatron_args.sh"
    train control-random "${DISTILL_SCHEDULE[@]}" "${sizes[@]}" --teacher-load "$OUT/teacher"
}

evaluate() { # the KL to the teacher of a run that had none
    launch pretrain_distill.py "${DATA[@]}" "${SHAPE[@]}" --global-batch-size "$BATCH" \
        --skip-train --lr "$DISTILL_LR" --eval-iters "$EVAL_ITERS" --no-load-optim --no-load-rng \
        --load "$OUT/$1" --teacher-load "$OUT/teacher" --save "$OUT/$1-kl"
}

generate() {
    exec python tools/generate.py --load "$OUT/$1" "${TOKENIZER[@]}" --prompt "${PROMPTS[@]}" \
        --max-new-tokens "$NEW_TOKENS" >"$OUT/texts/$1.txt"
}

keep_settings "$SETTINGS"
mkdir -p "$OUT/texts"

DISTILL_SCHEDULE=("$DISTILL_ITERS" "$DISTILL_LR" "$DISTILL_MIN_LR" "$DISTILL_WARMUP")

make_data
step teacher train teacher "$TEACHER_ITERS" "$TEACHER_LR" "$TEACHER_MIN_LR" "$TEACHER_WARMUP" \
    --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN" --swiglu \
    --num-attention-heads "$HEADS" --kv-channels "$KV_CHANNELS" \
    --group-query-attention --num-query-groups "$QUERY_GROUPS" \
    --position-embedding-type rope --max-position-embeddings 256 --normalization RMSNorm \
    --disable-bias-linear --untie-embeddings-and-output-weights \
    --attention-dropout 0 --hidden-dropout 0
step prune prune
step distilled train distilled "${DISTILL_SCHEDULE[@]}" \
    --load "$OUT/pruned" --teacher-load "$OUT/teacher"
step control-random from_scratch
step control-ce train control-ce "${DISTILL_SCHEDULE[@]}" --load "$OUT/pruned"
step control-ce-kl evaluate control-ce
for model in teacher pruned distilled; do step "generate-$model" generate "$model"; done
python examples/from-scratch/report.py --output "$OUT"
