"""Megatron-LM's options that would change a result and are not built here: why, and what instead.

A value that is Megatron-LM's default is accepted without a word. ``option_rows`` says how a row is
read.
"""

REFUSED = (
    # The model.
    ("no multi-latent attention here; leave it out", "--multi-latent-attention --qk-clip"),
    (
        "only plain attention is built here; leave it out",
        "--experimental-attention-variant= --attention-output-gate --qk-l2-norm "
        "--export-qk-l2-norm --softmax-type=vanilla --linear-attention-freq=",
    ),
    ("no sliding windows here; leave it out", "--window-size= --window-attn-skip-freq="),
    (
        "a model is built of attention and MLPs in turn here; type --num-layers instead",
        "--hybrid-layer-pattern= --hybrid-override-pattern= --is-hybrid-model "
        "--export-model-type=GPTModel --spec=...",
    ),
    (
        "every layer has the same sizes here; type --num-layers and the sizes",
        "--heterogeneous-layers-config-path= --heterogeneous-layers-config-encoded-json=",
    ),
    (
        "no multi-token prediction here; leave it out",
        "--mtp-num-layers=|0 --qad-train-target=|base --freeze-base-for-mtp",
    ),
    (
        "of rotary embeddings only --rotary-base, --rotary-percent and --use-rope-scaling are here",
        "--enable-gpt-oss --rope-type=|rope --rotary-interleaved "
        "--rotary-seq-len-interpolation-factor=|1 --no-rope-freq=|0",
    ),
    (
        "of activations only GELU, --swiglu and --squared-relu are here",
        "--openai-gelu --quick-geglu --glu-linear-offset=0.0 --activation-func-clamp-value=",
    ),
    ("the residual stream has the weights' dtype here", "--fp32-residual-connection"),
    (
        "new weights are drawn with --init-method-std, the same under any layout",
        "--embedding-init-method-std= --init-method-xavier-uniform --data-parallel-random-init",
    ),
    (
        "no muP here; scale --lr and --init-method-std yourself",
        "--use-mup --mup-width-mult=1.0 --mup-base-hidden-size= --mup-embedding-mult=1.0 "
        "--mup-output-mult=1.0 --mup-base-head-dim= --mup-attn-scale-power=1.0",
    ),
    (
        "models of one stack only; write --num-layers",
        "--encoder-num-layers= --decoder-num-layers=",
    ),
    ("all layers have experts here, or none", "--moe-layer-freq=1|[1]*N|[1]"),
    (
        "experts are chosen by a softmax over all of them here; leave it out",
        "--moe-router-score-function=softmax --moe-router-num-groups= --moe-router-group-topk= "
        "--moe-router-topk-scaling-factor= --moe-router-enable-expert-bias "
        "--moe-router-quantile-balancing-ema=0.0 --moe-router-force-load-balancing "
        "--moe-router-force-biased= --moe-input-jitter-eps= --moe-enable-routing-replay",
    ),
    (
        "every token reaches its experts here; leave it out",
        "--moe-expert-capacity-factor= --moe-expert-rank-capacity-factor=",
    ),
    (
        "experts and shared experts are plain MLPs here; leave it out",
        "--moe-shared-expert-gate --moe-apply-probs-on-input --export-moe-apply-probs-on-input "
        "--moe-latent-size= --moe-mlp-glu-interleave-size= "
        "--moe-shared-expert-glu-interleave-size=",
    ),
    ("see --moe-aux-loss-coeff for the loss that is here", "--moe-z-loss-coeff=|0"),
    ("experts are trained from the beginning here; leave it out", "--moe-use-upcycling"),
    # Precision and kernels that compute something else.
    (
        "no FP4, and of FP8 only what --fp8-* says",
        "--fp4-format= --fp4-param-gather --fp4-quantizer-factory= --fp8-quantizer-factory= "
        "--fp8-output-proj --te-precision-config-file=",
    ),
    ("see --attention-backend for those that are here", "--use-kitchen-attention"),
    ("--deterministic-mode repeats a run bit for bit", "--batch-invariant-mode"),
    ("losses are computed in float32 here", "--fp16-lm-cross-entropy"),
    (
        "leave out --grad-reduce-in-bf16: gradients are then added in float32",
        "--ddp-reduce-scatter-with-fp32-accumulation "
        "--ddp-param-name-patterns-for-fp32-local-accumulation=...",
    ),
    (
        "nothing is quantised here but by --fp8-*; do it after the export",
        "--export-kv-cache-quant=none --export-real-quant-cfg=None --export-quant-cfg=",
    ),
    ("checkpoints are torch_dist, of megatron-core", "--export-legacy-megatron"),
    ("a model has all of its layers here", "--export-offline-model"),
    # Layout.
    (
        "weights are whole on their tensor-parallel rank here; see --use-distributed-optimizer",
        "--use-megatron-fsdp --use-torch-fsdp2 --tensor-parallel-num-weight-shards= "
        "--expert-tensor-parallel-num-weight-shards=",
    ),
    ("all samples are of one length here; leave it out", "--hybrid-context-parallel"),
    (
        "place layers by hand with --pipeline-model-parallel-layout",
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    ("a checkpoint loads under any layout: type yours", "--use-mp-args-from-checkpoint-args"),
    ("--dry-run says what a run on other ranks costs", "--fake-process-group"),
    ("see --distributed-timeout-minutes", "--distributed-timeout-seconds-after-init="),
    # Flags of old, and other ways to type them.
    ("write --micro-batch-size", "--batch-size="),
    ("write --tensor-model-parallel-size", "--model-parallel-size="),
    ("write --lr-warmup-iters or --lr-warmup-fraction", "--warmup="),
    ("write --recompute-granularity", "--checkpoint-activations"),
    ("write --seq-length", "--encoder-seq-length= --decoder-seq-length="),
    ("type the flags themselves", "--yaml-cfg="),
    # Data and tokenizers.
    (
        "a tokenizer is taken as --tokenizer-model has it; put the tokens there",
        "--vocab-extra-ids=0 --tokenizer-metadata= --tokenizer-special-tokens=... "
        "--tokenizer-sentencepiece-legacy --tokenizer-hf-no-use-fast --chat-template= "
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces "
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
    ),
    (
        "the last token of a NullTokenizer ends documents, and none is padding",
        "--null-tokenizer-eod-id= --null-tokenizer-pad-id=-1 --allow-ambiguous-pad-tokens",
    ),
    (
        "samples are read in the order of the index, shuffled once, under any layout",
        "--dataloader-type=|single",
    ),
    ("see --reset-attention-mask", "--dataloader-inter-document-masking"),
    (
        "data are plain text here, prepared by tools/preprocess_data.py",
        "--sft --finetune-hf-dataset= --finetune-data-split=train --finetune-data-files=... "
        "--fim-data --sample-rate=1.0 --mid-level-dataset-surplus=0.005",
    ),
    (
        "15 % of a BERT's tokens are predicted, of whole samples",
        "--mask-prob=0.15 --short-seq-prob=0.1",
    ),
    ("data are read from a file system: copy them", "--object-storage-cache-path= --enable-msc"),
    # Checkpoints.
    ("see --save-interval", "--non-persistent-save-interval="),
    (
        "tools/convert.py converts checkpoints",
        "--ckpt-convert-format= --ckpt-convert-save= --ckpt-convert-update-legacy-dist-opt-format",
    ),
    ("checkpoints have the form of megatron-core 0.19 here", "--dist-ckpt-save-pre-mcore-014"),
    ("--finetune begins at iteration 0", "--override-ckpt-iteration="),
    (
        "float32 weights come with the optimizer's state: leave out --no-load-optim",
        "--load-main-params-from-ckpt",
    ),
)
# What changes a training run, and nothing where none is trained.
REFUSED_IN_TRAINING = (
    ("nothing is trained by reinforcement here", "--perform-rl-step"),
    ("all weights are trained here; --skip-train trains none", "--freeze-all-layers"),
    (
        "weight decay is on matrices and not on biases and norms here",
        "--apply-wd-to-qk-layernorm --no-weight-decay-cond-type=",
    ),
    ("all weights but the vocabulary's have one learning rate here", "--head-lr-mult=1.0"),
    (
        "optimizer state is float32 here; see --grad-reduce-in-bf16 for gradients",
        "--use-precision-aware-optimizer --main-grads-dtype=fp32 --main-params-dtype=fp32 "
        "--exp-avg-dtype=fp32 --exp-avg-sq-dtype=fp32",
    ),
    ("no step is left out here; leave it out", "--iterations-to-skip=..."),
    (
        "to change the batch, the data or the length, start the run again with other flags",
        "--phase-transition-iterations= --step-batch-size-schedule= --rampup-batch-size=...",
    ),
    (
        "an evaluation is of --eval-iters global batches of the whole validation data, every "
        "--eval-interval steps",
        "--eval-global-batch-size= --full-validation --multiple-validation-sets "
        "--validation-set-names=... --start-eval-at-iter=",
    ),
    ("SIGTERM, SIGINT and SIGUSR1 end a run that has saved", "--exit-signal=15|2|10"),
    (
        "no faults are made here; leave it out",
        "--error-injection-rate=0 --fault-injector-ranks= --fault-injector-num-ranks=",
    ),
    (
        "tools/store_teacher.py and --kd-teacher-store store and read a teacher's distributions",
        "--logits-save-dir= --logits-load-dir=",
    ),
)
