#!/usr/bin/env bash
# Llama-3.1-8B to 4B, by width (hidden 3072, ffn 9216) or by depth (16 layers): arXiv:2408.11796.
#
#     bash examples/llama3.1-8b-to-4b/run.sh STEP                    on this machine
#     bash examples/common/submit.sh examples/llama3.1-8b-to-4b STEP...           as jobs of SLURM
#     DRY_RUN=1 bash examples/llama3.1-8b-to-4b/run.sh STEP          checks it, without any GPU
#
# Paths and sizes: config.sh. A step that is done is not done again; training goes on.
set -euo pipefail
HERE=$(realpath "$(dirname "$0")")
cd "$HERE/../.."
# shellcheck source=config.sh
source "$HERE/config.sh"
# shellcheck source=../common/steps.sh
source "$HERE/../common/steps.sh"
STEPS=(import correct prune-width prune-depth distil-width distil-depth export-width export-depth)
WIDTH=(--hidden-size "$HIDDEN" --ffn-hidden-size "$FFN")
DEPTH=(--num-layers "$LAYERS")

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

step_prune_width() {
    dry --load-config "$HERE/teacher.json"
    prune "$TEACHER" "$WORK/width" --target-hidden-size "$HIDDEN" --target-ffn-hidden-size "$FFN"
}

# The contiguous layers without which the loss grows least. (The paper chose them by Winogrande.)
step_prune_depth() {
    dry --load-config "$HERE/teacher.json"
    prune "$TEACHER" "$WORK/depth" --target-num-layers "$LAYERS" \
        --depth-importance loss --depth-block $((32 - LAYERS))
}

# distil NAME SIZES...: forward KL on logits alone.
distil() {
    local name=$1
    shift
    dry --load-config "$HERE/teacher.json" --teacher-config "$HERE/teacher.json"
    train "$WORK/$name-distilled" "$DISTIL_ITERS" "$WARMUP" "$LR" "$MIN_LR" \
        --pretrained-checkpoint "$WORK/$name" --teacher-load "$TEACHER" "$@"
}

step_distil_width() { distil width "${WIDTH[@]}"; }
step_distil_depth() { distil depth "${DEPTH[@]}"; }

# export NAME SIZES...
export_as_hf() {
    local name=$1
    shift
    dry_convert --load-config "$HERE/teacher.json"
    export_hf "$WORK/$name-distilled" "$WORK/$name-hf" "$@"
}

step_export_width() { export_as_hf width "${WIDTH[@]}"; }
step_export_depth() { export_as_hf depth "${DEPTH[@]}"; }

run_step "${1:-}" "${STEPS[@]}"
