# Two commands from a fresh clone: `make search` runs the main job, `make test` runs every check.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PINS   := requirements-tested.txt
OUT    ?= runs/digits
ARGS   ?=

.PHONY: search test test-slow docs docs-serve readme export hooks clean
help:
	@echo "make search   the main job: a latency-aware search on real data (ARGS='--budget 0.8ms', OUT=runs/NAME)"
	@echo "make test     every check: notebooks, tests, exported-equals-notebooks, cleanliness, lint"
	@echo "make test-slow the slow notebook cells too;  make docs  the site;  make docs-serve  the site, opened locally"
	@echo "make readme   README.md from nbs/index.ipynb;  make export  notebooks to package;  make hooks  git hooks"

# torch first and pinned: a bare 'pip install torch' in an empty environment may bring several GB of another build
$(VENV)/.run: settings.ini setup.py $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' $(PINS))"
	$(BIN)/pip install -q --disable-pip-version-check -c $(PINS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install -q --disable-pip-version-check -c $(PINS) -e '.[dev,docs,export,sparse,cluster,parquet]'
	@touch $@

search: $(VENV)/.run
	$(BIN)/nas_search --data digits --out $(OUT) --resume $(ARGS)

test: $(VENV)/.dev
	$(BIN)/ruff check nas_nb tests tools bench
	$(BIN)/python -m pytest -q --durations=15 tests

test-slow: $(VENV)/.dev
	NAS_NB_FLAGS=slow NAS_NB_LIMIT=3600 $(BIN)/python -m pytest -q --durations=15 tests/test_notebooks.py tests/test_spaces.py tests/test_faults.py

docs: $(VENV)/.dev
	$(BIN)/python tools/build_docs.py

docs-serve: $(VENV)/.dev
	$(BIN)/python tools/build_docs.py --serve

readme: $(VENV)/.dev
	$(BIN)/python tools/readme.py

export: $(VENV)/.dev
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

hooks:
	git config core.hooksPath .githooks

clean:
	rm -rf $(VENV) _docs docs/_build build *.egg-info
