# Every target makes what it needs: `make demo` and `make test` work in a fresh clone with Python >= 3.11.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# Where runs, their MLflow store and downloaded data are kept.
export CVDIST_STORAGE ?= $(CURDIR)/runs
# The order in which groups of tests begin is that of tests/conftest.py.
IN_ORDER := --no-loadscope-reorder

# $(call install,ENVIRONMENT,LOCK): with uv where it is there and finds all that pip would, else with pip. Both show on
# a terminal how far they are.
define install
@index=$$($(1)/bin/python -m pip config get :env:.index-url 2> /dev/null || \
  $(1)/bin/python -m pip config get global.index-url 2> /dev/null || true); \
quiet=$$([ -t 1 ] || echo --quiet); \
{ command -v uv > /dev/null && env $${index:+UV_DEFAULT_INDEX="$$index"} uv pip install $$quiet \
  --python $(1)/bin/python --require-hashes --no-deps -r $(2); } || \
$(1)/bin/python -m pip install $$quiet --disable-pip-version-check --require-hashes --no-deps -r $(2)
endef

.PHONY: help demo test test-unit test-faults lint bench bench-readers soak ui screenshots stack stack-env stack-down image clean lock

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing into $(VENV), once: 7 GB on Linux, where torch brings CUDA along; two to five minutes"
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(call install,$(VENV),requirements-dev.lock)
	touch $@

demo: $(STAMP)  ## train the CNN on 5,000 digits with two Ray workers, in a few minutes
	$(PY) jobs/train.py digits-cnn

test: $(STAMP)  ## all tests but those of test-faults: eleven minutes on two idle cores
	$(PY) -m pytest -n 3 $(IN_ORDER) tests/unit tests/integration

test-unit: $(STAMP)  ## the tests that need no server and no cluster: about a minute
	$(PY) -m pytest -n 2 $(IN_ORDER) tests/unit

test-faults: $(STAMP)  ## all that can fail on a cluster: ten minutes, as root; ARGS='-m "not slow"' leaves out three cases
	$(PY) -m pytest -n 2 $(IN_ORDER) tests/cluster $(ARGS)

lint: $(STAMP)  ## style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(STAMP)  ## all benchmarks, or ONLY=name; fails where a ratio falls short
	$(PY) benchmarks/run.py $(ONLY)

READERS := .venv-bench

bench-readers: $(STAMP)  ## reading from the cache against litdata, mosaicml-streaming, webdataset and Ray Data
	$(PYTHON) -m venv $(READERS)
	$(PY) -c 'import site; print(site.getsitepackages()[0])' > "$$(echo $(READERS)/lib/python*/site-packages)/cvdist.pth"
	$(READERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/readers.txt
	$(READERS)/bin/python benchmarks/run.py feature_readers

MINUTES ?= 30
SEED ?= 0

soak: $(STAMP)  ## MINUTES=30 of faults from a list with SEED=0 on a cluster in namespaces; needs root on Linux
	$(PY) tests/cluster/soak.py $(MINUTES) $(SEED)

ui: $(STAMP)  ## the MLflow UI on the runs in ./runs, on port 5000 of this machine
	@echo "open in a browser: localhost:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=cvdist"
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(VENV)/bin/mlflow ui \
	  --backend-store-uri 'sqlite:///$(subst %,%25,$(CVDIST_STORAGE))/mlflow.db' --port 5000

screenshots: $(STAMP)  ## take the documents' pictures again, from the newest run in ./runs (make demo); needs Chromium
	$(PY) docs/screenshots.py

SERVER := .venv-mlflow

$(SERVER)/.installed: requirements-mlflow.lock
	rm -rf $(SERVER)
	$(PYTHON) -m venv $(SERVER)
	$(call install,$(SERVER),$<)
	touch $@

stack-env: $(STAMP) $(SERVER)/.installed

stack: stack-env  ## the parts of a cluster on this machine: S3, MLflow on PostgreSQL, Ray; ARGS="--workers 4 ..."
	$(PY) k8s/stack.py up $(ARGS)

stack-down: $(STAMP)  ## end them; their data stays in ./stack
	$(PY) k8s/stack.py down $(ARGS)

VARIANT ?= cuda

image:  ## the container images, with docker, podman or buildah; VARIANT=cpu for machines without GPUs
	k8s/image.sh $(VARIANT)

lock: $(STAMP)  ## write the lock files again after a change of pyproject.toml
	$(PY) -m pip install --quiet uv
	$(PY) -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --extra demo pyproject.toml -o requirements.lock
	$(PY) -m uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	  --extra demo --extra timm --extra heif --extra jxl --extra onnx --group dev pyproject.toml -c requirements.lock -o requirements-dev.lock
	grep -oE '^mlflow[a-z-]*==[^ ]+' requirements.lock | $(PY) -m uv pip compile -q --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --group mlflow-server -c - -o requirements-mlflow.lock

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(READERS) $(SERVER) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
