PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench demo findings gate gpu-kit proof test test-cross test-sample test-slow check clean

# Builds the demo model for this CPU and draws a sheet of 4-step pictures.
demo: .venv/installed
	$(BIN)/python -m lcm_compile.benchmarks.pages.demo_sheet --out demo.png

# Measures what the demo model shows; ARGS="--tuned DIR" also on a base tuned to another palette.
proof: .venv/installed
	$(BIN)/python -m lcm_compile.benchmarks.quality.proof $(ARGS)

# Measures the demo model against diffusers here, and fills the README's table; ARGS="--against compile" for more.
bench: .venv/installed
	for precision in fp32 bf16; do \
		bundle=$$($(BIN)/lcm-compile build --base demo --gpu cpu --precision $$precision) && \
		$(BIN)/lcm-compile bench "$$bundle" --against eager --against eager-bf16 --against openvino --runs 40 \
			--save benchmarks/results/bench-demo-$$precision-cpu.json $(ARGS) || exit 1; \
	done
	$(BIN)/python -m lcm_compile.benchmarks.pages.readme_table

# Holds the demo model's speed, memory and parity to benchmarks/baseline.json, in ten processes. On one core: other
# programs slow threads that wait for each other more than a rival that has one. An engine's size depends on which
# convolutions this machine's measurement took (docs/performance.md).
CORE = $(shell $(PYTHON) -c 'import os; print(min(os.sched_getaffinity(0)))')
gate: .venv/installed
	taskset -c $(CORE) $(BIN)/lcm-compile compare benchmarks/baseline.json --fail-on median:30% --fail-on memory:25% \
		--fail-on engine-size:100%

# Every fast test, a file at a time on every core, ruff and mypy.
test: check
	$(BIN)/python -m pytest -n auto --dist loadfile

# A random sample of the tests, each alone, and their files in random order, in an empty home folder.
test-sample: .venv/installed
	$(BIN)/python tests/check_independence.py $(ARGS)

# Those that hold seconds to a limit come after the others, which take a core each.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow and not alone" -n auto --dist worksteal
	$(BIN)/python -m pytest -m alone

# Compiles for GPUs that are not here, with torch's build for CUDA in a folder of its own, .venv-cross: 5 GB.
test-cross: .venv-cross/installed
	.venv-cross/bin/python -m pytest -m "slow or not slow" -rs tests/engines/test_absent_gpu.py

.venv-cross/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-cross
	sed '/^torch==/d; /^setuptools==/d' constraints.txt > .venv-cross/constraints.txt
	.venv-cross/bin/python -m pip install -q -e '.[cross]' pytest fastapi -c .venv-cross/constraints.txt
	touch $@

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[rtx,dev]' -c constraints.txt
	touch $@

# Packs the probe of a GPU for a machine that can download nothing: ARGS="--bundle DIR", without its weights.
gpu-kit: .venv/installed
	$(BIN)/python -m lcm_compile.benchmarks.gpu.kit $(ARGS)

# Runs every script of findings/ and tells at the end which no longer hold. Outside CI: they need a network.
findings:
	@changed=; for script in findings/*.sh; do \
		echo "== $$script"; sh $$script || changed="$$changed $$script"; \
	done; \
	if [ -n "$$changed" ]; then echo "No longer so:$$changed"; exit 1; fi; echo "All still so."

clean:
	rm -rf .venv .venv-cross build *.egg-info demo.png
