# `make` alone builds the extension in place. Everything that CI does is a target here or in
# csrc/tests; PYTHON names the interpreter of the virtual environment.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
python := $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
sanitized := build/sanitized
elsewhere := build/elsewhere
# Test files that need only NumPy and the extension carry this marker: torch is not sanitized.
kernel_tests = $(abspath $(shell grep -lE 'pytest\.mark\.kernels' tests/test_*.py))

.PHONY: build test lint check warnings ctest warnings-gcc warnings-clang asan neon avx512-emulated sanitize wheel-test bench clean

build:
	$(python) setup.py -q build_ext --inplace

test: build
	$(python) -m pytest

lint:
	$(python) -m ruff check .
	$(python) -m mypy

ctest:
	$(MAKE) -C csrc/tests native

asan neon avx512-emulated:
	$(MAKE) -C csrc/tests $@

check: lint ctest test

# The whole extension by two compilers, every warning an error.
warnings: warnings-gcc warnings-clang

warnings-gcc warnings-clang: warnings-%:
	CC=$* POCKETLLM_WERROR=1 $(python) setup.py -q build_ext \
	    --build-lib build/$* --build-temp build/$*-objects

# The extension under the address and undefined-behaviour sanitizers, each instruction set in turn.
# The test that counts traced bytes is left out: it relies on freed addresses being used again, which
# the address sanitizer prevents. So are those that build many search indices, which csrc/tests does under
# the same sanitizers in less time.
sanitize:
	rm -rf $(sanitized)
	CC=gcc POCKETLLM_SANITIZE=address,undefined $(python) setup.py -q build \
	    --build-base $(sanitized)-objects --build-lib $(sanitized)
	cd $(sanitized) && $(sanitizers) $(python) -c "import pocketllm, pathlib; \
	    assert pathlib.Path(pocketllm.__file__).is_relative_to(pathlib.Path.cwd())"
	cd $(sanitized) && $(sanitizers) $(python) -c \
	    "from pocketllm import kernels; print(*kernels.available_isas(), sep='\n')" | \
	    xargs -P 2 -I {} sh -c 'POCKETLLM_ISA={} $(sanitizers) $(python) -m pytest -q \
	        -p no:cacheprovider -c $(abspath pyproject.toml) -m kernels -k "$(sanitized_tests)" \
	        $(kernel_tests) > {}.log 2>&1; status=$$?; \
	        echo "sanitized, POCKETLLM_ISA={}"; cat {}.log; exit $$status'

sanitized_tests = not left_behind and not lists_of_their_cells and not index_gives_what_the_scan
sanitizers = LD_PRELOAD=$$(gcc -print-file-name=libasan.so) PYTHONMALLOC=malloc \
    PYTHONPATH=$(abspath $(sanitized)) ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

# Every benchmark that needs no model or text of one's own, with figures as JSON in build/bench.
# QUICK=--quick only shows that they run.
benchmarks := $(filter-out common llamacpp memory quality,$(basename $(notdir $(wildcard benchmarks/*.py))))
bench:
	mkdir -p build/bench
	for name in $(benchmarks); do echo "==> $$name"; \
	    $(python) benchmarks/$$name.py $(QUICK) --json build/bench/$$name.json || exit 1; done

# A wheel made from the source distribution works away from this folder and has all its data files.
wheel-test:
	rm -rf $(elsewhere)
	$(python) setup.py -q sdist -d $(elsewhere)/dist
	$(python) -m pip wheel -q --no-deps --no-build-isolation -w $(elsewhere)/dist $(elsewhere)/dist/*.tar.gz
	$(python) -m pip install -q --no-deps --target $(elsewhere)/site $(elsewhere)/dist/*.whl
	cd $(elsewhere) && PYTHONPATH=$(abspath $(elsewhere)/site) $(python) $(abspath tools/check_install.py) site

clean:
	rm -rf build dist *.egg-info pocketllm/*.so
