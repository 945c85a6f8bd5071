# syntax=docker/dockerfile:1
# The base image of a worker. A tenant's image adds its packages and its code, as root; both are read-only at run time:
#
#   FROM gen-worker
#   USER root
#   RUN pip install diffusers
#   COPY . /app
#   RUN mkdir -p .cozy && python -m gen_worker.discover > .cozy/manifest.json
#   USER worker
#
# CUDA:  docker build -t gen-worker .
#        PyPI's Linux build of torch brings the CUDA runtime; the host gives the driver (docker run --gpus all).
# CPU:   docker build -t gen-worker --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU wheels> .
# Bare:  docker build -t gen-worker --build-arg TORCH= .     for tenants that bring a torch of their own, or none

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/worker
ENV PATH=/opt/worker/bin:$PATH
# First and alone: the layer is gigabytes and changes seldom.
RUN if [ -n "$TORCH" ]; then pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH" && pip install safetensors; fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gen_worker gen_worker
COPY supervisor supervisor
COPY executor executor
RUN pip install .

FROM python:${PYTHON_VERSION}-slim
RUN useradd --create-home --uid 10001 worker
COPY --from=build /opt/worker /opt/worker
ENV PATH=/opt/worker/bin:$PATH PYTHONUNBUFFERED=1
USER worker
WORKDIR /app
# No init in front of it: the supervisor reaps and drains as PID 1, and an init would keep its environment readable.
ENTRYPOINT ["gen-worker-supervisor"]
