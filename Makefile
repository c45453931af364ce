# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is imported is compiled then; most of what is installed never is.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
RUN := runs/shapes

.PHONY: demo emoji emoji-data test test-slow install-highest test-highest lint plan gpu-check cluster-check \
	docs docs-check pages-check clean

demo: $(VENV)/run.stamp
	$(BIN)/python train.py --config=shapes --workdir=$(RUN)
	$(BIN)/python eval.py --config=shapes --workdir=$(RUN)

# Real drawings: trains on three styles, evaluates on a fourth. Some fifteen minutes on two cores.
EMOJI := $(patsubst data_sets/%.tar.gz,data/%.tar,$(wildcard data_sets/emoji/*.tar.gz))

emoji: $(VENV)/run.stamp emoji-data
	$(BIN)/python train.py --config=emoji --workdir=runs/emoji
	$(BIN)/python eval.py --config=emoji --workdir=runs/emoji

emoji-data: $(EMOJI)

data/emoji/%.tar: data_sets/emoji/%.tar.gz
	mkdir -p $(@D)
	gzip -dc $< > $@.part
	mv $@.part $@

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

# What takes minutes to compile, or repeats whole runs: not in CI, but before a release.
test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m slow

# The core tests with the newest JAX that requirements.txt allows; `make test` on Python 3.11 uses the
# oldest.
NEWEST := python3.13
CORE := $(addprefix tests/test_,mesh.py launch.py collectives.py losses.py)
# What may depend on the version of JAX: meshes, shard_map and types of axes.
VERSIONED := mesh or launch or collectives or equals_reference and 8 or explicit or axes or shard_map

install-highest:
	$(MAKE) --no-print-directory VENV=.venv-highest PYTHON=$(NEWEST) .venv-highest/core.stamp

test-highest: install-highest
	.venv-highest/bin/python -m pytest $(CORE) -k '$(VERSIONED)'

$(VENV)/core.stamp: $(VENV)/run.stamp requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@

# The paper's model on the paper's 8 GPUs, compiled without one: its largest batch and twice that,
# then by microbatches up to a million. Some six minutes.
PLAN := $(BIN)/python -m disco_jax.plan --config=vit_b32_laion400m --topology=a100-40gb:8 \
	--config.model.text_groups=

plan: $(VENV)/plan.stamp
	$(PLAN) --batch_size=32768,65536 --compare=disco,ring
	$(PLAN) --config.microbatch=1024 --batch_size=65536,262144,1048576 \
		--compare=auto,disco,stream,ring --chart=runs/plan.png

# Whether what the docs claim holds on this machine's accelerators, in at most ten minutes.
# PLATFORM=cpu runs a small version on the CPU. Install JAX for the accelerator first, e.g. with
# `.venv/bin/pip install -U "jax[cuda12]"`.
gpu-check: $(VENV)/run.stamp
	$(BIN)/python -m disco_jax.accept $(if $(PLATFORM),--platform=$(PLATFORM)) --out=runs/check

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Runs under real schedulers, which it does not install: Slurm on two nodes of this machine, Open MPI 4,
# and the Kubernetes manifests against the API's schemas. Five to ten minutes.
cluster-check: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 0 -vv tests/cluster tests/test_manifests.py

# Runs the commands of README.md and docs/, shortened where they would take hours.
docs-check: $(VENV)/dev.stamp
	$(BIN)/python scripts/check_docs.py

# The documentation site, in build/site: open its index.html, or `$(BIN)/mkdocs serve`.
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The site and a report in a headless Chromium, which it does not install, at the widths of a desktop
# and a phone. Leaves screenshots in build/pages. A minute.
pages-check: docs $(VENV)/dev.stamp
	$(INSTALL) -r requirements-pages.txt
	$(BIN)/python -m pytest -n 0 -q tests/pages

clean:
	rm -rf $(RUN)

$(VENV)/run.stamp: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/plan.stamp: $(VENV)/run.stamp requirements-plan.txt
	$(INSTALL) -r requirements-plan.txt
	touch $@

$(VENV)/docs.stamp: $(VENV)/run.stamp requirements-docs.txt
	$(INSTALL) -r requirements-docs.txt
	touch $@

$(VENV)/dev.stamp: $(VENV)/plan.stamp requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	touch $@
