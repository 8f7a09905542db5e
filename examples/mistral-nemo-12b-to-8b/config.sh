# shellcheck shell=bash disable=SC2034 # read by the scripts that source it
# Paths and sizes of this example. Those of the environment win:
#     WORK=/lustre/me/nemo TRAIN_NODES=16 bash examples/mistral-nemo-12b-to-8b/run.sh distil
: "${WORK:=$PWD/runs/mistral-nemo-12b-to-8b}"
: "${HF:=$WORK/Mistral-Nemo-Base-2407}" # what was downloaded
: "${TEACHER:=$WORK/teacher}"
: "${TOKENIZER:=$WORK/teacher/release/tokenizer}"
# Of tools/preprocess_data.py: a prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
read -ra TRAIN_DATA <<<"${TRAIN_DATA:-$WORK/data/train_text_document}"
read -ra VALID_DATA <<<"${VALID_DATA:-$WORK/data/valid_text_document}"

# arXiv:2408.11796, Tables 3 and 4: 380B tokens are 60400 steps of 768 x 8192.
: "${SEQ_LENGTH:=8192}" "${GLOBAL_BATCH:=768}" "${DISTIL_ITERS:=60400}"
: "${LR:=1e-4}" "${MIN_LR:=4.5e-7}" "${WARMUP:=60}"
: "${HIDDEN:=4096}" "${FFN:=11520}"
# Teacher correction there: about 100B tokens, 120 steps of warm-up, a fifth of the original peak,
# which is not published. These rates are ours: a fifth of LR, and a tenth of that.
: "${CORRECT_ITERS:=15895}" "${CORRECT_WARMUP:=120}" "${CORRECT_LR:=2e-5}" "${CORRECT_MIN_LR:=2e-6}"
# arXiv:2407.14679; of the training length.
: "${CALIBRATION_SAMPLES:=1024}"

# The paper's 32 nodes of 8 H100. TP 4 leaves 64 data-parallel ranks with 12 micro-batches each.
: "${TRAIN_NODES:=32}" "${GPUS_PER_NODE:=8}" "${MICRO_BATCH:=1}" "${SAVE_INTERVAL:=250}"
TRAIN_LAYOUT=(--tensor-model-parallel-size 4 --sequence-parallel)
PRUNE_LAYOUT=(--tensor-model-parallel-size 1)
