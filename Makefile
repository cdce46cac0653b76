# Two commands: `make demo` and `make test`. Both set up .venv from Python 3.11 first, once.
PYTHON ?= python3.11
BIN := .venv/bin

# One thread per process: results depend on the number of threads, and two jobs share the cores.
export OMP_NUM_THREADS = 1

.PHONY: demo test slow test-cluster lint bench tools clean

demo: .venv/.installed
	$(BIN)/python run_suite.py run configs/quick.yaml --out runs/quick

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

# A real Slurm and a real Ray cluster on this machine: Debian's slurm-wlm and munge are installed and started (by root
# alone), Ray goes into .venv. Tests of what is not here are left out, and a line says so.
test-cluster: .venv/.installed
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 \
			--no-install-recommends slurm-wlm munge >/dev/null; fi
	$(BIN)/python -c "import ray" 2>/dev/null || $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--config-settings editable_mode=compat --editable ".[ray]"
	timeout --kill-after=60 2400 $(BIN)/python -m pytest -m cluster --numprocesses 0 tests/cluster

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed
	$(BIN)/python run_suite.py bench

.venv/.installed: pyproject.toml constraints.txt requirements-legacy.txt norms/kernels/native.c
	$(PYTHON) -m venv .venv
# Compat mode puts this folder itself on the path. With setuptools' usual import hook a mere folder named `results`
# beside a script would hide the package, since Python asks hooks last.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat \
		--editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-legacy.txt
	touch $@

# What some tests use beside Python, of Debian: a browser for the report, a C compiler (without which the native kernels
# are not built, either), LaTeX for the tables of papers. Without them these tests are skipped.
tools:
	apt-get update --quiet=2
	apt-get install --quiet=2 --no-install-recommends chromium gcc libc6-dev texlive-latex-base texlive-latex-recommended \
		texlive-latex-extra texlive-science

clean:
	rm -rf .venv
