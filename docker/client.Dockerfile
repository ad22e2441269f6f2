# A device: the agent, or the SuperNode beside it. From the repository's root: docker build -f docker/client.Dockerfile .
# EXTRA=agent records and recommends by onnxruntime, and serves as a SuperNode; EXTRA=client trains too, and has torch for it. The rest as for the server.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE} AS build
ARG EXTRA=client
ARG PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
WORKDIR /source
RUN python3 -m venv /opt/fedssl
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fedssl/__init__.py fedssl/
RUN /opt/fedssl/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ${PIP_ARGS} ".[${EXTRA}]"
COPY fedssl fedssl/
COPY server server/
COPY client client/
COPY simulations simulations/
RUN /opt/fedssl/bin/pip install --no-cache-dir --disable-pip-version-check --force-reinstall --no-deps ${PIP_ARGS} .

FROM ${BASE}
# Two users: what a server ships through Flower runs as `node`, and reaches the agent's training socket alone.
RUN groupadd --gid 10001 node && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp node \
    && groupadd --gid 10002 agent && useradd --uid 10002 --gid 10002 --no-create-home --home-dir /tmp agent \
    && install -d -m 0700 -o agent -g agent /var/lib/fedssl/device \
    && install -d -m 0755 -o agent -g agent /run/fedssl \
    && install -d -m 0755 -o node -g node /var/lib/fedssl/model
COPY --from=build /opt/fedssl /opt/fedssl
COPY docker/health.py /usr/local/bin/fedssl-health
ENV PATH=/opt/fedssl/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    FLWR_HOME=/tmp/flwr FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
USER 10002:10002
WORKDIR /var/lib/fedssl
HEALTHCHECK --interval=15s --timeout=20s --start-period=300s CMD ["fedssl-health", "agent"]
CMD ["fedssl", "device", "run", "/var/lib/fedssl/device"]
