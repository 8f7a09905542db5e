"""Every flag of the programs but the model's sizes: name, type, default and help.

Names, defaults and spelling are Megatron-LM's (core_v0.16.1) unless the help says otherwise. One
dataclass per group. A program's group inherits from the group that it shares with the other
program, so that neither offers a flag that it would ignore.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ext.estimate import GPUS
from megatron_ext.flag_parser import REQUIRED, flag


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Parallel layout and device."""

    tensor_model_parallel_size: int = flag(1, "ranks that share each layer (TP)", at_least=1)
    pipeline_model_parallel_size: int = flag(1, "ranks that share the depth (PP)", at_least=1)
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, "interleave: layers of each model piece; a rank holds several pieces", at_least=1
    )
    num_virtual_stages_per_pipeline_rank: int | None = flag(
        None, "interleave: model pieces of each pipeline rank (VPP)", at_least=1
    )
    pipeline_model_parallel_layout: str | None = flag(
        None, "stages by hand, e.g. Et*3|t*4|tL: E embedding, t layer, L loss, x*n repeats"
    )
    overlap_p2p_comm: bool = flag(
        True,
        "interleaved pipeline: wait for each transfer between stages",
        off="--no-overlap-p2p-communication",
    )
    context_parallel_size: int = flag(1, "ranks that share each sequence (CP)", at_least=1)
    sequence_parallel: bool = flag(
        False, "split activations between layers over TP; no effect without TP"
    )
    distributed_backend: str | None = flag(
        None, "default nccl on CUDA, gloo on CPU", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: int = flag(10, "of every collective, minutes", at_least=1)
    device: str | None = flag(
        None, "not in Megatron-LM; default cuda where there is one", choices=("cpu", "cuda")
    )
    transformer_impl: str | None = flag(
        None,
        "default Transformer Engine where it is installed and the device is cuda, else local",
        choices=("local", "transformer_engine"),
    )
    attention_backend: str = flag(
        "auto",
        "of Transformer Engine; local layers leave the choice to torch",
        choices=("flash", "fused", "unfused", "auto"),
    )
    cp_comm_type: str = flag(
        "p2p",
        "how Transformer Engine's attention exchanges keys and values over CP",
        choices=("p2p", "all_gather", "a2a"),
    )

    expert_model_parallel_size: int = flag(
        1, "data and context parallel ranks that share the experts (EP); TP splits each", at_least=1
    )

    # What pruning does not offer: its hooks read the order in which this one gathers tokens.
    moe_token_dispatcher_type = "allgather"
    moe_grouped_gemm = False


@dataclass(frozen=True, kw_only=True)
class TrainParallel(Parallel):
    """Parallel layout and device."""

    moe_token_dispatcher_type: str = flag(
        "allgather",
        "how tokens reach the experts of other ranks",
        choices=("allgather", "alltoall"),
    )
    moe_grouped_gemm: bool = flag(
        False, "one kernel for the experts of a rank; needs Transformer Engine"
    )
    use_distributed_optimizer: bool = flag(False, "split optimizer state over data-parallel ranks")
    overlap_grad_reduce: bool = flag(False, "reduce gradients while computing others")
    overlap_param_gather: bool = flag(
        False, "gather updated parameters while computing; needs the distributed optimizer"
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch and run length."""

    micro_batch_size: int = flag(REQUIRED, "samples of one forward pass on a rank", at_least=1)
    seq_length: int = flag(REQUIRED, "tokens of a sample", at_least=1)
    seed: int = flag(1234, "of data order, new weights and dropout", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TrainBatch(Batch):
    """Batch and run length."""

    global_batch_size: int | None = flag(
        None, "samples of one step; default micro-batch-size x data-parallel ranks", at_least=1
    )
    train_iters: int | None = flag(
        None, "steps of the whole run, earlier starts included; needed to train", at_least=1
    )
    train_samples: int | None = flag(
        None, "the same in samples: whole global batches of them; instead of it", at_least=1
    )
    exit_interval: int | None = flag(
        None, "stop after a step divisible by this; default never", at_least=1
    )
    exit_duration_in_mins: int | None = flag(
        None, "save and stop after so many minutes; default never", at_least=1
    )
    skip_train: bool = flag(False, "evaluate only")
    manual_gc: bool = flag(
        False, "collect Python's garbage on all ranks at the same steps, not whenever it is due"
    )
    manual_gc_interval: int = flag(
        0, "steps between collections under --manual-gc; 0 = at evaluations only", at_least=0
    )
    recompute_granularity: str | None = flag(
        None,
        "activations computed again in backward: core attention or whole layers; default none",
        choices=("full", "selective"),
    )
    recompute_method: str | None = flag(
        None, "which layers, for full: in equal groups or the first", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = flag(
        None, "layers of a group (uniform) or of a stage (block)", at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and schedule."""

    optimizer: str = flag("adam", "update rule", choices=("adam", "sgd"))
    lr: float | None = flag(None, "highest learning rate; needed to train", above=0)
    min_lr: float = flag(0.0, "lowest learning rate", at_least=0)
    lr_decay_style: str = flag(
        "linear",
        "shape of the decay",
        choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    )
    lr_decay_iters: int | None = flag(
        None, "step at which min-lr is reached; default train-iters", at_least=1
    )
    lr_decay_samples: int | None = flag(
        None, "the same in samples, with --train-samples", at_least=1
    )
    lr_warmup_iters: int = flag(0, "steps of linear warm-up", at_least=0)
    lr_warmup_samples: int = flag(0, "the same in samples, with --train-samples", at_least=0)
    lr_warmup_fraction: float | None = flag(
        None, "warm-up as a share of the decay, 0 to 1", at_least=0, below=1
    )
    lr_warmup_init: float = flag(0.0, "learning rate at step 0 of the warm-up", at_least=0)
    lr_wsd_decay_style: str = flag(
        "exponential",
        "shape of the final decay of WSD",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_wsd_decay_iters: int | None = flag(None, "steps of the final decay of WSD", at_least=1)
    weight_decay: float = flag(0.01, "decoupled for adam; not on biases and norms", at_least=0)
    start_weight_decay: float | None = flag(
        None, "weight decay at step 0, where it is not constant", at_least=0
    )
    end_weight_decay: float | None = flag(
        None, "weight decay at the end, where it is not constant", at_least=0
    )
    weight_decay_incr_style: str = flag(
        "constant", "shape of its increase", choices=("constant", "linear", "cosine")
    )
    adam_beta1: float = flag(0.9, "decay of Adam's first moment", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "decay of Adam's second moment", at_least=0, below=1)
    adam_eps: float = flag(1e-8, "added to the root of Adam's second moment", above=0)
    sgd_momentum: float = flag(0.9, "momentum of sgd", at_least=0, below=1)
    clip_grad: float = flag(1.0, "largest L2 norm of all gradients together; 0 = off", at_least=0)
    override_opt_param_scheduler: bool = flag(
        False,
        "the typed schedule wins over the checkpoint's",
        aliases=("--override-opt_param-scheduler",),
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False,
        "the checkpoint's schedule wins over the typed one",
        aliases=("--use-checkpoint-opt_param-scheduler",),
    )


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Precision."""

    bf16: bool = flag(False, "bfloat16 weights and activations; default float32")
    fp16: bool = flag(False, "float16 weights and activations; default float32")


@dataclass(frozen=True, kw_only=True)
class TrainPrecision(Precision):
    """Precision."""

    loss_scale: float | None = flag(
        None, "fixed factor on the loss under fp16; default adapts it", above=0
    )
    initial_loss_scale: float = flag(2.0**32, "where the adapted factor begins", at_least=1)
    grad_reduce_in_bf16: bool = flag(
        False, "reduce gradients in bfloat16 instead of float32, under bf16"
    )


TOKENIZERS = (
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
    "HuggingFaceTokenizer",
    "GPT2BPETokenizer",
    "NullTokenizer",
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Tokenizer."""

    tokenizer_type: str | None = flag(None, "kind of tokenizer", choices=TOKENIZERS)
    tokenizer_model: str | None = flag(None, "tokenizer file, or a Hugging Face folder or name")
    vocab_file: str | None = flag(None, "vocab.json of GPT2BPETokenizer")
    merge_file: str | None = flag(None, "merges.txt of GPT2BPETokenizer")
    vocab_size: int | None = flag(
        None, "tokens of NullTokenizer, without the end of document", at_least=1
    )
    trust_remote_code: bool = flag(False, "let a Hugging Face tokenizer run its own code")


@dataclass(frozen=True, kw_only=True)
class NeededTokenizer(Tokenizer):
    """Tokenizer."""

    tokenizer_type: str = flag(REQUIRED, "kind of tokenizer", choices=TOKENIZERS)


@dataclass(frozen=True, kw_only=True)
class Data(Tokenizer):
    """Data and tokenizer."""

    data_path: tuple[str, ...] = flag(
        (), "indexed data without .bin and .idx: PATH, or WEIGHT PATH WEIGHT PATH ..."
    )
    data_args_path: str | None = flag(None, "file with the words of --data-path, for long blends")
    train_data_path: tuple[str, ...] = flag((), "as --data-path, for training only")
    per_split_data_args_path: str | None = flag(
        None, 'JSON file {"train": [...], "valid": [...], "test": [...]} of such words'
    )
    split: str | None = flag(
        None, "shares of --data-path for training, validation and test; default 969,30,1"
    )
    data_cache_path: str | None = flag(None, "folder of sample indices; default beside the data")
    mock_data: bool = flag(False, "made-up tokens instead of data")
    num_workers: int = flag(2, "loader processes of a rank; 0 = none", at_least=0)
    reset_position_ids: bool = flag(False, "count positions from 0 after each end of document")
    reset_attention_mask: bool = flag(False, "no attention across an end of document")
    mmap_bin_files: bool = flag(
        True, "read data files instead of mapping them", off="--no-mmap-bin-files"
    )

    # What pruning does not offer: it reads the training split and computes no loss.
    valid_data_path = test_data_path = ()
    eod_mask_loss = False


@dataclass(frozen=True, kw_only=True)
class TrainData(Data):
    """Data and tokenizer."""

    valid_data_path: tuple[str, ...] = flag((), "as --data-path, for validation only")
    test_data_path: tuple[str, ...] = flag((), "as --data-path, for the test only")
    eod_mask_loss: bool = flag(False, "no loss on end-of-document tokens")


def trust_flag() -> Any:
    """Return the switch of every program that reads a checkpoint."""
    return flag(
        False,
        "not in Megatron-LM; unpickle whatever a checkpoint holds, which runs code that it brings",
    )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints."""

    load: str | None = flag(None, "folder to read from (iter_*/ and the latest iteration)")
    save: str | None = flag(None, "folder to write to")
    ckpt_step: int | None = flag(
        None, "iteration to read from --load; default the latest", at_least=0
    )
    verify_integrity: bool = flag(
        True,
        "not in Megatron-LM 0.16.1; do not compare files with their recorded SHA-256",
        off="--no-verify-integrity",
    )
    trust_checkpoint: bool = trust_flag()


@dataclass(frozen=True, kw_only=True)
class TrainCheckpoint(Checkpoint):
    """Checkpoints."""

    save_interval: int | None = flag(
        None, "steps between checkpoints", at_least=1, aliases=("--persistent-save-interval",)
    )
    save_retain_interval: int | None = flag(
        None, "keep only iterations divisible by this, and the latest; default all", at_least=1
    )
    finetune: bool = flag(False, "take only the weights from --load and begin at iteration 0")
    pretrained_checkpoint: str | None = flag(
        None, "weights to begin with where --load has no checkpoint yet"
    )
    save_optim: bool = flag(True, "save no optimizer state", off="--no-save-optim")
    load_optim: bool = flag(True, "load no optimizer state", off="--no-load-optim")
    save_rng: bool = flag(True, "save no random state", off="--no-save-rng")
    load_rng: bool = flag(True, "load no random state", off="--no-load-rng")
    exit_on_missing_checkpoint: bool = flag(
        False, "fail where --load has no checkpoint, also if it is --save"
    )
    ckpt_format: str = flag("torch_dist", "format on disk", choices=("torch_dist",))


@dataclass(frozen=True, kw_only=True)
class Log:
    """Evaluation and logging."""

    log_interval: int = flag(100, "steps between log lines", at_least=1)
    eval_iters: int = flag(100, "batches of one evaluation; 0 = none", at_least=0)
    eval_interval: int | None = flag(None, "steps between evaluations; default none", at_least=1)
    tensorboard_dir: str | None = flag(None, "folder of TensorBoard events; default none")
    wandb_project: str | None = flag(None, "Weights & Biases project; default none")
    wandb_exp_name: str | None = flag(None, "name of the run there")
    wandb_entity: str | None = flag(None, "user or team there")
    wandb_save_dir: str | None = flag(None, "folder of its files; default --save")
    progress: bool = flag(False, "not in Megatron-LM; a progress bar with the time left")


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distillation (not in Megatron-LM)."""

    teacher_load: str | None = flag(
        None,
        "folder of the teacher's checkpoint; default no teacher",
        aliases=("--export-kd-teacher-load",),
    )
    kd_teacher_store: str | None = flag(
        None,
        "folder of tools/store_teacher.py in place of a teacher: forward KL over the stored tokens",
    )
    export_kd_cfg: str | None = flag(
        None, "Model Optimizer's YAML file of distillation settings; typed flags win over it"
    )
    kd_loss: str = flag(
        "forward-kl",
        "between the distributions of teacher and student over the vocabulary",
        choices=("forward-kl", "reverse-kl", "jsd", "mse", "cosine"),
    )
    kd_loss_weight: float = flag(1.0, "weight of the distillation loss", above=0)
    kd_temperature: float = flag(1.0, "softmax temperature of teacher and student", above=0)
    kd_temperature_squared: bool = flag(
        False,
        "multiply the loss by temperature^2, which keeps its gradient's size; off as in paper",
    )
    kd_jsd_beta: float = flag(
        0.5, "of jsd: weight of the teacher, near 0 forward KL, near 1 reverse KL", above=0, below=1
    )
    kd_top_k: int | None = flag(
        None, "forward KL over the teacher's K likeliest tokens only; default all", at_least=1
    )
    kd_top_k_rest: str = flag(
        "drop",
        "the other tokens: left out, both distributions renormalised, or one bucket more",
        choices=("drop", "tail"),
    )
    kd_lm_loss_weight: float = flag(
        0.0, "weight of the language-model loss beside it; 0 leaves it out", at_least=0
    )
    kd_fused_output: bool = flag(
        False,
        "compute logits, losses and their gradients in chunks of positions: never all logits in "
        "memory",
    )
    kd_hidden_states: str | None = flag(
        None,
        "states to compare too, teacher:student with layers from 0, e.g. "
        "29:13,embedding,mlp:29:13,attention:29:13 (outputs of layers, of the embedding, inputs of "
        "MLPs, outputs of attention)",
    )
    kd_hidden_loss: str = flag(
        "cosine", "between hidden states, normalised", choices=("cosine", "mse")
    )
    kd_alpha: str = flag(
        "dynamic",
        "weight of the hidden-state losses, summed over pairs: a number above 0, or dynamic: "
        "distillation loss / hidden loss of the step before",
    )
    kd_projection: str = flag(
        "shared",
        "trained map from the student's width to the teacher's: one for all pairs or one for each",
        choices=("shared", "per-pair"),
    )


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Pruning (not in Megatron-LM)."""

    target_hidden_size: int | None = flag(None, "default as the source", at_least=1)
    target_ffn_hidden_size: int | None = flag(None, "default as the source", at_least=1)
    target_num_attention_heads: int | None = flag(
        None, "default as the source; the same number of each query group", at_least=1
    )
    target_num_query_groups: int | None = flag(
        None,
        "whole groups are removed; keep a multiple of every TP size to be used; default as the "
        "source",
        at_least=1,
    )
    target_num_experts: int | None = flag(None, "default as the source", at_least=1)
    target_moe_ffn_hidden_size: int | None = flag(
        None, "neurons of each expert; default as the source", at_least=1
    )
    target_moe_shared_expert_intermediate_size: int | None = flag(
        None, "neurons of the shared experts; default as the source", at_least=1
    )
    target_num_layers: int | None = flag(None, "default as the source", at_least=1)
    targets: str | None = flag(
        None,
        "YAML file with several targets for one set of scores, name: {hidden_size: N, ...}; each "
        "is saved to SAVE/name, its plan to PLAN/name.json; with --target-params it is read if it "
        "exists and written otherwise",
    )
    target_params: float | None = flag(
        None,
        "every model of --search-space with about so many parameters, embeddings included, is a "
        "target, as in --targets; e.g. 4e9",
        above=0,
    )
    target_tolerance: float = flag(
        0.05, "how far from --target-params, as a share of it", at_least=0, below=1
    )
    search_space: str | None = flag(
        None,
        "YAML file with the values to try of each size, hidden_size: [2560, 3072]; neurons also as "
        "multiples of hidden_size, ffn_hidden_size: [2.5x, 3x]",
    )
    calibration_samples: int = flag(1024, "samples that the scores are measured on", at_least=1)
    importance: str = flag(
        "activation",
        "what scores units: activations, or without any data the weights' L2 norm or chance (of "
        "--seed)",
        choices=("activation", "magnitude", "random"),
    )
    importance_batch: str = flag(
        "l2", "activations of a unit over samples", choices=("mean", "l2", "var")
    )
    importance_sequence: str = flag(
        "mean", "over the positions of a sample, before that", choices=("mean", "l2", "var")
    )
    importance_neurons: str = flag(
        "post", "neurons after the activation function or before it", choices=("post", "pre")
    )
    importance_heads: str = flag(
        "norm-first",
        "L2 norm of a head's output per token, or of its aggregated channels",
        choices=("norm-first", "aggregate-first"),
    )
    depth_importance: str = flag(
        "block",
        "how layers are scored: block importance in the same passes as the rest, or the loss or KL "
        "of the model without a layer, a pass for each layer",
        choices=("block", "loss", "kl"),
    )
    depth_block: int = flag(1, "contiguous layers that are scored and removed together", at_least=1)
    depth_rescore: bool = flag(
        False, "remove one layer (or block) at a time and score the rest again each time"
    )
    prune_iterations: int = flag(
        1, "steps to the target widths, scored in between; 1 = one-shot", at_least=1
    )
    head_residual: str = flag(
        "none",
        "fold each pruned head into a kept one: 2 kept - pruned (paper), or pruned (laco)",
        choices=("none", "paper", "laco"),
    )
    scores: str | None = flag(None, "scores file: read if it exists, written otherwise")
    plan: str | None = flag(None, "plan file: read if it exists, written otherwise")


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Dry run (not in Megatron-LM)."""

    dry_run: bool = flag(
        False,
        "check flags, sizes, layout and data, estimate memory and time, print them and OK; no "
        "weights, ranks or GPU",
    )
    world_size: int | None = flag(
        None,
        "of --dry-run: ranks of the run; default WORLD_SIZE of the environment, or 1",
        at_least=1,
    )
    load_config: str | None = flag(
        None,
        "of --dry-run: Hugging Face config.json of --load, where no checkpoint is there yet, or of "
        "the model it was pruned from, with the sizes that differ typed",
    )
    gpu: str = flag("H100", "of --dry-run: of every rank", choices=tuple(GPUS))
    mfu: float = flag(
        0.4, "of --dry-run: share of the GPU's peak reached while it computes", above=0, at_most=1
    )

    # Not of the run: not printed or saved with its flags.
    about_run = False


@dataclass(frozen=True, kw_only=True)
class TrainDryRun(DryRun):
    """Dry run (not in Megatron-LM)."""

    teacher_config: str | None = flag(
        None, "of --dry-run: config.json of --teacher-load, where no checkpoint is there yet"
    )


# Flags of everyone's Megatron-LM scripts that have no effect here: number of values, reason.
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
    "--tp-comm-overlap": (0, "its buffers have one width, teacher and student have two"),
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
