# `make demo` and `make test` are all a fresh clone needs: each sets up .venv first, once.
# Another interpreter: make test PYTHON=/path/to/python3.12

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

SECONDS ?= 3600
MOMENTS ?= 100

.DEFAULT_GOAL := help
.PHONY: help demo bench docs kernels wheel test fast others lint fuzz kill soak load gpu-archive gpu-rehearsal clean

help:
	@echo "make demo    export a network, check it, detect on pictures; results in demo-output/"
	@echo "make bench   what that network costs on this machine, beside others; results in bench-output/"
	@echo "make docs    the documentation as a site, notebooks executed; build/site/index.html"
	@echo "make kernels compile the network's operators for this CPU and install them in .venv; needs a C++ compiler"
	@echo "make wheel   the same as a wheel for others, without a compiler; dist/"
	@echo "make test    everything that continuous integration checks"
	@echo "make fast    the quick tests only"
	@echo "make others  the quick tests with the other versions of Python that are here"
	@echo "make lint    ruff and mypy"
	@echo "make kill    programs that write are ended at MOMENTS=100 random moments each"
	@echo "make fuzz    damaged files, requests and command lines, for SECONDS=3600 a kind"
	@echo "make soak    ten thousand pictures and requests; the report in tests/endurance/results/"
	@echo "make load    asag-serve under 32 clients, good and bad, for ten minutes; the report in the same folder"
	@echo "make gpu-archive     what to carry to a machine with a GPU; build/gpu-packages.tar.xz"
	@echo "make gpu-rehearsal   what is done on that machine, up to the missing GPU; results in gpu-report/"
	@echo "make clean   remove .venv, caches and outputs"

demo: $(STAMP)
	$(BIN)/python -m asag_export.demo --output-dir demo-output

bench: $(STAMP)
	$(BIN)/asag-bench demo --output-dir bench-output

docs: $(STAMP)
	$(BIN)/python docs/site_build.py

kernels: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ./plugins

# Without patchelf the wheel is for this Linux and newer ones, and its name does not say which these are.
wheel: $(STAMP)
	rm -rf build/wheel dist/asag_deploy_kernels-*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -c constraints.txt -w build/wheel ./plugins
	@mkdir -p dist
	@PATH="$(BIN):$$PATH"; if command -v auditwheel >/dev/null && command -v patchelf >/dev/null; then \
		auditwheel repair --wheel-dir dist build/wheel/*.whl; \
	else \
		cp build/wheel/*.whl dist/ && echo "not repaired: for that, $(BIN)/python -m pip install auditwheel patchelf"; \
	fi
	@ls dist/asag_deploy_kernels-*.whl

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

others: $(STAMP)
	$(BIN)/python tests/other_pythons.py 3.11 3.12 3.13

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

fuzz: $(STAMP)
	$(BIN)/python tests/endurance/fuzz.py --seconds $(SECONDS)

kill: $(STAMP)
	$(BIN)/python tests/endurance/kill.py --moments $(MOMENTS)

soak: $(STAMP)
	$(BIN)/python tests/endurance/soak.py

load: $(STAMP)
	$(BIN)/python tests/endurance/serving.py

gpu-archive: $(STAMP)
	$(BIN)/asag-bench gpu archive --output build/gpu-packages.tar.xz

gpu-rehearsal: $(STAMP)
	$(BIN)/asag-bench gpu run --rehearse --seconds 1800 --output-dir gpu-report

clean:
	rm -rf $(VENV) .venv-3.* build dist demo-output bench-output gpu-report .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that a set-up that was interrupted is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@"$(or $(PYTHON),false)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: Python 3.11, 3.12 or 3.13 is needed$(if $(PYTHON), but '$(PYTHON)' is none of them,); install one and say: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
