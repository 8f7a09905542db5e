"""Megatron-LM's options without a field here (0.19.2, and older ones that scripts still type).

Without effect is only what cannot change a result: how fast something is, how it is laid out, what
else is logged, and details of a feature whose switch is refused. What would change a result is
refused, unless its value is Megatron-LM's default. ``option_rows`` says how a row is read.
"""

WITHOUT_EFFECT = (
    (
        "always the case",
        "--use-mcore-models --use-dist-ckpt --use-checkpoint-args --auto-detect-ckpt-format "
        "--attention-softmax-in-fp32 --apply-query-key-layer-scaling --use-cpu-initialization "
        "--verify-integrity --no-use-tokenizer-model-from-checkpoint-args "
        "--disable-use-tokenizer-model-from-checkpoint-args "
        "--tokenizer-hf-no-include-special-tokens --disable-gloo-process-groups --disable-msc "
        "--exit-signal-handler --exit-signal-handler-for-training --log-throughput "
        "--log-memory-to-tensorboard --log-validation-ppl-to-tensorboard",
    ),
    ("see --position-embedding-type", "--no-position-embedding"),
    (
        "kernels follow from the device and --transformer-impl",
        "--no-async-tensor-model-parallel-allreduce --no-masked-softmax-fusion "
        "--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion "
        "--no-persist-layer-norm --use-flash-attn --flash-attention-version= "
        "--use-fused-weighted-squared-relu --fused-residual-rmsnorm "
        "--use-transformer-engine-op-fuser --use-te-activation-func "
        "--use-grouped-gemm-for-shared-expert --use-grouped-gemm-for-dense-mlp "
        "--moe-permute-fusion --moe-router-fusion --mla-down-proj-fusion --disable-jit-fuser "
        "--moe-single-grouped-weight --moe-single-grouped-bias --optimizer-cuda-graph "
        "--no-gradient-accumulation-fusion --disable-mamba-mem-eff-path "
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl=native",
    ),
    (
        "how ranks talk is left to torch, megatron-core's defaults and --overlap-*",
        "--pipeline-model-parallel-comm-backend= --use-ring-exchange-p2p "
        "--high-priority-a2a-comm-stream --high-priority-stream-groups=... --use-sharp "
        "--sharp-enabled-group= --nccl-communicator-config-path= --use-nccl-ub "
        "--disable-symmetric-registration --create-all-gather-group --ddp-num-buckets= "
        "--ddp-bucket-size= --ddp-pad-buckets-for-high-nccl-busbw --no-align-grad-reduce "
        "--disable-align-grad-reduce --no-align-param-gather "
        "--overlap-param-gather-with-optimizer-step --num-distributed-optimizer-instances=1 "
        "--symmetric-ar-type= --use-tp-pp-dp-mapping --overlap-moe-expert-parallel-comm "
        "--delay-wgrad-compute --overlap-dispatch-backward-with-experts-wgrad "
        "--ep-overlap-early-attn-memory-release --defer-embedding-wgrad-compute "
        "--wgrad-deferral-limit=0 --moe-shared-expert-overlap "
        "--microbatch-group-size-per-virtual-pipeline-stage= --no-tp-comm-split-ag "
        "--disable-tp-comm-split-ag --no-tp-comm-split-rs --disable-tp-comm-split-rs "
        "--reuse-grad-buf-for-mxfp8-param-ag --train-sync-interval= --lazy-mpu-init "
        "--no-use-layer-wise-param-layout",
    ),
    (
        "settings of the flex dispatcher, see --moe-token-dispatcher-type",
        "--moe-enable-deepep --moe-flex-dispatcher-backend=deepep --moe-flex-dispatcher-num-sms= "
        "--moe-permute-fusion-into-hybridep --moe-hybridep-pad-uneven-dispatch-inputs "
        "--moe-deepep-num-sms= --moe-hybridep-num-sms= --moe-hybridep-num-blocks-permute= "
        "--moe-hybridep-num-blocks-unpermute= --moe-hybridep-num-sms-preprocessing=108 "
        "--moe-ncclep-static-shape --moe-ncclep-zero-copy",
    ),
    (
        "experts pad what their kernels need",
        "--moe-router-padding-for-quantization --moe-router-padding-for-fp8",
    ),
    (
        "activations stay in the GPU's memory: --recompute-granularity saves some",
        "--cpu-offloading-num-layers=0 --cpu-offloading-retain-pinned-cpu-buffers "
        "--fine-grained-activation-offloading --offload-modules=... "
        "--min-offloaded-tensor-size=1048576 --delay-offload-until-cuda-graph "
        "--delta-offload-bytes-across-pp-ranks=0 --activation-offload-fraction=1.0 "
        "--fine-grained-offloading-max-inflight-offloads= --moe-paged-stash "
        "--moe-paged-stash-page-size=64 --moe-paged-stash-buffer-size-factor-cuda=1.1 "
        "--moe-paged-stash-buffer-size-factor-cpu=0.0 --distribute-saved-activations "
        "--moe-layer-recompute --mlp-chunks-for-training=1 --no-clone-scatter-output-in-embedding "
        "--disable-clone-scatter-output-in-embedding --empty-unused-memory-level=0 "
        "--init-model-with-meta-device",
    ),
    (
        "optimizer state stays in the GPU's memory: --use-distributed-optimizer splits it",
        "--optimizer-cpu-offload --optimizer-offload-fraction=1.0 --no-pin-cpu-grads "
        "--use-torch-optimizer-for-cpu-offload --overlap-cpu-optimizer-d2h-h2d "
        "--no-pin-cpu-params",
    ),
    (
        "checkpoints are written whole, before training goes on, and read under any layout",
        "--use-persistent-ckpt-worker --ckpt-assume-constant-structure --ckpt-fully-parallel-load "
        "--ckpt-fully-parallel-save --ckpt-fully-parallel-load-exchange-algo=broadcast "
        "--ckpt-fully-parallel-save-process-group=dp --ckpt-fully-parallel-load-process-group=dp "
        "--no-ckpt-load-validate-sharding-integrity --no-strict-fsdp-dtensor-load "
        "--disable-ckpt-load-validate-sharding-integrity --disable-strict-fsdp-dtensor-load "
        "--distrib-optim-fully-reshardable-mem-efficient --no-stream-ckpt-dequant "
        "--disable-stream-ckpt-dequant --dist-ckpt-format= --async-save --async-strategy=nvrx "
        "--async-ckpt-cpu-priority=10 --async-ckpt-io-priority=3 --async-ckpt-use-cpu-shm "
        "--dist-ckpt-workers=1 --no-ckpt-fully-parallel-save --dist-ckpt-optim-fully-reshardable",
    ),
    (
        "not logged here",
        "--tensorboard-log-interval=1 --pytorch-profiler-collect-chakra "
        "--no-log-loss-scale-to-tensorboard --log-memory-interval= "
        "--disable-log-loss-scale-to-tensorboard --log-device-memory-used --log-energy "
        "--log-max-attention-logit --log-world-size-to-tensorboard --log-straggler "
        "--straggler-ctrlr-port=65535 --straggler-minmax-count=1 --disable-straggler-on-startup "
        "--run-workload-inspector-server --config-logger-dir= --moe-per-layer-logging "
        "--moe-routing-trace-path= --moe-routing-trace-capture-logits "
        "--moe-routing-trace-max-training-iters= --moe-routing-trace-capture-hidden-states "
        "--moe-routing-trace-dump-weights --save-params-interval= --save-activations-interval= "
        "--save-tokens-per-expert-interval= --save-wgrads-interval= --save-dgrads-interval= "
        "--dump-param-to-param-group-map= --record-memory-history --record-shapes --nvtx-ranges "
        "--memory-snapshot-path=snapshot.pickle --gpu-sniff-test-interval= --no-one-logger "
        "--one-logger-project=megatron-lm --one-logger-run-name= --one-logger-async "
        "--app-tag-run-name= --app-tag-run-version=0.0.0",
    ),
    (
        "NCCL's recorder is set in the environment (TORCH_NCCL_*)",
        "--flight-recorder-dump-path= --flight-recorder-trace-buffer-size=2000 "
        "--no-flight-recorder-dump-on-timeout --disable-flight-recorder-dump-on-timeout "
        "--flight-recorder-include-stack-trace --no-flight-recorder-include-only-active "
        "--disable-flight-recorder-include-only-active --no-flight-recorder-extra-dump-on-exec "
        "--disable-flight-recorder-extra-dump-on-exec",
    ),
    (
        "no step is run twice to validate it; what is not finite always ends a run",
        "--test-mode --check-for-large-grads --check-for-spiky-loss "
        "--result-rejected-tracker-filename= --check-weight-hash-across-dp-replicas-interval= "
        "--rerun-mode=validate_results --no-check-for-nan-in-loss-and-grad",
    ),
    (
        "the launcher restarts a run, which goes on from --save",
        "--enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters=5 --adlr-autoresume "
        "--adlr-autoresume-interval=1000 --inprocess-restart --inprocess-max-iterations= "
        "--inprocess-monitor-thread-interval=1.0 --inprocess-monitor-process-interval=1.0 "
        "--inprocess-progress-watchdog-interval=1.0 --inprocess-heartbeat-interval=30 "
        "--inprocess-soft-timeout=60 --inprocess-hard-timeout=90 --inprocess-heartbeat-timeout=60 "
        "--inprocess-barrier-timeout=120 --inprocess-completion-timeout=120 "
        "--inprocess-last-call-wait=1 --inprocess-termination-grace-time=1 "
        "--inprocess-granularity=node --inprocess-active-world-size=1 "
        "--inprocess-empty-cuda-cache --exit-signal-handler-for-dataloader",
    ),
    (
        "Model Optimizer is not used; a teacher's checkpoint says its sizes",
        "--modelopt-enabled --export-kd-teacher-model-config= --export-default-te-spec "
        "--export-force-local-attention --export-te-mcore-model --export-kd-teacher-ckpt-format=",
    ),
    ("weights are drawn only where no checkpoint has them", "--no-initialization"),
    (
        "a missing or unknown tensor is always an error",
        "--dist-ckpt-strictness=assume_ok_unexpected",
    ),
    ("ranks come from the environment", "--local-rank=0"),
    ("garbage is collected at evaluations too", "--no-manual-gc-eval --disable-manual-gc-eval"),
    ("masks are made where they are needed", "--no-create-attention-mask-in-dataloader"),
    ("a batch that cannot be dealt to the ranks is refused", "--decrease-batch-size-if-needed"),
    ("losses are means over tokens, whatever the micro-batch", "--eval-micro-batch-size="),
    ("nothing here is experimental in megatron-core", "--enable-experimental"),
    (
        "the kind of random state follows from --cuda-graph-impl",
        "--te-rng-tracker --inference-rng-tracker",
    ),
    (
        "sample indices are built by one thread, checked and cached",
        "--dataloader-fast-cache-load --dataloader-defer-npy-index-mmap "
        "--num-dataset-builder-threads=1 --per-dataset-sequences-path=",
    ),
    (
        "gradients are divided once, by the tokens of the global batch",
        "--ddp-average-in-collective --no-gradient-reduce-div-fusion --calculate-per-token-loss",
    ),
    ("the case without --grad-reduce-in-bf16", "--accumulate-allreduce-grads-in-fp32"),
    ("Transformer Engine adapts scales at every step", "--fp8-interval=1"),
    ("there is no tiktoken tokenizer", "--tiktoken-pattern= --tiktoken-num-special-tokens=1000"),
    (
        "details of --optimizer muon and lion",
        "--muon-momentum=0.9 --muon-no-split-qkv --muon-nesterov --muon-scale-mode=spectral "
        "--muon-fp32-matmul-prec=medium --muon-coefficient-type=quintic --muon-num-ns-steps=5 "
        "--muon-tp-mode=blockwise --muon-extra-scale-factor=1.0 --muon-scalar-optimizer=adam "
        "--lion-beta1=0.95 --lion-beta2=0.98 --qk-clip-alpha=0.5 --qk-clip-threshold=100",
    ),
    (
        "details of --use-megatron-fsdp and --use-torch-fsdp2",
        "--fsdp-manual-registration --data-parallel-sharding-strategy=optim_grads_params "
        "--outer-dp-sharding-strategy=no_shard --fsdp-double-buffer --keep-fp8-transpose-cache "
        "--suggested-communication-unit-size= --enable-full-sharding-in-hsdp "
        "--torch-fsdp2-no-reshard-after-forward --megatron-fsdp-main-params-dtype=fp32 "
        "--megatron-fsdp-main-grads-dtype=auto --megatron-fsdp-grad-comm-dtype=auto "
        "--megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer "
        "--fsdp-db-use-persist-buf-on-alloc-fail",
    ),
    (
        "details of --multi-latent-attention",
        "--q-lora-rank= --kv-lora-rank=32 --qk-head-dim=128 --qk-pos-emb-head-dim=64 "
        "--v-head-dim=128 "
        "--cache-mla-latents",
    ),
    (
        "details of --mtp-num-layers",
        "--mtp-loss-scaling-factor=0.1 --mtp-use-repeated-layer --mtp-detach-heads "
        "--mtp-hybrid-override-pattern= --mtp-standalone",
    ),
    (
        "details of --experimental-attention-variant",
        "--dsa-indexer-n-heads= --dsa-indexer-head-dim= --dsa-indexer-topk= "
        "--dsa-indexer-topk-freq=1 --dsa-indexer-skip-topk-offset=0 --dsa-indexer-loss-coeff= "
        "--dsa-indexer-use-sparse-loss --dsa-kernel-backend=none --dsa-indexer-rope-interleaved "
        "--no-dsa-indexer-rotate-activation --disable-dsa-indexer-rotate-activation "
        "--no-dsa-indexer-scoring-relu --disable-dsa-indexer-scoring-relu "
        "--dsa-indexer-k-norm-epsilon= --dsa-indexer-k-norm-fp32 --linear-conv-kernel-dim=4 "
        "--linear-key-head-dim=128 --linear-value-head-dim=128 --linear-num-key-heads=16 "
        "--linear-num-value-heads=32",
    ),
    (
        "details of --hybrid-layer-pattern",
        "--mamba-training-ssm-states-dtype=",
    ),
    (
        "details of --position-embedding-type relative and mrope",
        "--mrope-section=... --relative-attention-num-buckets=32 "
        "--relative-attention-max-distance=128",
    ),
    (
        "details of --fp4-format and --use-kitchen-attention",
        "--fp4-recipe=nvfp4 --kitchen-attention-backend=sdpa",
    ),
    ("details of --moe-router-enable-expert-bias", "--moe-router-bias-update-rate=0.001"),
    (
        "details of --moe-expert-capacity-factor",
        "--moe-pad-expert-input-to-capacity --moe-token-drop-policy=probs",
    ),
    ("details of --moe-use-upcycling", "--moe-upcycling-granularity=1"),
    ("details of --sft", "--sft-tokenizer-prompt-format=nemotron-h-aligned"),
    ("details of --cp-comm-type a2a+p2p", "--hierarchical-context-parallel-sizes=..."),
    ("details of --hybrid-context-parallel", "--max-seqlen-per-dp-cp-rank="),
    (
        "details of --fim-data",
        "--fim-rate=0.5 --fim-spm-rate=0.5 --fim-split-sample= --fim-fragment-rate= "
        "--fim-no-prefix= --fim-prefix-token=<fim_prefix> --fim-middle-token=<fim_middle> "
        "--fim-suffix-token=<fim_suffix> --fim-pad-token=<fim_pad> --fim-eod-token=",
    ),
    (
        "details of --logits-save-dir and --logits-load-dir",
        "--logits-save-top-k= --logits-save-top-p= --logits-save-top-p-min-k=1 "
        "--logits-save-dtype=fp16 --logits-load-decode-threads=4 --logits-load-prefetch-factor=3 "
        "--logits-load-msc-prefetch-depth=2 --logits-load-kd-loss-alpha=1.0 "
        "--logits-load-ignore-errors",
    ),
    (
        "details of --non-persistent-save-interval",
        "--non-persistent-ckpt-type= --non-persistent-global-ckpt-dir= "
        "--non-persistent-local-ckpt-dir= --non-persistent-local-ckpt-algo=fully_parallel "
        "--replication --replication-jump= --replication-factor=2",
    ),
    (
        "details of --fault-injector-*",
        "--error-injection-type=transient_error --fault-injector-fault-types= "
        "--fault-injector-fault-probabilities= --fault-injector-fault-delay= "
        "--fault-injector-delay-start-iteration= --fault-injector-mtti-seconds= "
        "--fault-injector-offset-seconds= --fault-injector-seed=",
    ),
    (
        "details of --perform-rl-step",
        "--rl-prompts-per-eval=32 --grpo-prompts-per-step=32 --grpo-group-size=2 "
        "--rl-generation-lag=0 --rl-submission-granularity=B --rl-consumption-granularity=B "
        "--grpo-iterations=2 --grpo-clamp-eps-lower=0.01 --grpo-clamp-eps-upper=0.01 "
        "--grpo-kl-beta=0.001 --grpo-entropy-term-weight=0.0 "
        "--grpo-filter-groups-with-same-reward --langrl-env-config= --rl-default-temperature=1.0 "
        "--rl-default-top-p=0 --rl-default-top-k=-1 --rl-offload-optimizer-during-inference "
        "--rl-kv-cache-management-mode=persist --rl-persist-cuda-graphs "
        "--no-rl-persist-cuda-graphs --rl-partial-rollouts --no-rl-partial-rollouts "
        "--rl-inference-logprobs-is-correction --no-rl-inference-logprobs-is-correction "
        "--rl-importance-sampling-truncation-coef= --rl-use-sequence-packing "
        "--no-rl-use-sequence-packing --rl-sequence-packing-max-sequences-per-bin=50 "
        "--rl-sequence-packing-algo=fifo --rl-training-cuda-graphs --no-rl-training-cuda-graphs "
        "--rl-inference-tensor-model-parallel-size= --rl-inference-pipeline-model-parallel-size= "
        "--rl-inference-expert-model-parallel-size= "
        "--rl-inference-expert-tensor-model-parallel-size= "
        "--rl-inference-model-unified-memory-level=0 "
        "--rl-offload-inference-model-weights-when-idle "
        "--no-rl-offload-inference-model-weights-when-idle --refit-method=gloo "
        "--rl-verify-model-weights-swap --no-rl-verify-model-weights-swap --rl-skip-bos-token "
        "--no-rl-skip-bos-token --rl-profile --rl-profile-dir= --rl-inference-parsers=...",
    ),
    (
        "settings of Megatron-LM's inference; tools/generate.py has its own",
        "--flash-decode --inference-cuda-graph-scope= --nccl-all-reduce-for-prefill "
        "--inference-fuse-tp-communication --inference-disable-triton-nvls-kernels "
        "--inference-grouped-gemm-backend=vllm --inference-moe-disable-fused-quant-kernels "
        "--inference-moe-token-dispatcher-type=nvls --mlp-chunks-for-prefill=1 "
        "--moe-pad-experts-for-cuda-graph-inference --inference-batch-times-seqlen-threshold=-1 "
        "--max-tokens-to-oom=12000 --use-legacy-static-engine --inference-max-requests=8 "
        "--inference-max-seq-length=2560 --inference-dynamic-batching "
        "--inference-dynamic-batching-buffer-size-gb=40.0 "
        "--inference-dynamic-batching-paused-buffer-size-gb= "
        "--inference-dynamic-batching-mamba-memory-ratio= "
        "--inference-dynamic-batching-block-size=256 --inference-dynamic-batching-max-requests= "
        "--inference-dynamic-batching-max-tokens= --inference-dynamic-batching-num-cuda-graphs=16 "
        "--inference-dynamic-batching-track-paused-request-events "
        "--inference-dynamic-batching-track-generated-token-events --decode-only-cuda-graphs "
        "--inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens=512 "
        "--inference-dynamic-batching-unified-memory-level=0 --enable-chunked-prefill "
        "--num-speculative-tokens=0 --inference-dynamic-batching-prefix-caching "
        "--no-inference-dynamic-batching-prefix-caching "
        "--inference-dynamic-batching-prefix-caching-eviction-policy=ref_zero "
        "--inference-dynamic-batching-prefix-caching-coordinator-policy=load_balanced "
        "--inference-dynamic-batching-prefix-caching-routing-alpha=0.5 "
        "--inference-dynamic-batching-prefix-caching-mamba-gb= "
        "--inference-dynamic-batching-cuda-graph-mixed-prefill-count=16 "
        "--inference-dynamic-batching-cuda-graph-sizing-distribution=exponential "
        "--inference-dynamic-batching-sampling-backend=torch "
        "--use-same-sampling-seed-across-dp-ranks "
        "--inference-dynamic-batching-async-sched-mode=legacy "
        "--inference-dynamic-batching-logprobs-mode=raw_logprobs "
        "--inference-logging-step-interval=0 --inference-text-gen-server-logging "
        "--no-inference-text-gen-server-logging --inference-wandb-logging "
        "--no-inference-wandb-logging --inference-coordinator-port= "
        "--mamba-inference-conv-states-dtype=bf16 --mamba-inference-ssm-states-dtype=bf16 "
        "--inference-use-synchronous-zmq-collectives "
        "--no-inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus "
        "--no-inference-disable-ep-consensus --inference-shards=",
    ),
    (
        "settings of Megatron-LM's vision and retrieval programs",
        "--ict-head-size= --biencoder-projection-dim=0 --biencoder-shared-query-context-model "
        "--ict-load= --bert-load= --titles-data-path= --query-in-block-prob=0.1 "
        "--use-one-sent-docs --evidence-data-path= --retriever-report-topk-accuracies=... "
        "--retriever-score-scaling --block-data-path= --embedding-path= --indexer-batch-size=128 "
        "--indexer-log-interval=1000 --num-classes=1000 --img-h=224 --img-w=224 --num-channels=3 "
        "--patch-dim=16 --classes-fraction=1.0 --data-per-class-fraction=1.0 --no-data-sharding "
        "--vision-pretraining --vision-pretraining-type=classify --vision-backbone-type=vit "
        "--swin-backbone-type=tiny --mask-type=random --mask-factor=1.0 --iter-per-epoch=1250 "
        "--dino-local-img-size=96 --dino-local-crops-number=10 --dino-head-hidden-size=2048 "
        "--dino-bottleneck-size=256 --dino-freeze-last-layer=1 --dino-norm-last-layer "
        "--dino-warmup-teacher-temp=0.04 --dino-teacher-temp=0.07 "
        "--dino-warmup-teacher-temp-epochs=30 --output-bert-embeddings "
        "--bert-embedder-type=megatron --onnx-safe=",
    ),
)
