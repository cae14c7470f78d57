# Two images from one file: cvdist (the default) and, with --target mlflow, the tracking server.
#
#   make image VARIANT=cpu        # with docker, podman or buildah, whichever is here
#
# VARIANT=cuda: PyTorch's wheels bring CUDA; the node brings the driver. VARIANT=cpu: the same wheels without what
# is only loaded where there is a GPU.
ARG BASE=python:3.11-slim-bookworm


# PyTorch and CUDA: large, and as old as its last update, so in a layer of its own.
FROM ${BASE} AS torch
ARG VARIANT=cuda
COPY requirements.lock /
# An entry of the lock is a line that begins with a name, and indented ones with its hashes.
RUN awk '/^[a-z]/ {mine = /^(torch|torchvision|triton|cuda-.*|nvidia-.*)==/ && !/^nvidia-ml-py==/} mine' requirements.lock > torch.lock \
 && if [ "$VARIANT" = cpu ]; then awk '/^[a-z]/ {mine = !/^(triton|cuda-bindings|cuda-pathfinder)==/} mine' torch.lock > t && mv t torch.lock; fi
# With the base's own pip: the environment in the image has none.
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
      --no-deps --require-hashes -r torch.lock


# All the rest.
FROM torch AS packages
RUN awk '/^[a-z]/ {mine = !/^(torch|torchvision|triton|cuda-.*|nvidia-.*)==/ || /^nvidia-ml-py==/} mine' requirements.lock > rest.lock \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
      --prefix /opt/rest --no-deps --require-hashes -r rest.lock


# In the CPU variant, the libraries that no process without a GPU maps are deleted.
FROM packages AS trimmed
ARG VARIANT=cuda
COPY k8s/keep_mapped.py /
RUN if [ "$VARIANT" = cpu ]; then \
      PYTHONPATH=$(echo /opt/rest/lib/python3*/site-packages) /opt/venv/bin/python keep_mapped.py; fi


FROM ${BASE} AS mlflow-packages
COPY requirements-mlflow.lock /
RUN python3 -m venv --without-pip /opt/venv \
 && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --disable-pip-version-check \
      --no-deps --require-hashes -r requirements-mlflow.lock


# What both images run as.
FROM ${BASE} AS runtime
# Kubernetes' `runAsNonRoot` needs a number; ray's own images use the same one.
RUN useradd --uid 1000 --no-create-home --home-dir /tmp --shell /bin/bash cvdist
# The root file system may be read-only: all that writes does it below /tmp, or where CVDIST_CACHE says.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    USER=cvdist \
    TMPDIR=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
LABEL org.opencontainers.image.licenses=Apache-2.0


FROM runtime AS mlflow
COPY --from=mlflow-packages /opt/venv /opt/venv
USER 1000:1000
EXPOSE 5000
CMD ["mlflow", "server", "--host", "0.0.0.0"]
# Last, here and below: a new commit leaves the layers of packages as they are.
ARG VERSION=
ARG COMMIT=
LABEL org.opencontainers.image.title="MLflow server for cvdist" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT


FROM runtime AS cvdist
# KubeRay replaces the command with `ray start ...`, in bash; its probes of Ray 2.53 and newer are HTTP requests of
# the kubelet, so neither wget nor curl is needed.
COPY --from=trimmed /opt/venv /opt/venv
COPY --from=packages /opt/rest /opt/venv
COPY LICENSE /app/
COPY jobs /app/jobs
COPY cvdist /app/cvdist
# Bytecode now: later there may be no place for it.
RUN python -m compileall -q /app
WORKDIR /app
USER 1000:1000
CMD ["python", "jobs/train.py"]
ARG VERSION=
ARG COMMIT=
# Runs log the commit that they were made with.
ENV CVDIST_COMMIT=$COMMIT
LABEL org.opencontainers.image.title="cvdist" \
      org.opencontainers.image.description="Distributed training of image classifiers on Ray clusters, tracked in MLflow" \
      org.opencontainers.image.version=$VERSION \
      org.opencontainers.image.revision=$COMMIT
