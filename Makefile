# Each target that needs packages makes .venv first; when nothing has changed that takes a fraction of a second.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lab test selftest lint lock clean

# The Python that .venv was made with, or else the first that runs and is 3.11 to 3.13. A command that exists need not
# run (pyenv has one for every version, active or not). Should none fit, python3 is asked, and set-up says what is wrong.
CANDIDATES := .venv/bin/python python3.11 python3.12 python3.13 python3
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(IN_RANGE)' >/dev/null 2>&1 && echo "$$python" && break; done),python3)
PYTEST = .venv/bin/python -m pytest
UV ?= uv

help:  ## this list
	@echo "make TARGET [PYTHON=python3.12] [ARGS='options for pytest, or for uv in make lock']"
	@sed -nE 's/^([a-z]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 12

lab: setup  ## the main job: two real vLLM servers, a router, KV transfer; a report and a table of verdicts
	$(PYTEST) -m disagg $(ARGS)

test: setup  ## the selftests, every live module on the embedded lab in short form, then the wire and other models
	$(PYTEST) selftest $(ARGS)
	$(PYTEST) tests --short $(ARGS)
	$(PYTEST) tests/disagg/test_path.py --lab hybrid --short $(ARGS)
	$(PYTEST) tests/disagg/test_path.py --lab latent --short $(ARGS)
	@if unshare --net --mount true 2>/dev/null; then \
		set -x; $(PYTEST) tests/kvcache/test_wire.py tests/kvcache/test_transfer.py --lab namespaces --short $(ARGS); \
	else echo "test: lab namespaces left out: this user may not make network namespaces (run as root)"; fi

selftest: setup  ## the tests that need no server
	$(PYTEST) selftest $(ARGS)

lint: setup  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

setup:  ## make .venv, or bring it up to date
	@python="$(PYTHON)"; "$$python" -m disagglab.setup || { status=$$?; [ $$status -lt 126 ] || { \
		echo "set-up: $$python does not run" >&2; \
		echo "    mend: apt-get install python3 python3-venv, or name one: make $(MAKECMDGOALS) PYTHON=PATH" >&2; }; \
	exit $$status; }

lock:  ## compile requirements/cpu.txt and cuda.txt again; needs uv (UV=PATH)
	"$(PYTHON)" requirements/lock.py $(UV) $(ARGS)

clean:  ## delete .venv
	rm -rf .venv
