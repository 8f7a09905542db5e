"""Flags of everyone's Megatron-LM scripts that have no effect here: number of values, reason."""

_ALWAYS, _KERNELS = "always the case", "kernels follow from the device and --transformer-impl"
IGNORED = {
    "--use-mcore-models": (0, _ALWAYS),
    "--use-dist-ckpt": (0, _ALWAYS),
    "--use-checkpoint-args": (0, _ALWAYS),
    "--auto-detect-ckpt-format": (0, _ALWAYS),
    "--attention-softmax-in-fp32": (0, _ALWAYS),
    "--no-position-embedding": (0, "see --position-embedding-type"),
    "--no-async-tensor-model-parallel-allreduce": (0, _KERNELS),
    "--no-masked-softmax-fusion": (0, _KERNELS),
    "--no-bias-swiglu-fusion": (0, _KERNELS),
    "--no-bias-dropout-fusion": (0, _KERNELS),
    "--no-rope-fusion": (0, _KERNELS),
    "--no-persist-layer-norm": (0, _KERNELS),
    "--use-flash-attn": (0, _KERNELS),
    "--no-create-attention-mask-in-dataloader": (0, "masks are made where they are needed"),
    "--dist-ckpt-format": (1, "checkpoints are torch_dist"),
    "--dist-ckpt-strictness": (1, "a missing or unknown tensor is always an error"),
    "--use-persistent-ckpt-worker": (0, "checkpoints are written before training goes on"),
    "--ckpt-assume-constant-structure": (0, "checkpoints are planned at each save"),
    "--empty-unused-memory-level": (1, "memory is left to torch"),
    "--no-one-logger": (0, "there is no such logger"),
    "--local-rank": (1, "ranks come from the environment"),
    "--ckpt-fully-parallel-load": (0, "every rank reads its share"),
    "--export-te-mcore-model": (0, "checkpoints are the same with and without it"),
    "--tiktoken-pattern": (1, "there is no tiktoken tokenizer"),
    "--te-rng-tracker": (0, "the kind of random state follows from --cuda-graph-impl"),
}
IGNORED_IN_PRUNING = IGNORED | {
    "--tp-comm-overlap": (0, "scores are measured without it"),
}
IGNORED_IN_TRAINING = IGNORED | {
    "--accumulate-allreduce-grads-in-fp32": (0, "the case without --grad-reduce-in-bf16"),
    "--exit-signal-handler": (0, _ALWAYS),
    "--fp8-interval": (1, "Transformer Engine adapts scales at every step"),
    "--log-throughput": (0, _ALWAYS),
    "--calculate-per-token-loss": (
        0,
        "losses are always averaged over the unmasked tokens of the global batch",
    ),
    "--no-gradient-accumulation-fusion": (0, _KERNELS),
    "--no-ckpt-fully-parallel-save": (0, "every rank writes its share"),
    "--dist-ckpt-optim-fully-reshardable": (0, _ALWAYS),
    "--export-kd-teacher-ckpt-format": (1, "checkpoints are torch_dist"),
    "--no-check-for-nan-in-loss-and-grad": (0, "what is not finite always ends a run"),
    "--rerun-mode": (1, "no step is run twice"),
    "--log-memory-to-tensorboard": (0, _ALWAYS),
    "--log-validation-ppl-to-tensorboard": (0, _ALWAYS),
    "--cross-entropy-loss-fusion": (0, "the losses are this project's"),
    "--cross-entropy-fusion-impl": (1, "the losses are this project's"),
}
