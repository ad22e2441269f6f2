# The reverse proxy: Debian's nginx, which passes what nodes ask of the SuperLink and nothing else. From the repository's root.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates curl nginx-light && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 fedssl && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp fedssl \
    && install -d -m 0700 -o fedssl -g fedssl /etc/fedssl
COPY docker/nginx.conf /etc/nginx/fedssl.conf
USER 10001:10001
EXPOSE 8443
STOPSIGNAL SIGQUIT
HEALTHCHECK --interval=15s --timeout=20s --start-period=300s CMD ["curl", "--fail", "--silent", "--cacert", "/etc/fedssl/ca.crt", "https://localhost:8443/health"]
CMD ["nginx", "-e", "stderr", "-c", "/etc/nginx/fedssl.conf", "-g", "daemon off;"]
