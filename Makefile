# The virtual environment and the few commands everyone needs. `make` alone lists them.

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-hf test-transformers4 test-lm-eval test-serve lint clean

help:  ## list these targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1  \2/p' $(MAKEFILE_LIST)
	@echo "  ARGS='...' is passed on (demo, test, lint); PYTHON=python3.12 chooses the interpreter of a new .venv"

demo: .venv/.installed  ## train a small model on this machine and write a report
	@.venv/bin/blt demo $(ARGS)

# One thread a process: the processes share the cores already. More than eight only cost start-up time.
test: .venv/.installed  ## run the tests, ARGS="tests/patching -x" for some of them
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-hf: .venv/.hf  ## the model in transformers, with its Trainer, PEFT and TRL (installs these)
	@TEST_HF=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(ARGS) tests/hf

test-transformers4: .venv/.installed .venv/transformers4/.installed  ## the same in transformers 4.57 (kept apart, 140 MB)
	@TRANSFORMERS4=$(CURDIR)/.venv/transformers4 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(ARGS) \
		tests/weights/test_transformers4.py
	@PYTHONPATH=$(CURDIR)/.venv/transformers4 TEST_HF=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(ARGS) tests/hf

test-lm-eval: .venv/.eval  ## the numbers of lm-evaluation-harness's own model class (installs lm_eval)
	@LM_EVAL=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(ARGS) tests/lm_eval

test-serve: .venv/.serve  ## the server and its page, with the openai client and a browser (installs these)
	@TEST_SERVE=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest $(ARGS) tests/serving

lint: .venv/.installed  ## ruff and basedpyright, ARGS=--fix to mend what can be
	@bash dev/lint.sh $(ARGS)

clean:  ## remove .venv, build output and caches (not runs/)
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

# Only what transformers 4 needs in other versions than the environment has; torch and the rest it takes from there.
.venv/transformers4/.installed: dev/transformers4.txt .venv/.installed
	@rm -rf .venv/transformers4
	.venv/bin/python -m pip install --quiet --no-deps --target .venv/transformers4 -r dev/transformers4.txt
	@touch $@

.venv/.hf: .venv/.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[transformers]'
	@touch $@

# lm_eval's own model class needs accelerate.
.venv/.eval: .venv/.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[eval]' accelerate
	@touch $@

.venv/.serve: .venv/.installed
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test-serve]'
	@touch $@

# `.unfinished` becomes the stamp only at the very end: a .venv whose making was interrupted is made anew, while one
# that somebody made by hand is only brought up to date.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "PYTHON: '$(PYTHON)' is not Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && touch .venv/.unfinished && rm -f $@
	$(PYTHON) -m venv .venv
	@echo 'installing torch and the rest into .venv: some minutes, with no word from pip'
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch .venv/.unfinished && mv .venv/.unfinished $@
