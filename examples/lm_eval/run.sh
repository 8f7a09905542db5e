#!/usr/bin/env bash
# lm_eval on from-scratch's models as Hugging Face folders, on a CPU and without a network.
#
#     bash examples/lm_eval/run.sh [FROM_SCRATCH] [OUT]   default runs/from-scratch runs/lm_eval
#
# Needs lm_eval: pip install -e '.[eval]'. MODELS names folders of FROM_SCRATCH, SAMPLES is how many
# questions and documents there are.
set -euo pipefail
cd "$(dirname "$0")/../.."
FROM_SCRATCH=$(realpath "${1:-runs/from-scratch}")
OUT=$(realpath -m "${2:-runs/lm_eval}")
: "${MODELS:=teacher pruned distilled}" "${SAMPLES:=60}"
command -v lm_eval >/dev/null || {
    echo "ERROR: lm_eval is not installed: pip install -e '.[eval]'." >&2
    exit 1
}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_CACHE="$OUT/cache" PYTHONPATH=$PWD
export TOKENIZERS_PARALLELISM=false

# From-scratch's sentencepiece model as transformers reads it: the same tokens, none around a text.
mkdir -p "$OUT/tokenizer"
cp "$FROM_SCRATCH/corpus/tokenizer.model" "$OUT/tokenizer/"
cat >"$OUT/tokenizer/tokenizer_config.json" <<'JSON'
{"tokenizer_class": "LlamaTokenizer", "legacy": false, "add_prefix_space": false,
 "add_bos_token": false, "add_eos_token": false, "clean_up_tokenization_spaces": false,
 "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
JSON
python examples/lm_eval/tasks.py --corpus "$FROM_SCRATCH/corpus" --output "$OUT/tasks" \
    --samples "$SAMPLES"
for model in $MODELS; do
    [ -e "$OUT/$model" ] || python tools/convert.py export --load "$FROM_SCRATCH/$model" \
        --hf "$OUT/$model" --model-type mistral --tokenizer-model "$OUT/tokenizer"
    lm_eval --model hf --model_args "pretrained=$OUT/$model,dtype=float32" --device cpu \
        --tasks next_line,python_text --include_path "$OUT/tasks" --batch_size 16 \
        --output_path "$OUT/results/$model"
done
