"""Megatron-LM's flags of the programs but the model's sizes: name, type, default and help.

Names, defaults and spelling are Megatron-LM's (core_v0.19.2) unless the help says otherwise. One
dataclass per group. A program's group inherits from the group that it shares with the other
program, so that neither offers a flag that it would ignore.
"""

from dataclasses import dataclass
from typing import Any

from megatron_ext.cli.parser import REQUIRED, flag


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
    decoder_first_pipeline_num_layers: int | None = flag(
        None, "layers of the first stage; default as many as the others", at_least=0
    )
    decoder_last_pipeline_num_layers: int | None = flag(
        None, "layers of the last stage; default as many as the others", at_least=0
    )
    overlap_p2p_comm: bool = flag(
        True,
        "interleaved pipeline: wait for each transfer between stages",
        off="--no-overlap-p2p-communication",
    )
    overlap_p2p_communication_warmup_flush: bool = flag(
        False,
        "overlap transfers between stages at the beginning and the end of a step too",
        setting="overlap_p2p_comm_warmup_flush",
    )
    context_parallel_size: int = flag(1, "ranks that share each sequence (CP)", at_least=1)
    sequence_parallel: bool = flag(
        False, "split activations between layers over TP; no effect without TP"
    )
    distributed_backend: str | None = flag(
        None, "default nccl on CUDA, gloo on CPU", choices=("nccl", "gloo")
    )
    distributed_timeout_minutes: int = flag(10, "of every collective, minutes", at_least=1)
    deterministic_mode: bool = flag(
        False,
        "only kernels that give the same bits each time; slower",
        setting="deterministic_mode",
    )
    disable_bf16_reduced_precision_matmul: bool = flag(
        False, "add products of bfloat16 matrices in float32 throughout, on a GPU"
    )
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
        setting="cp_comm_type",
    )

    expert_model_parallel_size: int = flag(
        1, "data and context parallel ranks that share the experts (EP); TP splits each", at_least=1
    )

    expert_tensor_parallel_size: int | None = flag(
        None,
        "ranks that share an expert's layers; must equal --tensor-model-parallel-size",
        at_least=1,
    )

    moe_router_dtype: str | None = flag(
        None, "of a router's scores; default the weights'", choices=("fp32", "fp64")
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
    # numpy's, and Megatron-LM adds to it.
    seed: int = flag(1234, "of data order, new weights and dropout", at_least=0, at_most=2**31 - 1)


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
        "activations computed again in backward: of some modules or whole layers; default none",
        choices=("full", "selective"),
        shorthands={"--recompute-activations": "selective"},
    )
    recompute_method: str | None = flag(
        None, "which layers, for full: in equal groups or the first", choices=("uniform", "block")
    )
    recompute_num_layers: int | None = flag(
        None, "layers of a group (uniform) or of a stage (block)", at_least=1
    )
    recompute_modules: tuple[str, ...] = flag(
        (),
        "which modules, for selective: core attention, norms, MLPs, mixtures of experts, the "
        "experts' activation function, shared experts; default core_attn",
        choices=("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"),
    )


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer and schedule."""

    optimizer: str = flag("adam", "update rule", choices=("adam", "sgd"))
    lr: float | None = flag(None, "highest learning rate; needed to train", above=0)
    min_lr: float = flag(0.0, "lowest learning rate", at_least=0)
    decoupled_lr: float | None = flag(
        None, "highest learning rate of embedding and output layer; default lr", above=0
    )
    decoupled_min_lr: float | None = flag(
        None, "lowest learning rate of embedding and output layer; default min-lr", at_least=0
    )
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
    lr_wsd_decay_samples: int | None = flag(
        None, "the same in samples, with --train-samples", at_least=1
    )
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
    min_loss_scale: float = flag(1.0, "lowest factor that it adapts to", above=0)
    loss_scale_window: float = flag(1000, "steps without overflow before it grows", at_least=1)
    hysteresis: int = flag(2, "steps with overflow before it shrinks", at_least=1)
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

    tokenizer_type: str | None = flag(
        None, "kind of tokenizer; default the one beside the checkpoint", choices=TOKENIZERS
    )
    tokenizer_model: str | None = flag(None, "tokenizer file, or a Hugging Face folder or name")
    vocab_file: str | None = flag(None, "vocab.json of GPT2BPETokenizer")
    merge_file: str | None = flag(None, "merges.txt of GPT2BPETokenizer")
    vocab_size: int | None = flag(
        None, "tokens of NullTokenizer; the last one ends documents", at_least=1
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
        "on here, off in Megatron-LM; do not compare files with their recorded SHA-256",
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
