# Two commands: `make demo` and `make test`. Everything else is a step of one of them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FAST := .venv-fast
FAST_STAMP := $(FAST)/.installed
SOURCES := $(shell find sim profiles hwreplay experiments -name '*.py')
STAMP := $(VENV)/.installed

.PHONY: help demo figures notebooks test lint types contracts unit bench fast fast-test fast-bench wheel-test mutants engine loop faults profile-gpu replay-gpu clean

help:
	@echo "make demo   install, run the default sweep, write results/demo/"
	@echo "make figures  redraw every figure of docs/ (a minute if runs are kept, else 15)"
	@echo "make notebooks  run the notebooks again and keep their outputs (a few minutes)"
	@echo "make test   install if missing, then lint, types, import contracts, tests"
	@echo "make bench  print simulated requests per CPU second, flatness and memory (SCALE=--day: 10 million)"
	@echo "make fast   install a compiled simulator into $(FAST) (needs a C compiler; same results)"
	@echo "make fast-bench  the same of the compiled simulator; make fast-test  its tests"
	@echo "make wheel-test  the wheel in an empty folder by each Python of VERSIONS=\"3.11 3.12 3.13 3.14\" that is here"
	@echo "make mutants  plant small faults at random, print which ones the tests miss (MUTATE=, KILLERS=, MUTANTS=, SEED=)"
	@echo "make engine install the real SGLang for the CPU into .engine (about 3 GB), and the emulated card's NVML"
	@echo "make faults  kill actuator, agents, router, servers on emulated cards (TRIES=100 each; needs gcc)"
	@echo "make loop   real SGLang on emulated cards against simulator and profile (17 minutes on two cores, after make engine)"
	@echo "make profile-gpu  measure this machine's GPU into results/profiles/CARD, clocks left alone, and compare it"
	@echo "make replay-gpu   probe, simulate, replay and validate on SGLang with this machine's GPUs ($(REPLAY))"
	@echo "make clean  remove the environment and every generated file"

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/voltana demo --out results/demo

# With the runs kept in results/ a minute on two idle cores, without them fifteen more. The contest is
# drawn from results/contest.csv; CONTEST=1 runs it first: two hours on two cores, one with `make fast`
# (.venv-fast/bin/voltana frontier --contest). The figure beside the published panel needs the panel:
# PANEL=file.csv.
figures: $(STAMP)
	$(BIN)/voltana demo --out results/demo
	cp results/demo/energy_vs_slo.png docs/energy_vs_slo.png
	$(BIN)/voltana experiment run all --figures docs/figures
	$(BIN)/voltana experiment run step-response --figures docs/figures
	@[ -z "$(CONTEST)" ] || $(BIN)/voltana frontier --contest --out results/contest
	$(BIN)/voltana frontier --contest --docs docs
	@if [ -n "$(PANEL)" ]; then \
	  $(BIN)/voltana paper compare --panel $(PANEL) --out results/paper-compare \
	    && cp results/paper-compare/residuals.png docs/figures/paper_residuals.png; \
	else echo "paper_residuals: PANEL=file.csv redraws it"; fi

# PyTorch is for the first one alone, which without it shows no profile of this machine.
notebooks: $(STAMP)
	$(BIN)/python -m voltana.experiments.documentation.notebooks

test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

# These keep time with processes of their own: they run one at a time.
TIMED := $(addprefix tests/hwreplay/,actuator agent engines replay router serve test_emulated_engine.py test_emulated_colocated.py) tests/deploy/test_dashboard.py

unit: $(STAMP)
	$(BIN)/pytest -n auto --dist worksteal $(addprefix --ignore=,$(TIMED))
	$(BIN)/pytest $(TIMED)

bench: $(STAMP)
	$(BIN)/python benchmarks/requests_per_second.py
	$(BIN)/python benchmarks/trace_scale.py $(SCALE)

# The same sources, the inner loop compiled by mypyc, built from a copy in an environment of its
# own: no compiled file ever lies beside a source that may have changed since.
fast: $(FAST_STAMP)

$(FAST_STAMP): pyproject.toml $(SOURCES)
	@[ -x $(FAST)/bin/python ] || $(PYTHON) -m venv $(FAST)
	rm -rf $(FAST)/source && mkdir $(FAST)/source
	cp -r voltana sim profiles hwreplay experiments pyproject.toml README.md LICENSE $(FAST)/source/
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(FAST)/bin/python -m pip install --quiet --disable-pip-version-check "./$(FAST)/source[test]"
	@mkdir -p $(FAST)/check && ln -sfn ../../tests ../../pyproject.toml $(FAST)/check/
	@touch $@

fast-test: $(FAST_STAMP)
	cd $(FAST)/check && ../bin/pytest -n auto --dist worksteal -p no:cacheprovider tests/sim/engine tests/sim/test_golden.py tests/sim/test_metrics.py

fast-bench: $(FAST_STAMP)
	$(FAST)/bin/python benchmarks/requests_per_second.py
	$(FAST)/bin/python benchmarks/trace_scale.py $(SCALE)

# The wheel as a user has it: built, installed with what it needs, and run in an empty folder, by each
# of PYTHONS: those of VERSIONS that are here, on the PATH or behind pyenv's shims.
VERSIONS ?= 3.11 3.12 3.13 3.14
PYTHONS ?= $(shell for v in $(VERSIONS); do PYENV_VERSION=$$v python$$v -c "import sys; print(sys.executable)" 2>/dev/null; done; true)
WHEEL_DEMO ?= ../env/bin/voltana demo --out results

wheel-test: $(STAMP)
	rm -rf .wheel && mkdir .wheel && $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .wheel .
	@set -e; for python in $(PYTHONS); do \
	  $$python -m venv .wheel/env && mkdir .wheel/empty; \
	  .wheel/env/bin/python -m pip install --quiet --no-compile --disable-pip-version-check "$$(ls .wheel/*.whl)[report]"; \
	  ( cd .wheel/empty && ../env/bin/voltana simulate --rate 20 --duration 20 --out results \
	    && ../env/bin/voltana report results && rm -r results && $(WHEEL_DEMO) ); \
	  rm -rf .wheel/env .wheel/empty; echo "$$python: the wheel runs"; done

# A mutant costs what its tests cost until one fails, and all of them if none does: name few and fast
# KILLERS, the likeliest first. Another SEED draws another sample; Ctrl-C reports what has been tried.
MUTATE ?= sim/metrics.py sim/policies sim/engine sim/mdp
KILLERS ?= tests/sim tests/independent
MUTANTS ?= 400
SEED ?= 1

mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "mutmut==3.8.1"
	nice -n 10 $(BIN)/python benchmarks/mutants.py $(MUTATE) --tests $(KILLERS) --sample $(MUTANTS) --seed $(SEED)

engine: $(STAMP)
	sh hwreplay/engines/sglang/install.sh .engine
	$(BIN)/python -m voltana.hwreplay.emulated.build .engine/emulated

# Kills and card faults on emulated cards under load: 100 kills of each part, the exit status is the
# verdict. TRIES=10 is a tenth of it.
TRIES ?= 100

faults: $(STAMP)
	$(BIN)/python -m benchmarks.faults --tries $(TRIES)

# The exit status is the verdict; $(LOOPED)/report.md has the tables. Nothing else may run beside it.
LOOPED ?= results/loop

loop: $(STAMP)
	$(BIN)/python -m voltana.experiments.hardware.loop --out $(LOOPED)

# No privilege is needed and no clock is touched. Finished points are kept: run it again to go on.
# A torch without CUDA would be taken for good by pip, so it goes first. PROFILE is where to write.
PROFILE ?=
BESIDE ?= a100-80g-sxm/llama-3.1-8b
BUDGET ?= 60m

profile-gpu: $(STAMP)
	@$(BIN)/python -m voltana.profiles.device.cards >/dev/null
	@$(BIN)/python -c "import torch; assert torch.version.cuda" 2>/dev/null \
		|| { $(BIN)/python -m pip uninstall --quiet --yes torch; $(BIN)/python -m pip install --quiet torch; }
	@$(BIN)/python -c "import torch; assert torch.cuda.is_available()" 2>/dev/null \
		|| { echo "profile-gpu needs a torch that sees the GPU: install the wheel for your driver's CUDA into $(VENV)" >&2; exit 1; }
	@card=$$($(BIN)/python -m voltana.profiles.device.cards) && profile=$(or $(PROFILE),results/profiles/$$card/llama-3.1-8b) && set -x \
		&& $(BIN)/voltana profile --gpu 0 --engine torch --model llama-3.1-8b --frequencies current --budget $(BUDGET) --out $$profile \
		&& $(BIN)/voltana compare-profiles $$profile $(BESIDE) --out results/measured-beside-calibrated

# The same of the replay: no privilege, no clock touched. Give REPLAYED another name to run it again.
REPLAY ?= hwreplay/replay-gpu.toml
REPLAYED ?= results/gpu
GPU_ENGINE ?= .engine-gpu

replay-gpu: $(STAMP)
	@sh hwreplay/engines/sglang/install-gpu.sh $(GPU_ENGINE) $(PYTHON)
	$(BIN)/voltana replay --config $(REPLAY) --out $(REPLAYED)/probe --probe
	$(BIN)/voltana simulate --config $(REPLAYED)/probe/simulate.toml --out $(REPLAYED)/simulated
	$(BIN)/voltana replay --config $(REPLAYED)/probe/replay.toml --out $(REPLAYED)/replayed
	$(BIN)/voltana validate $(REPLAYED)/simulated $(REPLAYED)/replayed

clean:
	@[ ! -d results ] || git clean -fdXq results
	rm -rf $(VENV) $(FAST) .wheel .mutants .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
