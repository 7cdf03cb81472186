# Every target sets up .venv by itself; nothing else is needed but Python 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export JAX_PLATFORMS ?= cpu

.PHONY: demo test soak lint bench hf-compare compile-check gpu gpu-wheels clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready  ## Complete Python code with the model in the box.
	$(BIN)/python -m glmjax.generate --temperature 0.6 --random-seed 1 --max-new-tokens 40 < docs/demo.txt

test: $(VENV)/ready  ## The whole test suite, on the CPU.
	$(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(VENV)/ready  ## Races and an engine for a long time: no wrong token, no lost page, no growth.
	$(BIN)/python -m pytest -m soak tests/serving/test_soak.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/ready  ## Speed and memory on this machine.
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.load_memory --formats bf16 fp8 orbax

hf-compare: $(VENV)/ready  ## Beside Hugging Face transformers, for which Python 3.11 is needed too.
	$(BIN)/python -m benchmarks.compare_hf

compile-check: $(VENV)/ready .aot/ready  ## Compile kernels and model for an H200; no GPU needed.
	LLVM_DISABLE_SYMBOLIZATION=1 JAX_PLATFORMS=cpu PYTHONPATH=$(CURDIR)/.aot $(BIN)/python -m glmjax.pallas.aot

gpu:  ## Correctness and speed on an NVIDIA GPU in three minutes, into one JSON file; see gpu-wheels.
	$(MAKE) $(if $(GPU_PYTHON),.gpu/ready,$(VENV)/gpu)
	rm -f .gpu/tests.xml; failed=0; \
	export JAX_PLATFORMS=$(GPU_PLATFORM) PATH="$$PATH:/usr/local/cuda/bin" LLVM_DISABLE_SYMBOLIZATION=1 $(GPU_PATH); \
	XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_FLAGS=--xla_gpu_autotune_level=0 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 \
	  timeout 80 $(GPU_RUN) -m pytest -m gpu -n 4 -p xdist.plugin -W default -o faulthandler_timeout=50 \
	  -o faulthandler_exit_on_timeout=true -o junit_family=xunit1 --junitxml=.gpu/tests.xml tests/gpu || failed=1; \
	timeout 100 $(GPU_RUN) -m benchmarks.gpu --size $(GPU_SIZE) --tests .gpu/tests.xml --out $(GPU_OUT) || failed=1; \
	exit $$failed

# An interpreter that has JAX for CUDA is used as it is and asks for no network: what else it lacks is taken from .whl.
# Where there is none, .venv gets JAX for CUDA.
GPU_PYTHON ?= $(shell python3 -c 'from importlib.metadata import version as v; assert v("jax") == v("jax-cuda13-plugin") == "0.11.2"' 2>/dev/null && echo python3)
GPU_RUN = $(if $(GPU_PYTHON),$(GPU_PYTHON),$(BIN)/python)
GPU_PATH = $(if $(GPU_PYTHON),PYTHONPATH=$(CURDIR)/.gpu)
GPU_PLATFORM ?= cuda
GPU_SIZE ?= glm-5.1
GPU_OUT ?= benchmarks/results/h200/$(shell date -u +%F).json

.gpu/ready: $(wildcard .whl/*.whl)
	mkdir -p .gpu
	@test -z "$^" || $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
	  --upgrade --target .gpu $^
	touch $@

$(VENV)/gpu: | $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gpu]'
	mkdir -p .gpu
	touch $@

gpu-wheels: $(VENV)/ready  ## What .venv has and a machine with JAX for CUDA may lack or have older, for x86-64 Linux.
	rm -rf .whl
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest .whl \
	  $$($(BIN)/python -m pip freeze | grep -E '^($(subst $() ,|,$(GPU_WHEELS)))==')
GPU_WHEELS = beartype docstring_parser execnet flax iniconfig jaxtyping pluggy pytest pytest-xdist safetensors \
  tokenizers tqdm typeguard tyro wadler_lindig

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
	rm -rf $(VENV) .aot .gpu .whl .hf build dist *.egg-info
