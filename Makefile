# Every target installs what it needs. Two commands matter: `make demo` and `make test`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
UV := .build/uv/bin/uv
PY := .venv/bin/python
export OMP_NUM_THREADS ?= 1
# Compiled once, outside the tree: every test process would compile torch and transformers anew.
export PYTHONPYCACHEPREFIX := $(CURDIR)/.build/pycache
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env demo test check lint unit trainer cluster e2e test-long generate bench down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# ---- environment ---------------------------------------------------------------------------------
env: .venv/.stamp ## the locked Python environment in .venv

$(UV):
	@echo "── uv $(UV_VERSION)"
	@python3 -m venv .build/uv && .build/uv/bin/pip install --quiet uv==$(UV_VERSION)

.venv/.stamp: $(UV) pyproject.toml uv.lock
	@echo "── Python environment (torch and DeepSpeed make this the largest download)"
	@$(UV) sync --frozen --quiet --extra dev --python python3.11
	@touch $@

# ---- the two commands -----------------------------------------------------------------------------
demo: env ## the whole chain on a real Kubernetes, live (KUBECONFIG=… uses your cluster instead)
	@$(PY) -m demo $(if $(filter command line,$(origin KUBECONFIG)),--kubeconfig $(KUBECONFIG))

test: env ## every tier: check, trainer, cluster, e2e (under 45 minutes cold on 2 cores)
	@$(PY) -m tests.run

# ---- tiers -------------------------------------------------------------------------------------------
check: env ## lint, types, layers, generated files, unit and property tests (no cluster)
	@$(PY) -m tests.run check

trainer: env ## real DeepSpeed on one and two CPU processes
	@$(PY) -m tests.run trainer

cluster: env ## a real etcd and kube-apiserver
	@$(PY) -m tests.run cluster

e2e: env ## the sandbox: real pods, real images, the Helm chart
	@$(PY) -m tests.run e2e

test-long: env ## what needs many seeds or hours; results are committed
	@$(PY) -m tests.run long

generate: env ## CRDs, RBAC, API and metrics reference from the code
	@$(PY) -m rlhf_operator.generate

bench: env ## every benchmark; tables go to benchmarks/results/
	@$(PY) -m benchmarks

down: ## remove the sandbox cluster
	@if [ -x $(PY) ]; then $(PY) -m sandbox down; fi

clean: down ## remove the sandbox and everything built in this folder
	rm -rf .venv .build .sandbox .demo
