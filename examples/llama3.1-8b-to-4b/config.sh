# shellcheck shell=bash disable=SC2034 # read by the scripts that source it
# Paths and sizes of this example. Those of the environment win:
#     WORK=/lustre/me/llama TRAIN_NODES=16 bash examples/llama3.1-8b-to-4b/run.sh distil-width
: "${WORK:=$PWD/runs/llama3.1-8b-to-4b}"
: "${HF:=$WORK/Llama-3.1-8B}" # what was downloaded
: "${TEACHER:=$WORK/teacher}"
: "${TOKENIZER:=$WORK/teacher/release/tokenizer}"
# Of tools/preprocess_data.py: a prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
read -ra TRAIN_DATA <<<"${TRAIN_DATA:-$WORK/data/train_text_document}"
read -ra VALID_DATA <<<"${VALID_DATA:-$WORK/data/valid_text_document}"

# arXiv:2408.11796, Tables 3 and 4: 94B tokens are 9961 steps of 1152 x 8192.
: "${SEQ_LENGTH:=8192}" "${GLOBAL_BATCH:=1152}" "${DISTIL_ITERS:=9961}"
: "${LR:=1e-4}" "${MIN_LR:=1e-5}" "${WARMUP:=40}"
: "${HIDDEN:=3072}" "${FFN:=9216}" "${LAYERS:=16}"
# Teacher correction there: about 100B tokens, 120 steps of warm-up, a fifth of the original peak,
# 3e-4 (arXiv:2407.21783, Table 3). The lowest rate is ours: a tenth.
: "${CORRECT_ITERS:=10597}" "${CORRECT_WARMUP:=120}" "${CORRECT_LR:=6e-5}" "${CORRECT_MIN_LR:=6e-6}"
# arXiv:2407.14679; of the training length.
: "${CALIBRATION_SAMPLES:=1024}"

# The paper's 32 nodes of 8 H100. TP 2 leaves 128 data-parallel ranks with 9 micro-batches each.
: "${TRAIN_NODES:=32}" "${GPUS_PER_NODE:=8}" "${MICRO_BATCH:=1}" "${SAVE_INTERVAL:=250}"
TRAIN_LAYOUT=(--tensor-model-parallel-size 2 --sequence-parallel)
PRUNE_LAYOUT=(--tensor-model-parallel-size 1)
