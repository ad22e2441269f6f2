# The server: Flower's SuperLink and SuperExec, the ServerApp, torch. From the repository's root: docker build -f docker/server.Dockerfile .
# BASE: Debian with Python 3.11 to 3.13. PIP_ARGS: arguments for pip; without the CPU builds' index torch brings gigabytes of CUDA.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
WORKDIR /source
RUN python3 -m venv /opt/fedssl
# What it needs, first: a change of the code does not fetch it again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedssl/__init__.py fedssl/
RUN /opt/fedssl/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ${PIP_ARGS} '.[server]'
COPY fedssl fedssl/
COPY server server/
COPY client client/
COPY simulations simulations/
RUN /opt/fedssl/bin/pip install --no-cache-dir --disable-pip-version-check --force-reinstall --no-deps ${PIP_ARGS} .

FROM ${BASE}
# HANDOVER: folders for keys that `fedssl server init` made and others need; a volume takes owner and mode from the image's folder.
ARG HANDOVER="proxy anna ben cleo"
RUN groupadd --gid 10001 fedssl && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp fedssl \
    && install -d -m 0700 -o fedssl -g fedssl /var/lib/fedssl /handover \
    && for name in ${HANDOVER}; do install -d -m 0700 -o fedssl -g fedssl "/handover/${name}"; done
COPY --from=build /opt/fedssl /opt/fedssl
COPY docker/health.py /usr/local/bin/fedssl-health
ENV PATH=/opt/fedssl/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/fedssl
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=20s --start-period=300s CMD ["fedssl-health", "server"]
CMD ["fedssl", "server", "start", "/var/lib/fedssl/server"]
