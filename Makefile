# Every target sets up .venv by itself; nothing else is needed but Python 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test lint bench compile-check gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready  ## Complete Python code with the model in the box.
	$(BIN)/python -m glmjax.generate --temperature 0.4 --random-seed 5 --max-new-tokens 40 < docs/demo.txt

test: $(VENV)/ready  ## The whole test suite, on the CPU.
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/ready  ## Speed and memory on this machine.
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.load_memory --formats bf16 fp8 orbax

compile-check: $(VENV)/ready .aot/ready  ## Compile kernels and model for an H200; no GPU needed.
	JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/.aot $(BIN)/python -m glmjax.pallas.aot

gpu: $(VENV)/ready  ## Correctness on an NVIDIA GPU.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gpu]'
	JAX_PLATFORMS=cuda $(BIN)/python -m pytest -m gpu

$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.12 or newer is needed, this is {v.major}.{v.minor}; set PYTHON=…" if v < (3, 12) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The CUDA plugin stays out of .venv, where it would complain on every machine without a GPU. Where there is no CUDA
# toolkit, its compiler and libdevice come as wheels.
.aot/ready: pyproject.toml | $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target .aot \
	  jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
	  $$(test -x /usr/local/cuda/bin/ptxas -a -e /usr/local/cuda/nvvm/libdevice/libdevice.10.bc \
	    || echo nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88)
	touch $@

clean:
	rm -rf $(VENV) .aot build dist *.egg-info
