#!/usr/bin/env bash
# Submit steps of an example as jobs, each after the one before has ended well.
#
#     bash examples/common/submit.sh examples/llama3.1-8b-to-4b import prune-width distil-width
#
# What config.sh says of nodes, time and container holds, and SBATCH_ACCOUNT, SBATCH_PARTITION and
# the like of the environment.
set -euo pipefail
folder=$(realpath "${1:?usage: submit.sh EXAMPLE STEP...}")
shift
cd "$(dirname "$0")/../.."
# shellcheck disable=SC1091 # the path is an argument
source "$folder/config.sh"
mkdir -p logs
before=
for step in "$@"; do
    nodes=1
    case $step in correct* | distil*) nodes=$TRAIN_NODES ;; esac
    dependency=singleton${before:+,afterok:$before}
    before=$(sbatch --parsable --job-name="$(basename "$folder")-$step" --nodes="$nodes" \
        --gpus-per-node="$GPUS_PER_NODE" --dependency="$dependency" --kill-on-invalid-dep=yes \
        examples/common/job.sbatch "$folder/run.sh" "$step")
    before=${before%%;*} # job;cluster
    echo "$before $step on $nodes nodes"
done
