#!/usr/bin/env bash
# Nemotron Nano 9B v2, a hybrid of Mamba, MLPs and attention, to 4B.
#
#     bash examples/nemotron-nano-9b-to-4b/run.sh STEP                  on this machine
#     bash examples/common/submit.sh examples/nemotron-nano-9b-to-4b STEP...    as jobs of SLURM
#     DRY_RUN=1 bash examples/nemotron-nano-9b-to-4b/run.sh STEP        checks it, without any GPU
#
# Paths and sizes: config.sh. A step that is done is not done again; training goes on.
set -euo pipefail
HERE=$(realpath "$(dirname "$0")")
cd "$HERE/../.."
# shellcheck source=config.sh
source "$HERE/config.sh"
# shellcheck source=../common/steps.sh
source "$HERE/../common/steps.sh"
STEPS=(import prune distil export)

step_import() {
    dry_convert --load-config "$HERE/teacher.json"
    import_hf "$HF" "$WORK/teacher"
}

step_prune() {
    dry --load-config "$HERE/teacher.json"
    prune "$TEACHER" "$WORK/4b" --target-hidden-size "$HIDDEN" --target-ffn-hidden-size "$FFN" \
        --target-mamba-num-heads "$MAMBA_HEADS" --target-mamba-layers "$MAMBA_LAYERS" \
        --target-mlp-layers "$MLP_LAYERS"
}

# Forward KL on logits alone. Which sub-layers 4b.json keeps does not matter to a dry run.
step_distil() {
    dry --load-config "$HERE/4b.json" --teacher-config "$HERE/teacher.json"
    train "$WORK/4b-distilled" "$DISTIL_ITERS" "$WARMUP" "$LR" "$MIN_LR" \
        --pretrained-checkpoint "$WORK/4b" --teacher-load "$TEACHER"
}

step_export() {
    dry_convert --load-config "$HERE/4b.json"
    export_hf "$WORK/4b-distilled" "$WORK/4b-hf"
}

run_step "${1:-}" "${STEPS[@]}"
