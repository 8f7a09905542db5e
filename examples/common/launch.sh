# shellcheck shell=bash
# Sourced by the examples: one way to start a program, wherever it runs.
#
#   launch PROGRAM ARGUMENTS...
#   alone PROGRAM ARGUMENTS...      one process, whatever the layout; of several tasks the first
#
# DRY_RUN=1            check it for NODES x GPUS_PER_NODE ranks with --dry-run and DRY_FLAGS
# in a task of srun    one of a task per GPU: the program itself; SLURM says which rank it is
#                      one of a task per node: torchrun, which meets the others at MASTER_ADDR
# else                 torchrun on this machine alone
#
# Returns the program's own code (torchrun's is 1 whatever its ranks return): 0 done, 75 stopped and
# saved, so that the same command goes on. SIGTERM, SIGINT and SIGUSR1 ask for that.
: "${GPUS_PER_NODE:=8}" "${DRY_RUN:=0}"
DRY_FLAGS=()

# Habits of Megatron-LM on GPUs. The first is for tensor and context parallelism before Blackwell.
: "${CUDA_DEVICE_MAX_CONNECTIONS:=1}" "${OMP_NUM_THREADS:=1}" "${TOKENIZERS_PARALLELISM:=false}"
: "${TORCH_NCCL_AVOID_RECORD_STREAMS:=1}" "${PYTORCH_CUDA_ALLOC_CONF:=expandable_segments:True}"
: "${NCCL_DEBUG:=WARN}" "${PYTHONFAULTHANDLER:=1}"
# Seconds that torchrun leaves its ranks to save after a signal, before it kills them.
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=900}"
export CUDA_DEVICE_MAX_CONNECTIONS OMP_NUM_THREADS TOKENIZERS_PARALLELISM NCCL_DEBUG
export TORCH_NCCL_AVOID_RECORD_STREAMS PYTORCH_CUDA_ALLOC_CONF PYTHONFAULTHANDLER
# Ranks that torchrun starts again (--max-restarts) otherwise find the store of those that failed.
: "${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:=1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT TORCH_DISABLE_SHARE_RDZV_TCP_STORE

launch() {
    if [ "$DRY_RUN" = 1 ]; then
        python "$@" --dry-run --world-size $((${NODES:-1} * GPUS_PER_NODE)) "${DRY_FLAGS[@]}"
    elif [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_NTASKS:-1}" -gt "${SLURM_NNODES:-1}" ]; then
        trap : TERM INT USR1 # the program gets it too: stay for its code
        python "$@"
    elif [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_NNODES:-1}" -gt 1 ]; then
        run_ranks torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS_PER_NODE" \
            --max-restarts 0 --rdzv-backend c10d \
            --rdzv-endpoint "${MASTER_ADDR:?job.sbatch sets it}:${MASTER_PORT:-29500}" \
            --rdzv-id "${SLURM_JOB_ID:?srun sets it}-${SLURM_RESTART_COUNT:-0}" "$@"
    else
        run_ranks torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" "$@"
    fi
}

alone() {
    if [ "$DRY_RUN" = 1 ]; then
        python "$@" --dry-run "${DRY_FLAGS[@]}"
    elif [ -z "${SLURM_STEP_ID:-}" ] || [ "${SLURM_PROCID:-0}" = 0 ]; then
        SLURM_NTASKS=1 python "$@" # or it would wait for the other tasks, which have nothing to do
    fi
}

# Run torchrun and return its ranks' code.
run_ranks() {
    local code=0 pid said session=(setsid)
    EXIT_CODE_FILE=$(mktemp)
    export EXIT_CODE_FILE
    # torchrun passes SIGTERM on and counts down to a kill; SIGUSR1 would end it, and reaches the
    # ranks without it. By hand it has a session of its own: a terminal's Ctrl-C comes through here
    # only. SLURM may know its processes by their session.
    [ -z "${SLURM_STEP_ID:-}" ] || session=()
    (
        trap '' USR1
        exec "${session[@]}" "$@"
    ) &
    pid=$!
    if [ -n "${SLURM_STEP_ID:-}" ]; then
        trap : TERM INT USR1 # SLURM signals every process: a second one would hurry torchrun
    else
        trap 'kill -TERM "$pid" 2>/dev/null || true' TERM INT USR1
    fi
    while :; do
        wait "$pid" && code=0 || code=$?
        kill -0 "$pid" 2>/dev/null || break # a signal ends wait, not torchrun
    done
    trap - TERM INT USR1
    said=$(cat "$EXIT_CODE_FILE")
    rm -f "$EXIT_CODE_FILE"
    return "${said:-$code}"
}
