# An image for pyxis (enroot import dockerd://longctx) or Apptainer (apptainer build longctx.sif docker-daemon://longctx:latest).
#   docker build -t longctx --build-arg TORCH_BUILD=cu128 --build-arg PIP_EXTRA_INDEX_URL=<index that has it> .
FROM python:3.11-slim
ARG TORCH_BUILD=cpu
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/longctx
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ make iproute2 && rm -rf /var/lib/apt/lists/*
COPY . .
RUN make install PYTHON=python TORCH_BUILD=$TORCH_BUILD
ENV PATH=/opt/longctx/.venv/bin:$PATH
