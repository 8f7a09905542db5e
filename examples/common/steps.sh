# shellcheck shell=bash
# Sourced by the examples' run.sh after their config.sh: what their steps have in common.
# shellcheck source=launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

# dry FLAGS...: say the sizes of what a dry run does not find. DRY_EXTRA: e.g. "--gpu H200 --mfu 0.5".
dry() {
    read -ra DRY_FLAGS <<<"${DRY_EXTRA:-}"
    DRY_FLAGS+=("$@")
}

# Converting computes nothing: no GPU to name.
dry_convert() { DRY_FLAGS=("$@"); }

# is_there SAVE: whether a step has been done. A dry run looks at it again.
is_there() { [ "$DRY_RUN" != 1 ] && [ -e "$1/latest_checkpointed_iteration.txt" ]; }

# Precision and tokenizer of every step that reads text.
text_flags() {
    TEXT=(--bf16 --seq-length "$SEQ_LENGTH" --tokenizer-type HuggingFaceTokenizer
        --tokenizer-model "$TOKENIZER" --train-data-path "${TRAIN_DATA[@]}")
}

# import_hf FOLDER SAVE: Hugging Face to Megatron.
import_hf() {
    is_there "$2" || alone tools/convert.py import --hf "$1" --save "$2"
}

# export_hf LOAD FOLDER SIZES...: Megatron to Hugging Face.
export_hf() {
    local load=$1 hf=$2
    shift 2
    if [ "$DRY_RUN" = 1 ] || [ ! -e "$hf" ]; then
        alone tools/convert.py export --load "$load" --hf "$hf" "$@"
    fi
}

# prune LOAD SAVE TARGETS...: calibrate, plan, cut. L2 over samples of the mean over positions, one
# pass, as in the papers. Scores and plan stay beside SAVE.
prune() {
    local load=$1 save=$2
    shift 2
    ! is_there "$save" || return 0
    [ "$DRY_RUN" = 1 ] || mkdir -p "$(dirname "$save")"
    text_flags
    launch prune.py --load "$load" --save "$save" "${TEXT[@]}" "${PRUNE_LAYOUT[@]}" \
        --micro-batch-size 1 --calibration-samples "$CALIBRATION_SAMPLES" \
        --scores "$save.scores.safetensors" --plan "$save.plan.json" "$@"
}

# train SAVE ITERS WARMUP LR MIN_LR FLAGS...: AdamW and cosine. The same command goes on from the
# last checkpoint in SAVE.
train() {
    local save=$1 iters=$2 warmup=$3 lr=$4 min_lr=$5
    shift 5
    : "${NODES:=$TRAIN_NODES}"
    text_flags
    launch pretrain_distill.py --save "$save" --save-interval "$SAVE_INTERVAL" \
        --save-retain-interval $((10 * SAVE_INTERVAL)) "${TEXT[@]}" "${TRAIN_LAYOUT[@]}" \
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" \
        --train-iters "$iters" --lr "$lr" --min-lr "$min_lr" --lr-warmup-iters "$warmup" \
        --lr-decay-style cosine --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 \
        --clip-grad 1.0 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
        --valid-data-path "${VALID_DATA[@]}" --eval-interval "$SAVE_INTERVAL" --eval-iters 8 \
        --log-interval 10 --tensorboard-dir "$save/tensorboard" "$@"
}

# run_step ASKED NAMES...: run the function of the step that was asked for.
run_step() {
    local asked=$1 name
    shift
    for name in "$@"; do
        if [ "$name" = "$asked" ]; then
            "step_${name//-/_}"
            return
        fi
    done
    echo "ERROR: step ${asked:-?}: choose from $*." >&2
    return 2
}
