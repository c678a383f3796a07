# One image for every step, on GPU and CPU alike; `make image` builds it, `make image-test` runs every component inside it.
# BASE: Debian with Python 3.11, named by its digest. It has no default, because a tag can be moved to another image.
ARG BASE

FROM ${BASE} AS packages
WORKDIR /app
COPY pyproject.toml requirements.lock ./
# uv comes from the lock as well.
RUN sed -n '/^uv==/,/[^\\]$/p' requirements.lock > /tmp/uv.lock \
    && sed -nE '/^(hatchling|editables)==/,/[^\\]$/p' requirements.lock > /tmp/build.lock \
    && python3 -m venv /opt/uv \
    && /opt/uv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: -r /tmp/uv.lock
# The lock is a constraint with hashes: a package that is not in it, or has another hash, stops the build.
RUN python3 -m venv --without-pip /opt/cbd \
    && /opt/uv/bin/uv pip install --python /opt/cbd/bin/python --no-cache --compile-bytecode --require-hashes \
        --constraint requirements.lock --build-constraints requirements.lock --extra pipeline -r pyproject.toml -r /tmp/build.lock

# The project in a folder of its own, so that the layer of packages, nearly all of the image, stays the same until the lock changes.
FROM packages AS project
COPY . .
RUN /opt/uv/bin/uv pip install --python /opt/cbd/bin/python --prefix /opt/project --no-cache --offline --no-deps --no-build-isolation -e . \
    && rm /opt/project/.lock \
    && PYTHONPATH=$(echo /opt/project/lib/*/site-packages) /opt/cbd/bin/python -m components.bom > /opt/project/bom.cdx.json \
    && /opt/cbd/bin/python -m compileall -q cbd components pipelines

FROM ${BASE}
# The data registry is a git repository.
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY --from=packages /opt/cbd /opt/cbd
COPY --from=project /opt/project /opt/cbd
COPY --from=project /app /app
# Nothing is written but under /tmp and what is mounted, so that any user id and a read-only root file system will do.
# The two folders of nvidia: there and nowhere else GKE mounts the driver's libraries.
ENV PATH=/opt/cbd/bin:/usr/local/bin:/usr/bin:/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    HOME=/tmp USER=cbd LOGNAME=cbd MPLCONFIGDIR=/tmp/matplotlib DVC_SITE_CACHE_DIR=/tmp/dvc \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
WORKDIR /tmp
USER 10001:10001
CMD ["cbd", "--help"]
ARG BASE
ARG COMMIT
ARG VERSION
LABEL org.opencontainers.image.title="cbd" \
      org.opencontainers.image.description="Train image classifiers on data nobody vouches for" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.base.name="${BASE}" \
      cbd.sbom="/opt/cbd/bom.cdx.json"
