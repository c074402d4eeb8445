# Each target does its own set-up: a virtual environment with pinned dependencies, and the build.
# PY=/path/to/python uses that interpreter as it is, with the package already built into it.

VENV ?= .venv
PYTHON ?= python3
PY ?= $(VENV)/bin/python
READY := $(if $(filter command line environment,$(origin PY)),,$(VENV)/.ready)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh csrc/*/*/*)

# Not in requirements.txt: a CUDA build of torch brings the Triton that it was made for.
TRITON = $(VENV)/bin/python -c 'import triton' 2>/dev/null || test "$$(uname -s)" != Linux || \
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check triton==3.9.0

.PHONY: demo test bench sdist wheel-cpu wheel-cuda test-wheel lint clean

# OpenMP threads that spin take turns for seconds where cores are shared; those that never spin halve
# the tokens a second (docs/notes/cpu.md). The demo's spin for microseconds, the tests' do not.
demo: $(READY)
	GOMP_SPINCOUNT=5000 $(PY) examples/demo.py

# Whole files go to processes, in the order of their names: those of a file share what it sets up, and
# documents run from top to bottom. test_cuda_build.py, whose compilers use two cores, comes early.
PARALLEL := -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: $(READY)
	OMP_WAIT_POLICY=passive $(PY) -m pytest $(or $(TESTS),$(PARALLEL))

bench: $(READY) $(VENV)/.bench
	$(PY) benchmarks/bench_matmul.py --out benchmarks/results/local/matmul.jsonl
	$(PY) benchmarks/bench_generate.py --out benchmarks/results/local/generate.jsonl

sdist: $(VENV)/.deps
	rm -rf build/sdist && mkdir -p build/sdist
	$(PY) -m build --sdist --no-isolation -o build/sdist . > build/sdist/log 2>&1 || (cat build/sdist/log; false)
	mkdir -p dist && cp build/sdist/*.tar.gz dist/

# Wheels are built from the sdist, in pip's own folder: nothing stale, and nothing that it lacks.
# torch brings its libraries and libgomp, the driver libcuda: a wheel has no copy of them.
EXCLUDED := libtorch*.so* libc10*.so* libgomp.so.1 libcuda.so.1 libcudart.so*

define wheel
	rm -rf build/wheel
	AQLM_BUILD=$(1) $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel/built build/sdist/*.tar.gz
	PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m auditwheel repair $(EXCLUDED:%=--exclude '%') \
		-w build/wheel build/wheel/built/*.whl
	$(PY) tests/check_wheel.py --contents-only build/wheel/*.whl
	rm -f dist/*+$(2)*.whl && mv build/wheel/*.whl dist/
endef

wheel-cpu: sdist
	$(call wheel,cpu,cpu)

wheel-cuda: sdist
	$(call wheel,cuda,cu[0-9])

# Installs into fresh virtual environments and tests there, with no source tree on the path.
test-wheel: $(VENV)/.deps
	$(PY) tests/check_wheel.py $(or $(WHEEL),dist/*.whl) $(PARALLEL)

lint: $(VENV)/.deps
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build dist $(VENV) *.egg-info aqlm_infer/*.so

$(VENV)/.deps: requirements.txt
	$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 10) or sys.exit("aqlm_infer needs Python 3.10 or newer; this is " + v)'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(TRITON)
	touch $@

$(VENV)/.ready: $(VENV)/.deps $(SOURCES)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

# The peers that benchmarks compare with; aqlm's own dependencies are already there.
$(VENV)/.bench: $(VENV)/.deps
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check numba==0.68.1 scipy
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps aqlm==1.1.7
	touch $@
