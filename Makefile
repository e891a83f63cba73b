# From a fresh clone with Python 3.11 or newer and a C++17 compiler: `make test`, `make demo`.
#
#   PYTHON=python3.12   the interpreter that the virtual environment is made from
#   EXTRAS=demo,dev     what is installed beside irl_ops (pyproject.toml), and beside what is there
#   ARGS="--steps 20"   passed on to the demo or to pytest
#   WORKERS=8           processes that `make test` runs the tests in; one per core, and at most 4
#   MINUTES=10          how long `make fuzz` goes on
#   PIP_QUIET=1         pip says nothing while it works

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= demo,dev
ARGS   ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
MINUTES ?= 10
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
comma  := ,
CPP    := $(wildcard $(foreach room,kernels/cpu irl_ops/algebra/cpu bindings,$(room)/*.cpp $(room)/*.h))

# The compiler of the environment, else the first one found; setuptools reads the variable.
ifeq ($(origin CXX),default)
CXX := $(firstword $(foreach name,c++ g++ clang++,$(shell command -v $(name))))
endif
export CXX

# These need neither JAX nor the compilers for GPUs and TPUs.
DEMOS := demo toy-mdp study profile-steps
ifneq ($(MAKECMDGOALS),)
ifeq ($(filter-out $(DEMOS),$(MAKECMDGOALS)),)
ifeq ($(origin EXTRAS),file)
EXTRAS := demo
endif
endif
endif

# Nothing that is installed is taken away: `make demo` after `make test` finds what it needs.
HAVE   := $(subst $(comma), ,$(shell cat $(READY) 2>/dev/null))
WANT   := $(subst $(comma), ,$(EXTRAS))
ALL    := $(subst $() ,$(comma),$(sort $(HAVE) $(WANT)))

.DEFAULT_GOAL := help
.PHONY: help test demo study profile-steps toy-mdp demo-jax fuzz mutants bench bench-parallel aot-tpu aot-gpu gpu-check bench-gpu lint wheel clean FORCE

help:           ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

test: $(READY)  ## run the tests; ARGS=-v names each as it ends
	@echo 'about half an hour on two cores; some tests compile for minutes; ARGS=-v names each as it ends'
	$(BIN)/python -P -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

demo: $(READY)  ## fine-tune a small model with IQLearn and with MLE, and compare them
	$(BIN)/python examples/finetune_transformers.py $(ARGS)

toy-mdp: $(READY)  ## Fig. 11: what samples add to demonstrations, by objective
	$(BIN)/python examples/toy_mdp.py $(ARGS)

study: $(READY)  ## quality beside diversity for all losses, three seeds; 21 to 38 minutes of CPU time
	$(BIN)/python examples/run_study.py $(ARGS)

profile-steps: $(READY)  ## Table 1: what an update costs with each system, as a ratio of MLE's
	$(BIN)/python examples/profile_steps.py $(ARGS)

# An environment of its own: without torch, and without the TPU compiler of the tests, which JAX
# would ask for TPUs.
demo-jax:       ## the same in JAX, with flax and optax
	@$(MAKE) --no-print-directory VENV=$(VENV)-jax EXTRAS=demo-jax $(VENV)-jax/.ready
	$(VENV)-jax/bin/python examples/jax_finetune.py $(ARGS)

fuzz: $(READY)  ## all property tests on all backends, with new examples, for MINUTES=10
	$(BIN)/python -P tests/fuzz.py --minutes $(MINUTES) $(ARGS)

mutants: $(READY)  ## break the kernels and the algebra on purpose: does a test notice each time?
	$(BIN)/python -P tests/mutants.py $(ARGS)

bench: $(READY) ## time the losses of torch and of JAX beside a copy of the logits and other libraries
	$(BIN)/python -P -m pytest benchmarks --benchmark-only $(ARGS)

bench-parallel: $(READY)  ## two processes: bytes sent and time of losses over a sharded vocabulary
	$(BIN)/python benchmarks/bench_parallel.py $(ARGS)

aot-gpu: $(READY)  ## compile the GPU kernels for GPUs that are not here; registers, spills, widths
	$(BIN)/python benchmarks/aot_gpu.py --save $(ARGS)

aot-tpu: $(READY)  ## compile the losses for TPUs that are not here; memory, bytes, schedules
	$(BIN)/python benchmarks/aot_tpu.py --save $(ARGS)

gpu-check: $(READY)  ## on a GPU: the property tests on the device, and what only a GPU can show
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

bench-gpu: $(READY)  ## on a GPU: time the losses beside a copy and other libraries
	$(BIN)/python benchmarks/gpu_bench.py $(ARGS)

lint: $(READY)  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(wildcard tests/cpp/*)

# In an environment of its own too, which is ready in seconds.
wheel:          ## build dist/*.tar.gz, and dist/*.whl from it
	@$(PYTHON) -c "$$CHECK_MACHINE"
	test -x $(VENV)-build/bin/python || $(PYTHON) -m venv $(VENV)-build
	$(VENV)-build/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt build
	rm -rf build dist
	$(VENV)-build/bin/python -m build

clean:          ## remove the virtual environment and everything that was built
	rm -rf $(VENV) $(VENV)-jax $(VENV)-build build dist *.egg-info irl_ops/_native*.so irl_ops/kernels

# The install is editable: Python edits are live, and an edit of the C++ sources builds them again.
# The stamp holds the extras, so that asking for others installs them beside these.
$(READY): pyproject.toml setup.py constraints.txt $(CPP) $(if $(filter-out $(HAVE),$(WANT)),FORCE)
	@$(PYTHON) -c "$$CHECK_MACHINE"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'pip installs irl_ops[$(ALL)] into $(VENV), the first time for some minutes'
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(ALL)]'
	ln -sfn ../kernels irl_ops/kernels  # mypy and editors do not see through an editable install
	@echo '$(ALL)' > $@

# Runs on any Python, however old, to say what is missing.
define CHECK_MACHINE
import os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit("irl_ops needs Python 3.11 or newer, and %s is %s. Name another: make PYTHON=python3.12"
             % (sys.executable, sys.version.split()[0]))
if not os.environ.get("CXX"):
    sys.exit("No C++ compiler found (c++, g++ or clang++). Install one, or name it: make CXX=...")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit("Python.h of %s is missing: install its development headers (python3-dev on Debian)."
             % sys.executable)
endef
export CHECK_MACHINE
