# Image of the server. For a GPU: docker build -t abmll .
#                      For a CPU: docker build -t abmll:cpu --build-arg ACCEL=cpu .
# Run: docker run --gpus all --ipc=host -p 8000:8000 -v abmll-store:/data/store -v abmll-hub:/data/hub abmll
# (without --gpus all on a CPU). One base image serves both: vLLM's and torch's wheels bring CUDA's libraries,
# the container runtime brings the driver's.
FROM python:3.11-slim-bookworm

ARG ACCEL=gpu

# A compiler and headers: Triton and torch.compile build kernels when the engine starts. libnuma: vLLM's CPU worker.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 abmll \
    && install --directory --owner=abmll --group=abmll /app /data/store /data/hub
USER 1000:1000
WORKDIR /app

# Dependencies first, from what names them alone: a change of code leaves this layer as it is.
COPY --chown=abmll:abmll pyproject.toml Makefile README.md ./
RUN mkdir abmll training server clients \
    && UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1 make install ACCEL=${ACCEL} \
    && .venv/bin/uv pip install --no-cache --compile-bytecode --python .venv/bin/python --editable '.[s3,cluster,nf4]'

COPY --chown=abmll:abmll abmll abmll
COPY --chown=abmll:abmll training training
COPY --chown=abmll:abmll server server
COPY --chown=abmll:abmll clients clients

ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ABMLL_STORE=/data/store \
    HF_HOME=/data/hub \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

VOLUME ["/data/store", "/data/hub"]
EXPOSE 8000

# The start counts as long as an 8-billion-parameter model may take to arrive and load. Another port: ABMLL_PORT.
HEALTHCHECK --interval=15s --timeout=5s --start-period=15m --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as web; \
        web.urlopen(f'http://127.0.0.1:{os.environ.get(\"ABMLL_PORT\", 8000)}/readyz', timeout=4)"]

ENTRYPOINT ["abmll"]
CMD ["serve", "--host", "0.0.0.0"]
