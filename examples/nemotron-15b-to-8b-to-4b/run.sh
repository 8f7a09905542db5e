#!/usr/bin/env bash
# Nemotron-4 15B to 8B, and that to 4B (the two-step path of arXiv:2407.14679).
#
#     bash examples/nemotron-15b-to-8b-to-4b/run.sh STEP                  on this machine
#     bash examples/common/submit.sh examples/nemotron-15b-to-8b-to-4b STEP...    as jobs of SLURM
#     DRY_RUN=1 bash examples/nemotron-15b-to-8b-to-4b/run.sh STEP        checks it, without any GPU
#
# Paths and sizes: config.sh. A step that is done is not done again; training goes on.
set -euo pipefail
HERE=$(realpath "$(dirname "$0")")
cd "$HERE/../.."
# shellcheck source=config.sh
source "$HERE/config.sh"
# shellcheck source=../common/steps.sh
source "$HERE/../common/steps.sh"
STEPS=(import prune-8b distil-8b export-8b prune-4b distil-4b export-4b)
SIZES_8B=(--hidden-size "$HIDDEN_8B" --ffn-hidden-size "$FFN_8B")
SIZES_4B=(--hidden-size "$HIDDEN_4B" --ffn-hidden-size "$FFN_4B" --num-attention-heads "$HEADS_4B")

step_import() {
    dry_convert --load-config "$HERE/teacher.json"
    import_hf "$HF" "$WORK/teacher"
}

# All 48 heads stay: a query matrix wider than the hidden size.
step_prune_8b() {
    dry --load-config "$HERE/teacher.json"
    prune "$TEACHER" "$WORK/8b" --target-hidden-size "$HIDDEN_8B" --target-ffn-hidden-size "$FFN_8B"
}

step_prune_4b() {
    dry --load-config "$HERE/8b.json"
    prune "$WORK/8b-distilled" "$WORK/4b" --target-hidden-size "$HIDDEN_4B" \
        --target-ffn-hidden-size "$FFN_4B" --target-num-attention-heads "$HEADS_4B"
}

# distil NAME SIZES...: forward KL on logits alone. The 15B teaches both: it is the better teacher
# of the 4B too (section 4.2 there).
distil() {
    local name=$1
    shift
    dry --load-config "$HERE/teacher.json" --teacher-config "$HERE/teacher.json"
    train "$WORK/$name-distilled" "$DISTIL_ITERS" "$WARMUP" "$LR" "$MIN_LR" \
        --pretrained-checkpoint "$WORK/$name" --teacher-load "$TEACHER" "$@"
}

step_distil_8b() { distil 8b "${SIZES_8B[@]}"; }
step_distil_4b() { distil 4b "${SIZES_4B[@]}"; }

# export_as_hf NAME SIZES...
export_as_hf() {
    local name=$1
    shift
    dry_convert --load-config "$HERE/teacher.json"
    export_hf "$WORK/$name-distilled" "$WORK/$name-hf" "$@"
}

step_export_8b() { export_as_hf 8b "${SIZES_8B[@]}"; }
step_export_4b() { export_as_hf 4b "${SIZES_4B[@]}"; }

run_step "${1:-}" "${STEPS[@]}"
