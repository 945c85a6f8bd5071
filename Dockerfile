# syntax=docker/dockerfile:1
# The base image of a worker. A tenant's image adds its packages and its code: examples/hello/Dockerfile.
#
# CUDA:  docker build -t gen-worker .
#        PyPI's Linux build of torch brings the CUDA runtime; the host gives the driver (docker run --gpus all).
# CPU:   docker build -t gen-worker:cpu --build-arg TORCH_BACKEND=cpu .
# Bare:  docker build -t gen-worker:bare --build-arg TORCH= .     for tenants that bring a torch of their own, or none
#
# TORCH_BACKEND is uv's: cpu, cu126, cu128 ...; empty takes PyPI's build.

ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
ARG UV_VERSION=0.13.8
ARG TORCH=torch==2.13.0
ARG TORCH_BACKEND=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON=/opt/worker/bin/python
# --seed: with a pip of its own, for tenants' images. Without, `pip` there would be that of the system's Python.
RUN pip install "uv==${UV_VERSION}" && uv venv --seed --python "$(command -v python)" /opt/worker
# First and alone: the layer is gigabytes and changes seldom.
RUN if [ -n "$TORCH" ]; then \
        uv pip install ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} "$TORCH" "safetensors>=0.5"; \
    fi
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY gen_worker gen_worker
COPY supervisor supervisor
COPY executor executor
RUN uv pip install .

FROM python:${PYTHON_VERSION}-slim
RUN useradd --create-home --uid 10001 worker
COPY --from=build /opt/worker /opt/worker
# On all addresses: on the default, loopback, nobody outside the container could probe or scrape it.
ENV PATH=/opt/worker/bin:$PATH PYTHONUNBUFFERED=1 WORKER_HTTP_ADDR=0.0.0.0:9090
EXPOSE 9090
USER 10001
WORKDIR /app
# Whoever sets another WORKER_HTTP_ADDR brings a health check of their own. Kubernetes ignores this one.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 9090, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]
# No init in front of it: the supervisor reaps and drains as PID 1, and an init would keep its environment readable.
ENTRYPOINT ["gen-worker-supervisor"]
