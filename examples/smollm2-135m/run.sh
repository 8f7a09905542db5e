#!/usr/bin/env bash
# A model that others trained, SmolLM2-135M-Instruct, pruned to half and distilled: on two CPU cores
# in about an hour, on one GPU in minutes (README.md has the settings).
#
#     bash examples/smollm2-135m/run.sh [--hf FOLDER] [--data FILE...] [--out OUT]
#
# --hf FOLDER   a Llama, Mistral, Qwen2 or Qwen3 folder, or a .gguf file, instead of SmolLM2
# --data FILE   .jsonl or .txt to distil on, instead of text out of Debian's packages
# --out OUT     default runs/smollm2-135m
#
# The same command goes on after the last finished step, and training after its last checkpoint.
# QUICK=1: the flow in minutes, no result worth reading.
set -euo pipefail
ROOT=$(realpath "$(dirname "$0")/../..")
HF='' DATA_FILES=() OUT=${OUT:-$ROOT/runs/smollm2-135m}
while [ $# -gt 0 ]; do
    case $1 in
        --hf) HF=$(realpath "$2") && shift 2 ;;
        --out) OUT=$2 && shift 2 ;;
        --data)
            shift
            while [ $# -gt 0 ] && [[ $1 != --* ]]; do DATA_FILES+=("$(realpath "$1")") && shift; done
            ;;
        *) echo "ERROR: $1: there are --hf FOLDER, --data FILE..., --out OUT." >&2 && exit 2 ;;
    esac
done
OUT=$(realpath -m "$OUT")
cd "$ROOT"
source tools/venv.sh gguf,hf,plot

if [ "${QUICK:-0}" = 1 ]; then
    : "${ITERS:=4}" "${RANK_ITERS:=1}" "${SEQ_LENGTH:=32}" "${MICRO_BATCH:=2}" "${BATCH:=4}"
    : "${WARMUP:=1}" "${CALIBRATION_SAMPLES:=4}" "${EVAL_ITERS:=1}" "${EVAL_SAMPLES:=8}"
    : "${NEW_TOKENS:=4}" "${MEGABYTES:=0.3}"
fi
: "${RANKS:=2}" "${SEQ_LENGTH:=256}" "${MICRO_BATCH:=4}" "${BATCH:=8}" "${ITERS:=240}"
: "${RANK_ITERS:=24}" "${LR:=6e-4}" "${MIN_LR:=6e-5}" "${WARMUP:=10}" "${CORPUS:=debian}"
: "${CALIBRATION_SAMPLES:=64}" "${EVAL_ITERS:=4}" "${EVAL_SAMPLES:=32}" "${NEW_TOKENS:=60}"
: "${MEGABYTES:=8}" "${TARGETS:=examples/smollm2-135m/targets.yaml}" "${CONTROLS:=random}"
SETTINGS="RANKS SEQ_LENGTH MICRO_BATCH BATCH ITERS RANK_ITERS LR MIN_LR WARMUP CORPUS
    CALIBRATION_SAMPLES EVAL_ITERS EVAL_SAMPLES NEW_TOKENS MEGABYTES TARGETS CONTROLS HF TEXTS"
# shellcheck disable=SC2034 # read by its name
TEXTS=${DATA_FILES[*]-}
PROMPTS=("The capital of France is" "Once upon a time, there was a" "In physics, energy is"
    "The following table shows" "To list the files of a folder, use the command")
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999
# shellcheck source=../common/step.sh
source examples/common/step.sh

launch() { exec torchrun --standalone --nproc-per-node "$RANKS" "$@"; }

import_model() {
    rm -rf "$OUT/teacher"
    exec python tools/convert.py import --hf "${HF:-$OUT/model/smollm2-135m.gguf}" \
        --save "$OUT/teacher"
}

corpus() { # debian: prose out of Debian's packages; python: Python's own sources and documentation
    case $CORPUS in
        debian)
            exec python examples/smollm2-135m/corpus.py --output "$OUT/corpus" \
                --megabytes-per-source "$MEGABYTES"
            ;;
        python) exec python examples/from-scratch/corpus.py --output "$OUT/corpus" --texts-only ;;
        *) echo "ERROR: CORPUS=$CORPUS: choose debian or python." && exit 2 ;;
    esac
}

preprocess() { # NAME FILE...
    local name=$1
    shift
    exec python tools/preprocess_data.py --input "$@" --output-prefix "$OUT/data/$name" \
        --append-eod --workers 2 "${TOKENIZER[@]}"
}

prune() { # the candidates of one calibration
    rm -rf "$OUT/pruned"
    launch prune.py --load "$OUT/teacher" --save "$OUT/pruned" --targets "$TARGETS" \
        "${DATA[@]}" "${SHAPE[@]}" --calibration-samples "$CALIBRATION_SAMPLES" \
        --scores "$OUT/scores.safetensors" --plan "$OUT/plans"
}

# train NAME FLAGS...: the schedule of all arms is that of the whole run; --exit-interval stops early.
train() {
    local name=$1
    shift
    launch pretrain_distill.py "${DATA[@]}" "${SHAPE[@]}" --global-batch-size "$BATCH" \
        --save "$OUT/$name" --save-interval 50 --save-retain-interval 1000000 \
        --train-iters "$ITERS" --lr "$LR" --min-lr "$MIN_LR" --lr-decay-style cosine \
        --lr-warmup-iters "$WARMUP" --adam-beta2 0.95 --weight-decay 0.1 --log-interval 5 \
        --eval-interval "$RANK_ITERS" --eval-iters "$EVAL_ITERS" "$@"
}

# rank: the candidate whose KL is lowest after RANK_ITERS steps.
rank() { python examples/smollm2-135m/report.py best --out "$OUT" >"$OUT/winner.txt"; }

control() { # random: the winner's sizes, which its checkpoint writes down as flags; ce: no teacher
    local sizes
    read -ra sizes <"$OUT/pruned/$WINNER/release/megatron_args.sh"
    case $1 in
        random) train control-random "${sizes[@]}" --teacher-load "$OUT/teacher" ;;
        ce) train control-ce --load "$OUT/pruned/$WINNER" ;;
    esac
}

evaluate() { # FOLDER
    local teacher=(--teacher-load "$OUT/teacher")
    [ "$1" != teacher ] || teacher=()
    launch tools/evaluate.py --load "$OUT/$1" "${teacher[@]}" "${TOKENIZER[@]}" \
        --data-path "$VALID" --bf16 --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" \
        --eval-samples "$EVAL_SAMPLES" >"$OUT/evaluations/${1//\//-}.txt"
}

generate() { # FOLDER
    exec python tools/generate.py --load "$OUT/$1" "${TOKENIZER[@]}" --prompt "${PROMPTS[@]}" \
        --max-new-tokens "$NEW_TOKENS" >"$OUT/texts/${1//\//-}.txt"
}

generate_all() { # FOLDER...: at the same time, as each takes one core
    local name
    GENERATING=()
    trap 'kill "${GENERATING[@]}" 2>/dev/null || true' EXIT # none outlives another's failure
    for name in "$@"; do
        generate "$name" &
        GENERATING+=($!)
    done
    for name in "$@"; do wait -n; done
}

export_model() {
    rm -rf "$OUT/student-hf"
    # Mistral is the same model without Llama's condition on the width of heads.
    exec python tools/convert.py export --load "$OUT/distilled-$WINNER" --hf "$OUT/student-hf" \
        --model-type "${MODEL_TYPE:-mistral}"
}

keep_settings "$SETTINGS"
mkdir -p "$OUT"/{data,evaluations,model,texts}
TOKENIZER=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$OUT/teacher/release/tokenizer")
SHAPE=(--bf16 --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH")

[ -n "$HF" ] || step fetch python examples/smollm2-135m/fetch.py --output "$OUT/model/smollm2-135m.gguf"
step import import_model
if [ ${#DATA_FILES[@]} = 0 ]; then
    step corpus corpus
    for part in train valid; do step "preprocess-$part" preprocess "$part" "$OUT/corpus/$part.jsonl"; done
    VALID=$OUT/data/valid_text_document
    DATA=(--train-data-path "$OUT/data/train_text_document" --valid-data-path "$VALID")
else
    step preprocess preprocess text "${DATA_FILES[@]}"
    VALID=$OUT/data/text_text_document
    DATA=(--data-path "$VALID" --split "95,5,0")
fi
DATA+=(--num-workers 0 "${TOKENIZER[@]}")
step prune prune
CANDIDATES=$(basename -a "$OUT"/pruned/*/)
if [ "$(wc -w <<<"$CANDIDATES")" = 1 ]; then
    echo "$CANDIDATES" >"$OUT/winner.txt"
else
    for name in $CANDIDATES; do
        EXPECTED=75 step "rank-$name" train "distilled-$name" --load "$OUT/pruned/$name" \
            --teacher-load "$OUT/teacher" --exit-interval "$RANK_ITERS"
    done
    step rank rank
fi
WINNER=$(<"$OUT/winner.txt")
step "distilled-$WINNER" train "distilled-$WINNER" --load "$OUT/pruned/$WINNER" \
    --teacher-load "$OUT/teacher"
for name in $CONTROLS; do step "control-$name" control "$name"; done
step evaluate-teacher evaluate teacher
for name in $CANDIDATES; do step "evaluate-$name" evaluate "pruned/$name"; done
step "evaluate-distilled-$WINNER" evaluate "distilled-$WINNER"
for name in $CONTROLS; do step "evaluate-control-$name" evaluate "control-$name"; done
step generate generate_all teacher "pruned/$WINNER" "distilled-$WINNER"
step "export-$WINNER" export_model
python examples/smollm2-135m/report.py write --out "$OUT"
