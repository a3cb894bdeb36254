# All set-up there is: `make demo` and `make test` make .venv and install into it when needed.
# PYTHON=python3.12 picks the interpreter (3.11 or later); EXTRAS=cuda or EXTRAS=tpu picks the device.

PYTHON ?= python3
EXTRAS ?=
# Test files that run at a time; one on a GPU or TPU, which a process takes for itself.
WORKERS ?= $(if $(EXTRAS),0,2)
# What `make parity` runs; MARKS=parity adds the slow ones at full size.
MARKS ?= parity and not slow

# Large blocks of memory come in pages of 2 MB where Linux grants them: a training step on a CPU then takes an eighth less
# time, which went into clearing pages of 4 kB (glibc; others do not look at it).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

RUN := .venv/bin/python
INSTALLED := .venv/installed$(EXTRAS:%=-%)
REFERENCES := .venv/installed-parity
DEMO := runs/demo
comma := ,
# The tests run on the CPU unless another device was asked for.
TEST_PLATFORMS := $(EXTRAS:%=%,)cpu

.PHONY: help demo test parity lint format clean

help:
	@echo "make demo     train the demo (VAE, then text to image) and judge it: $(DEMO)/samples.png, report.json"
	@echo "make test     run the tests"
	@echo "make parity   install torch and diffusers as well, and compare with them"
	@echo "make lint     ruff check and ruff format --check"
	@echo "make format   ruff check --fix and ruff format"
	@echo "make clean    remove caches and build leftovers (not .venv, not runs)"

demo: $(INSTALLED)
	$(RUN) train.py --config=configs/demo.py:autoencoder --workdir=$(DEMO)/autoencoder
	$(RUN) train.py --config=configs/demo.py:text_to_image --workdir=$(DEMO)/text_to_image
	$(RUN) -m sd_jax.evals --checkpoint=$(DEMO)/text_to_image --out=$(DEMO) --two_objects=0 \
		--stages=$(DEMO)/autoencoder,$(DEMO)/text_to_image

test: $(INSTALLED)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-$(TEST_PLATFORMS)} $(RUN) -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

parity: $(REFERENCES)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-$(TEST_PLATFORMS)} $(RUN) -m pytest -n $(WORKERS) --dist=loadfile --no-loadscope-reorder -m "$(MARKS)"

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(INSTALLED): setup.py constraints.txt | .venv/bin/python
	@echo "installing into .venv (minutes; about 1.5 GB on disk, more with EXTRAS)"
	$(RUN) -m pip install -qq --constraint constraints.txt --editable ".[test$(EXTRAS:%=$(comma)%)]"
	@touch $@

# k-diffusion, open_clip, lycoris and spandrel without their own requirements, of which the tests need two small ones.
$(REFERENCES): $(INSTALLED)
	@echo "installing the references of the parity tests (torch, diffusers, k-diffusion, open_clip, and others)"
	$(RUN) -m pip install -qq --constraint constraints.txt --editable ".[parity]"
	$(RUN) -m pip install -qq --constraint constraints.txt --no-deps k-diffusion open_clip_torch \
		lycoris-lora spandrel einops toml
	@touch $@
