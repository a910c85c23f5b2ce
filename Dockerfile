# The command `histodiffusion` with all it needs; docs/cluster.md says how it is used.
# The wheels of torch bring CUDA; the driver is that of the host.
FROM python:3.12-slim

# For --compile.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml README.md LICENSE /source/
COPY configs /source/configs
COPY workflow /source/workflow
COPY ldm /source/ldm
# `--build-arg PIP_INDEX_URL=...` takes packages from elsewhere.
ARG PIP_INDEX_URL
RUN pip install --no-cache-dir "/source[slides]" && rm -rf /source

# Any user may write the weights, results and caches: `--user` makes files one's own.
RUN useradd --create-home --uid 1000 histo && mkdir --mode=1777 /cache /work
ENV HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch HOME=/tmp USER=histo
VOLUME ["/cache", "/work"]
WORKDIR /work
USER 1000

ENTRYPOINT ["histodiffusion"]
CMD ["--help"]
