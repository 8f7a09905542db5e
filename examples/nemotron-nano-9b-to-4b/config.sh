# shellcheck shell=bash disable=SC2034 # read by the scripts that source it
# Paths and sizes of this example. Those of the environment win:
#     WORK=/lustre/me/nano bash examples/nemotron-nano-9b-to-4b/run.sh distil
: "${WORK:=$PWD/runs/nemotron-nano-9b-to-4b}"
: "${HF:=$WORK/NVIDIA-Nemotron-Nano-9B-v2}" # what was downloaded
: "${TEACHER:=$WORK/teacher}"
: "${TOKENIZER:=$TEACHER/release/tokenizer}"
# Of tools/preprocess_data.py: a prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
read -ra TRAIN_DATA <<<"${TRAIN_DATA:-$WORK/data/train_text_document}"
read -ra VALID_DATA <<<"${VALID_DATA:-$WORK/data/valid_text_document}"

# Batch, length, rates and warm-up of Model Optimizer's guidelines for pruned models; 80B tokens, as
# much as its run of this teacher to 7B took, are 12716 steps of 768 x 8192.
: "${SEQ_LENGTH:=8192}" "${GLOBAL_BATCH:=768}" "${DISTIL_ITERS:=12716}"
: "${LR:=1e-4}" "${MIN_LR:=1e-5}" "${WARMUP:=100}"
# Of 56 sub-layers 27 are Mamba, 25 MLPs and 4 attention, which stays (arXiv:2504.11409 too).
: "${HIDDEN:=3136}" "${FFN:=12544}" "${MAMBA_HEADS:=96}" "${MAMBA_LAYERS:=21}" "${MLP_LAYERS:=17}"
: "${CALIBRATION_SAMPLES:=1024}"

# 16 nodes of 8. TP 4 leaves 32 data-parallel ranks, 24 micro-batches each.
: "${TRAIN_NODES:=16}" "${GPUS_PER_NODE:=8}" "${MICRO_BATCH:=1}" "${SAVE_INTERVAL:=250}"
: "${DRY_EXTRA:=--gpu H100}"
TRAIN_LAYOUT=(--tensor-model-parallel-size 4 --sequence-parallel)
PRUNE_LAYOUT=(--tensor-model-parallel-size 2 --sequence-parallel)
