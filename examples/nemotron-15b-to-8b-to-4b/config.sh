# shellcheck shell=bash disable=SC2034 # read by the scripts that source it
# Paths and sizes of this example. Those of the environment win:
#     WORK=/lustre/me/nemotron bash examples/nemotron-15b-to-8b-to-4b/run.sh distil-8b
: "${WORK:=$PWD/runs/nemotron-15b-to-8b-to-4b}"
# Nemotron-4 15B is not published. A folder in transformers' nemotron format, or leave out import
# and name a Megatron checkpoint: TEACHER=... TOKENIZER=...
: "${HF:=$WORK/nemotron-15b}"
: "${TEACHER:=$WORK/teacher}"
: "${TOKENIZER:=$TEACHER/release/tokenizer}"
# Of tools/preprocess_data.py: a prefix, or a blend WEIGHT PREFIX WEIGHT PREFIX ...
read -ra TRAIN_DATA <<<"${TRAIN_DATA:-$WORK/data/train_text_document}"
read -ra VALID_DATA <<<"${VALID_DATA:-$WORK/data/valid_text_document}"

# arXiv:2407.14679, Table 10 and appendix: 94B tokens are 19922 steps of 1152 x 4096. The rates are
# printed as "2^-4 to 4.5^-7" and read as below; the warm-up is not stated, 40 is that of 2408.11796.
: "${SEQ_LENGTH:=4096}" "${GLOBAL_BATCH:=1152}" "${DISTIL_ITERS:=19922}"
: "${LR:=2e-4}" "${MIN_LR:=4.5e-7}" "${WARMUP:=40}"
: "${HIDDEN_8B:=4096}" "${FFN_8B:=16384}"
: "${HIDDEN_4B:=3072}" "${FFN_4B:=9216}" "${HEADS_4B:=24}"
: "${CALIBRATION_SAMPLES:=1024}"

# The paper's 16 nodes of 8 A100-80GB. TP 4 leaves 32 data-parallel ranks, 36 micro-batches each.
: "${TRAIN_NODES:=16}" "${GPUS_PER_NODE:=8}" "${MICRO_BATCH:=1}" "${SAVE_INTERVAL:=250}"
: "${DRY_EXTRA:=--gpu A100}"
TRAIN_LAYOUT=(--tensor-model-parallel-size 4 --sequence-parallel)
PRUNE_LAYOUT=(--tensor-model-parallel-size 2 --sequence-parallel)
