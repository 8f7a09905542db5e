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
    (
        "a model is a GPTModel, or of the sub-layers of --hybrid-layer-pattern; leave it out",
        "--hybrid-override-pattern= --is-hybrid-model --export-model-type=GPTModel --spec=...",
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
        "see --rotary-base, --rotary-percent, --use-rope-scaling for the rotary embeddings here",
        "--enable-gpt-oss --rope-type=|rope",
    ),
    (
        "MLPs have GELU, --swiglu or --squared-relu here; leave it out",
        "--openai-gelu --quick-geglu --glu-linear-offset=0.0 --activation-func-clamp-value=",
    ),
    ("the residual stream has the weights' dtype here; leave it out", "--fp32-residual-connection"),
    (
        "new weights are drawn with --init-method-std, the same under any layout; leave it out",
        "--embedding-init-method-std= --init-method-xavier-uniform --data-parallel-random-init",
    ),
    (
        "no muP here; leave it out, and scale --lr and --init-method-std by hand",
        "--use-mup --mup-width-mult=1.0 --mup-base-hidden-size= --mup-embedding-mult=1.0 "
        "--mup-output-mult=1.0 --mup-base-head-dim= --mup-attn-scale-power=1.0",
    ),
    (
        "models have one stack of layers here; write --num-layers",
        "--encoder-num-layers= --decoder-num-layers=",
    ),
    ("all layers have experts here, or none; leave it out", "--moe-layer-freq=1|[1]*N|[1]"),
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
    (
        "experts are balanced by --moe-aux-loss-coeff alone here; leave it out",
        "--moe-z-loss-coeff=|0",
    ),
    ("experts are trained from the beginning here; leave it out", "--moe-use-upcycling"),
    # Precision and kernels that compute something else.
    (
        "no FP4 here, and of FP8 what --fp8-* says; leave it out",
        "--fp4-format= --fp4-param-gather --fp4-quantizer-factory= --fp8-quantizer-factory= "
        "--fp8-output-proj --te-precision-config-file=",
    ),
    ("use one of --attention-backend", "--use-kitchen-attention"),
    ("use --deterministic-mode, which repeats a run bit for bit", "--batch-invariant-mode"),
    ("losses are computed in float32 here; leave it out", "--fp16-lm-cross-entropy"),
    (
        "leave out --grad-reduce-in-bf16: gradients are then added in float32",
        "--ddp-reduce-scatter-with-fp32-accumulation "
        "--ddp-param-name-patterns-for-fp32-local-accumulation=...",
    ),
    (
        "nothing is quantised here but by --fp8-*; leave it out",
        "--export-kv-cache-quant=none --export-real-quant-cfg=None --export-quant-cfg=",
    ),
    ("checkpoints are megatron-core's here; leave it out", "--export-legacy-megatron"),
    ("a model has all of its layers here; leave it out", "--export-offline-model"),
    # Layout.
    (
        "weights are whole on their tensor-parallel rank here; use --use-distributed-optimizer",
        "--use-megatron-fsdp --use-torch-fsdp2 --tensor-parallel-num-weight-shards= "
        "--expert-tensor-parallel-num-weight-shards=",
    ),
    ("all samples are of one length here; leave it out", "--hybrid-context-parallel"),
    (
        "place layers by hand with --pipeline-model-parallel-layout",
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
    ),
    ("a checkpoint loads under any layout: type yours", "--use-mp-args-from-checkpoint-args"),
    ("use --dry-run, which says what a run on other ranks costs", "--fake-process-group"),
    ("use --distributed-timeout-minutes", "--distributed-timeout-seconds-after-init="),
    # Flags of old, and other ways to type them.
    ("write --micro-batch-size", "--batch-size="),
    ("write --tensor-model-parallel-size", "--model-parallel-size="),
    ("write --lr-warmup-iters or --lr-warmup-fraction", "--warmup="),
    ("write --recompute-granularity", "--checkpoint-activations"),
    ("write --seq-length", "--encoder-seq-length= --decoder-seq-length="),
    ("type the flags themselves", "--yaml-cfg="),
    # Data and tokenizers.
    (
        "a tokenizer is as --tokenizer-model says; leave it out, and put tokens there",
        "--vocab-extra-ids=0 --tokenizer-metadata= --tokenizer-special-tokens=... "
        "--tokenizer-sentencepiece-legacy --tokenizer-hf-no-use-fast --chat-template= "
        "--no-tokenizer-sentencepiece-ignore-extra-whitespaces "
        "--disable-tokenizer-sentencepiece-ignore-extra-whitespaces",
    ),
    (
        "the last token of a NullTokenizer ends documents, and none is padding; leave it out",
        "--null-tokenizer-eod-id= --null-tokenizer-pad-id=-1 --allow-ambiguous-pad-tokens",
    ),
    (
        "samples are shuffled once, the same under any layout; leave it out",
        "--dataloader-type=|single",
    ),
    ("use --reset-attention-mask", "--dataloader-inter-document-masking"),
    (
        "data are plain text here; prepare them with tools/preprocess_data.py",
        "--sft --finetune-hf-dataset= --finetune-data-split=train --finetune-data-files=... "
        "--fim-data --sample-rate=1.0 --mid-level-dataset-surplus=0.005",
    ),
    (
        "a BERT predicts 15 % of its tokens, of whole samples, here; leave it out",
        "--mask-prob=0.15 --short-seq-prob=0.1",
    ),
    (
        "data are read from a file system; leave it out, and copy them there",
        "--object-storage-cache-path= --enable-msc",
    ),
    # Checkpoints.
    ("use --save-interval", "--non-persistent-save-interval="),
    (
        "use tools/convert.py",
        "--ckpt-convert-format= --ckpt-convert-save= --ckpt-convert-update-legacy-dist-opt-format",
    ),
    (
        "checkpoints have the form of megatron-core 0.19 here; leave it out",
        "--dist-ckpt-save-pre-mcore-014",
    ),
    ("use --finetune, which begins at iteration 0", "--override-ckpt-iteration="),
    (
        "float32 weights come with the optimizer's state: leave out --no-load-optim",
        "--load-main-params-from-ckpt",
    ),
)
# What changes a training run, and nothing where none is trained.
REFUSED_IN_TRAINING = (
    ("nothing is trained by reinforcement here; leave it out", "--perform-rl-step"),
    ("all weights are trained here; use --skip-train to train none", "--freeze-all-layers"),
    (
        "weight decay is on matrices, not on biases and norms, here; leave it out",
        "--apply-wd-to-qk-layernorm --no-weight-decay-cond-type=",
    ),
    (
        "only the vocabulary has a learning rate of its own: use --decoupled-lr",
        "--head-lr-mult=1.0",
    ),
    (
        "optimizer state is float32 here; leave it out, or use --grad-reduce-in-bf16 for gradients",
        "--use-precision-aware-optimizer --main-grads-dtype=fp32 --main-params-dtype=fp32 "
        "--exp-avg-dtype=fp32 --exp-avg-sq-dtype=fp32",
    ),
    ("no step is left out here; leave it out", "--iterations-to-skip=..."),
    (
        "to change the batch, the data or the length, start the run again with other flags",
        "--phase-transition-iterations= --step-batch-size-schedule= --rampup-batch-size=...",
    ),
    (
        "evaluations are of --eval-iters global batches, every --eval-interval; leave it out",
        "--eval-global-batch-size= --full-validation --multiple-validation-sets "
        "--validation-set-names=... --start-eval-at-iter=",
    ),
    (
        "SIGTERM, SIGINT and SIGUSR1 end a run when it has saved: use one of them",
        "--exit-signal=15|2|10",
    ),
    (
        "no faults are made here; leave it out",
        "--error-injection-rate=0 --fault-injector-ranks= --fault-injector-num-ranks=",
    ),
    (
        "use tools/store_teacher.py and --kd-teacher-store",
        "--logits-save-dir= --logits-load-dir=",
    ),
)
