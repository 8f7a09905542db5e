#!/usr/bin/env bash
# Check this project on a machine with one GPU and write what was found into docs/gpu.md, which see.
# Another Python: PYTHON=python3 tools/gpu_check.sh; packages that lie elsewhere (Transformer Engine):
# PYTHONPATH=/their/folder tools/gpu_check.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Fresh memory costs more than the arithmetic on the CPU that trims.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999
export CUDA_DEVICE_MAX_CONNECTIONS=1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" "$root/tools/gpu_check.py" "$@"
