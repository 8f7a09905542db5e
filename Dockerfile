# Images to train in: on NVIDIA's for GPUs (default), on Python's for CPUs.
#
#     docker build -t minitron .                         GPUs
#     docker build -t minitron-test --target test .      the same with lint and tests
#     docker build -t minitron-cpu --target cpu .        CPUs; runs the quickstart
#
#     docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#         -v "$PWD/runs:/runs" -e WORK=/runs minitron bash examples/llama3.1-8b-to-4b/run.sh prune-width
#     docker run --rm minitron-test                      tests need no GPU: leave --gpus out
#     docker run --rm -v "$PWD/runs:/runs" minitron-cpu
#
# The user is minitron (10001); --user "$(id -u)" lets it write into your folders. For SLURM, see
# docs/clusters.md.

FROM python:3.11-slim AS cpu
# PIP_EXTRA_INDEX_URL may name an index of CPU builds of torch: PyPI's bring CUDA, several GB.
ARG PIP_EXTRA_INDEX_URL
# A compiler for the losses' C (optional), git for the commit in reports.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --no-log-init --uid 10001 minitron && mkdir -m 777 /runs
WORKDIR /opt/minitron
COPY pyproject.toml README.md ./
COPY megatron_ext megatron_ext
RUN python -m pip install --no-cache-dir -e ".[test]"
COPY . .
ENV NO_VENV=1 HOME=/home/minitron
USER 10001
CMD ["bash", "examples/quickstart/run.sh", "/runs/quickstart"]

# What megatron-core 0.16.1 is tested on: torch, Transformer Engine, Triton and Apex stay as they are.
FROM nvcr.io/nvidia/pytorch:25.11-py3 AS base
# The image's own constraints pin what is pinned otherwise here.
ENV PIP_CONSTRAINT=""
RUN useradd --create-home --no-log-init --uid 10001 minitron && mkdir -m 777 /runs
WORKDIR /opt/minitron
COPY pyproject.toml README.md ./
COPY megatron_ext megatron_ext
COPY tools/container_pins.py tools/container_pins.py
RUN python tools/container_pins.py pyproject.toml /tmp/requirements.txt /tmp/constraints.txt \
    && python -m pip install --no-cache-dir -r /tmp/requirements.txt -c /tmp/constraints.txt \
    && python -m pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && rm /tmp/requirements.txt
COPY . .
ENV NO_VENV=1 HOME=/home/minitron

FROM base AS test
RUN python tools/container_pins.py pyproject.toml /tmp/requirements.txt /tmp/constraints.txt test \
    && python -m pip install --no-cache-dir -r /tmp/requirements.txt -c /tmp/constraints.txt \
    && rm /tmp/requirements.txt
USER 10001
CMD ["bash", "tests/run.sh", "-p", "no:cacheprovider"]

FROM base AS gpu
USER 10001
CMD ["bash"]
