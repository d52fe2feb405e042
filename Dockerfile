# An image for KubeRay and for `ray up`: raylign, Ray and torch, for CPUs or, by another index of torch's, for CUDA.
#   docker build -t raylign .
#   docker build -t raylign:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# KubeRay asks its probes with wget; Triton's kernels need a compiler where there is a GPU.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev procps wget \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/raylign
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch==2.13.0
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt '.[qlora]'

RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
ENV RAY_USAGE_STATS_ENABLED=0
CMD ["raylign", "--help"]
