# shellcheck shell=bash
# Sourced by examples that train a small model from random weights on two CPU cores: their data and
# their training. OUT, VOCAB_SIZE, SEQ_LENGTH, MICRO_BATCH, BATCH, EVALS and EVAL_ITERS are the example's.

# A thread per process: the two processes of a step have a core each. The others keep memory that
# was freed: fresh pages from the system cost more than the arithmetic.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999

# shellcheck source=step.sh
source examples/common/step.sh

# What a step runs ends in exec, so that it is the step's process that gets the signal.
launch() { exec torchrun --standalone --nproc-per-node 2 "$@"; }

preprocess() {
    exec python tools/preprocess_data.py --input "$OUT/corpus/$1.jsonl" \
        --output-prefix "$OUT/data/$1" --append-eod "${TOKENIZER[@]}"
}

# train NAME ITERS LR MIN_LR WARMUP FLAGS...: all on the same data, in the same batches.
train() {
    local name=$1 iters=$2 lr=$3 min_lr=$4 warmup=$5
    shift 5
    launch pretrain_distill.py "${DATA[@]}" "${SHAPE[@]}" --global-batch-size "$BATCH" \
        --save "$OUT/$name" --save-interval $((iters / 4)) --train-iters "$iters" \
        --lr "$lr" --min-lr "$min_lr" --lr-decay-style cosine --lr-warmup-iters "$warmup" \
        --adam-beta2 0.95 --weight-decay 0.1 --log-interval 25 --progress \
        --eval-interval $((iters / EVALS > 0 ? iters / EVALS : 1)) --eval-iters "$EVAL_ITERS" "$@"
}

# Steps that make tokenizer and data; sets their flags.
make_data() {
    TOKENIZER=(--tokenizer-type SentencePieceTokenizer
        --tokenizer-model "$OUT/corpus/tokenizer.model")
    TRAIN_DATA=(--train-data-path "$OUT/data/train_text_document" --num-workers 0 "${TOKENIZER[@]}")
    DATA=("${TRAIN_DATA[@]}" --valid-data-path "$OUT/data/valid_text_document")
    SHAPE=(--bf16 --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH")
    step corpus python examples/from-scratch/corpus.py --output "$OUT/corpus" \
        --vocab-size "$VOCAB_SIZE"
    step preprocess-train preprocess train
    step preprocess-valid preprocess valid
}
