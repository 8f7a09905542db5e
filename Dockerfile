# Images to train in: on NVIDIA's for GPUs (default), on Python's for CPUs.
#
#     docker build -t minitron .                         GPUs
#     docker build -t minitron-test --target test .      the same with lint and tests
#     docker build -t minitron-cpu --target cpu .        CPUs; runs examples/from-scratch
#
#     docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#         -v "$PWD/runs:/runs" -e WORK=/runs minitron bash examples/llama3.1-8b-to-4b/run.sh prune-width
#     docker run --rm minitron-test                      tests need no GPU: leave --gpus out
#     docker run --rm -v "$PWD/runs:/runs" minitron-cpu
#
# The user is minitron (10001); --user "$(id -u)" lets it write into your folders. For SLURM, see
# docs/clusters.md.

FROM python:3.13-slim AS cpu
# PIP_EXTRA_INDEX_URL may name an index of CPU builds of torch: PyPI's bring CUDA, several GB.
ARG PIP_EXTRA_INDEX_URL
# A compiler for the losses' C (optional), git for the commit in reports.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --no-log-init --uid 10001 minitron && mkdir -m 777 /runs
WORKDIR /opt/minitron
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY megatron_ext megatron_ext
RUN python -m pip install --no-cache-dir -c constraints.txt -e ".[test]"
COPY . .
ENV NO_VENV=1 HOME=/home/minitron
USER 10001
CMD ["bash", "examples/from-scratch/run.sh", "/runs/from-scratch"]

# The image that Megatron-LM tests megatron-core 0.19 in (docker/.ngc_version.dev of core_v0.19.0):
# Python 3.12, CUDA 13.3, torch 2.13.0a0 (NVIDIA's "PyTorch Release 26.06" notes, as others quote
# them), Transformer Engine 2.16 and numpy 2.1 (as other projects list it). It was not pulled here.
FROM nvcr.io/nvidia/pytorch:26.06-py3 AS base
# The image's own constraints hold every package that it has; kept.txt those built for each other,
# so that pip fails rather than replace one.
ENV PIP_CONSTRAINT=""
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --create-home --no-log-init --uid 10001 minitron && mkdir -m 777 /runs
WORKDIR /opt/minitron
COPY pyproject.toml setup.py README.md LICENSE ./
COPY megatron_ext megatron_ext
RUN python -m pip list --format=freeze \
    | grep -iE "^(.*torch|.*triton|transformer.engine|apex|flash.attn|numpy|nvidia|cuda)" >/opt/kept.txt \
    && python -m pip install --no-cache-dir -c /opt/kept.txt -e ".[hf,log,plot]"
COPY . .
ENV NO_VENV=1 HOME=/home/minitron

FROM base AS test
RUN python -m pip install --no-cache-dir -c /opt/kept.txt -e ".[test]"
USER 10001
CMD ["bash", "tests/run.sh", "-p", "no:cacheprovider"]

FROM base AS gpu
USER 10001
CMD ["bash"]
