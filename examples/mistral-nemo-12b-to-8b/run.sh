#!/usr/bin/env bash
# Mistral-NeMo-12B to 8B by width (hidden 4096, ffn 11520): arXiv:2408.11796.
#
#     bash examples/mistral-nemo-12b-to-8b/run.sh STEP                    on this machine
#     bash examples/common/submit.sh examples/mistral-nemo-12b-to-8b STEP...      as jobs of SLURM
#     DRY_RUN=1 bash examples/mistral-nemo-12b-to-8b/run.sh STEP          checks it, without any GPU
#
# Paths and sizes: config.sh. A step that is done is not done again; training goes on.
set -euo pipefail
HERE=$(realpath "$(dirname "$0")")
cd "$HERE/../.."
# shellcheck source=config.sh
source "$HERE/config.sh"
# shellcheck source=../common/steps.sh
source "$HERE/../common/steps.sh"
STEPS=(import correct prune distil export)
SIZES=(--hidden-size "$HIDDEN" --ffn-hidden-size "$FFN")

step_import() {
    dry_convert --load-config "$HERE/teacher.json"
    import_hf "$HF" "$WORK/teacher"
}

# Optional. The steps after it take it with TEACHER=$WORK/corrected.
step_correct() {
    dry --load-config "$HERE/teacher.json"
    train "$WORK/corrected" "$CORRECT_ITERS" "$CORRECT_WARMUP" "$CORRECT_LR" "$CORRECT_MIN_LR" \
        --pretrained-checkpoint "$WORK/teacher"
}

step_prune() {
    dry --load-config "$HERE/teacher.json"
    prune "$TEACHER" "$WORK/pruned" --target-hidden-size "$HIDDEN" --target-ffn-hidden-size "$FFN"
}

# Forward KL on logits alone.
step_distil() {
    dry --load-config "$HERE/teacher.json" --teacher-config "$HERE/teacher.json"
    train "$WORK/distilled" "$DISTIL_ITERS" "$WARMUP" "$LR" "$MIN_LR" \
        --pretrained-checkpoint "$WORK/pruned" --teacher-load "$TEACHER" "${SIZES[@]}"
}

step_export() {
    dry_convert --load-config "$HERE/teacher.json"
    export_hf "$WORK/distilled" "$WORK/hf" "${SIZES[@]}"
}

run_step "${1:-}" "${STEPS[@]}"
