# One file for all images: docker build --target control|worker-cpu|worker-cuda .
# Without a "syntax" line (it fetches a frontend), here-documents and COPY --link, so that Docker 20.10 builds it as well.
# Behind a proxy, or with your own package index: --secret id=pip_conf,src=pip.conf --secret id=ca,src=bundle.pem. Their
# content is in no layer. tests/deploy/images.py builds and runs the first two targets.

# torch for each kind of worker: options of pip, and one requirement. The version is that of constraints.txt.
ARG TORCH_CPU="--index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
ARG TORCH_CUDA="torch==2.13.0"

# The base of every image: Debian, its Python, and an init that forwards signals and reaps zombies.
FROM debian:bookworm-slim AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 tini \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/* /var/cache/debconf/*-old /var/log/*.log /var/log/apt
# The directories belong to group 0, so that a user whose number the cluster chooses may write to them too.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/espalier --shell /usr/sbin/nologin espalier \
    && install --directory --owner=10001 --group=0 --mode=0770 \
        /var/lib/espalier /var/lib/espalier/cache /var/lib/espalier/scratch \
    && install --directory /models /etc/espalier
ENV PATH=/opt/espalier/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/espalier \
    ESPALIER_CACHE_DIR=/var/lib/espalier/cache \
    ESPALIER_SCRATCH_DIR=/var/lib/espalier/scratch \
    ESPALIER_MANAGEMENT_PORT=9464
WORKDIR /var/lib/espalier

# Environments are made at the path that they have in the images.
FROM runtime AS builder
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv /opt/espalier

# The requirements of each image, in a separate stage: other changes of pyproject.toml do not rebuild the environments.
FROM builder AS requirements
COPY pyproject.toml deploy/images/requirements.py ./
RUN python3 requirements.py api schedule cli tracing > control.txt \
    && python3 requirements.py worker tracing > worker.txt

FROM builder AS control-environment
COPY constraints.txt deploy/images/slim.py ./
COPY --from=requirements /build/control.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install --constraint constraints.txt --requirement control.txt \
    && python3 slim.py

FROM builder AS worker-cpu-environment
ARG TORCH_CPU
COPY constraints.txt deploy/images/slim.py ./
COPY --from=requirements /build/worker.txt ./
# torch alone, from its publisher's index; everything else from the usual one.
# hadolint ignore=SC2086,DL3013
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install --no-deps ${TORCH_CPU} \
    && pip install --constraint constraints.txt --requirement worker.txt \
    && python3 slim.py --without-cuda

FROM builder AS worker-cuda-environment
ARG TORCH_CUDA
COPY constraints.txt deploy/images/slim.py ./
COPY --from=requirements /build/worker.txt ./
# hadolint ignore=SC2086
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install --constraint constraints.txt ${TORCH_CUDA} \
    && pip install --constraint constraints.txt --requirement worker.txt \
    && python3 slim.py

# The service itself, in a separate layer: a change of the sources does not rebuild the layers above.
FROM builder AS package
COPY pyproject.toml README.md LICENSE ./
COPY api ./api
COPY cli ./cli
COPY core ./core
COPY local ./local
COPY migrations ./migrations
COPY schedule ./schedule
COPY worker ./worker
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=secret,id=ca \
    pip install --no-deps --target /package/site . \
    && mv /package/site/bin /package/bin

FROM runtime AS control
COPY --from=control-environment /opt/espalier /opt/espalier
COPY --from=package /package/site /opt/espalier/lib/python3.11/site-packages
COPY --from=package /package/bin /opt/espalier/bin
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="espalier-control" \
    org.opencontainers.image.description="Espalier: API, schedule and command line" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
ENV ESPALIER_COMMIT=${REVISION}
USER 10001:10001
EXPOSE 8000 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "core.telemetry.health"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["espalier", "--help"]

FROM runtime AS worker-cpu
COPY --from=worker-cpu-environment /opt/espalier /opt/espalier
COPY --from=package /package/site /opt/espalier/lib/python3.11/site-packages
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="espalier-worker-cpu" \
    org.opencontainers.image.description="Espalier: a worker without a GPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
ENV ESPALIER_COMMIT=${REVISION}
USER 10001:10001
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "core.telemetry.health"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "worker"]

FROM runtime AS worker-cuda
COPY --from=worker-cuda-environment /opt/espalier /opt/espalier
COPY --from=package /package/site /opt/espalier/lib/python3.11/site-packages
ARG VERSION=unknown REVISION=unknown CREATED=unknown
LABEL org.opencontainers.image.title="espalier-worker-cuda" \
    org.opencontainers.image.description="Espalier: a worker on an NVIDIA GPU" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}"
ENV ESPALIER_COMMIT=${REVISION} NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 9464
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "core.telemetry.health"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python", "-m", "worker"]
