# make demo · make test · make lab: each installs what it needs first
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := smoke-train-s0
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test chapters lab board readme lock

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reidlab needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[lab,test]"
	touch $@

# drawn pedestrians, a network trained on them, its test figures, and a page to read
demo: install
	mkdir -p runs/$(RUN)
	papermill nbs/train.ipynb runs/$(RUN)/train.ipynb
	papermill nbs/evaluate.ipynb runs/$(RUN)/evaluate.ipynb -p run $(RUN)
	@python -c "from reidlab.viz.page import write_html; print('\nThe result is in', write_html('runs/$(RUN)/evaluate.ipynb', 'runs/$(RUN)/evaluate.html'))"

test: install chapters
	pytest

# every chapter of the book, each cell a test
chapters: install
	nbdev-test --n-workers 2

lab: install
	jupyter lab nbs

board: install
	tensorboard --logdir runs

# README.md is the front page of the book
readme: install
	python -c "from pathlib import Path; from reidlab.viz.page import to_readme; Path('README.md').write_text(to_readme('nbs/index.ipynb'), encoding='utf-8')"

# the versions that the tests ran with
lock: install
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*$$' > requirements.lock
