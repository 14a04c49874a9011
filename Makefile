# make demo · make test · make lab: each installs what it needs first
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOOK := first_look
ROWS := searched random handmade
# the report on what the demo has just run, and on nothing else
export FRESH := {searches: [$(LOOK)-search-s0], searched: [$(LOOK).searched-train-s0], random: [$(LOOK).random-train-s0], handmade: [$(LOOK).handmade-train-s0]}
export PATH := $(abspath $(BIN)):$(PATH)

# what chapters and tests write, gigabytes, goes when they end (pytest by itself keeps what a failing test wrote);
# a short name, since a socket's path may have 107 characters
OWN_TMP = TMPDIR=$$(mktemp -d $${TMPDIR:-/tmp}/XXXX) && export TMPDIR && trap 'rm -rf "$$TMPDIR"' EXIT &&

ROW_JOBS := demo-search $(addprefix demo-,$(ROWS))
.PHONY: install demo $(ROW_JOBS) test chapters lab board docs readme lock

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "reidlab needs Python 3.11 or newer, this is %d.%d; try: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e ".[lab,index,timm,deploy,openvino,optuna,docs,test]"
	touch $@

# drawn pedestrians, a search on them, what it found and two controls trained and ranked, and a page that compares them;
# two rows side by side, one thread each: these networks are too small to share, and the figures do not depend on how many cores there are
demo: export OMP_NUM_THREADS = 1
demo: install
	$(MAKE) --no-print-directory -j 2 $(addprefix demo-,$(ROWS))
	mkdir -p reports/html
	papermill --no-progress-bar reports/01_first_look.ipynb reports/html/01_first_look.ipynb --cwd reports -y "$$FRESH"
	@printf '\nThe report is '; python -m reidlab.viz.report reports/html/01_first_look.ipynb

demo-search:
	mkdir -p runs/$(LOOK)-search-s0
	papermill --no-progress-bar nbs/search.ipynb runs/$(LOOK)-search-s0/search.ipynb -p recipe $(LOOK)

demo-searched: demo-search
$(addprefix demo-,$(ROWS)): demo-%:
	mkdir -p runs/$(LOOK).$*-train-s0
	papermill --no-progress-bar nbs/train.ipynb runs/$(LOOK).$*-train-s0/train.ipynb -p recipe $(LOOK)/$*
	papermill --no-progress-bar nbs/evaluate.ipynb runs/$(LOOK).$*-train-s0/evaluate.ipynb -p run $(LOOK).$*-train-s0

# two files of tests at once, one thread each, so that a file's shared set-up is made once; in the order
# of tests/conftest.py, the longest first: of its own accord xdist begins with the files of the most tests
test: export OMP_NUM_THREADS = 1
test: install chapters
	$(OWN_TMP) pytest -n 2 --dist loadfile --no-loadscope-reorder

# every chapter of the book, each cell a test; two pages at once, so one thread each: more only wait for one another
chapters: export OMP_NUM_THREADS = 1
chapters: install
	$(OWN_TMP) nbdev-test --n-workers 2

lab: install
	reidlab lab

board: install
	tensorboard --logdir runs

# the whole book as a site that needs no network; to read it: python -m http.server -d _docs/site
docs: install
	python -m reidlab.viz.site

# what is made of the pages themselves: README.md of the front page, the rooms' listings, the list of recipes
readme: install
	python -m reidlab.viz.contents

# the versions that the tests ran with
lock: install
	$(BIN)/python -m pip freeze --exclude-editable | grep -E '^[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*$$' > requirements.lock
