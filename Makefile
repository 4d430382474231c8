# Each target that needs packages makes .venv first; when nothing has changed that takes a fraction of a second.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lab lab-dynamo versions test test-dynamo selftest lint lock offline-pack clean

# The Python that .venv was made with, or else the first that runs and is 3.11 to 3.13. A command that exists need not
# run (pyenv has one for every version, active or not). Should none fit, python3 is asked, and set-up says what is wrong.
CANDIDATES := .venv/bin/python python3.11 python3.12 python3.13 python3
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(or $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(IN_RANGE)' >/dev/null 2>&1 && echo "$$python" && break; done),python3)
PYTEST = .venv/bin/python -m pytest
MAIN_JOB = tests/disagg/test_path.py tests/disagg/test_content.py tests/disagg/test_comparison.py
BUDGET = 150s
OVER_SSH = tests/environment tests/kvcache/test_wire.py tests/disagg
# What takes a quarter of an hour more is asked for: make test LONG=1 (CONTRIBUTING.md says what that is)
LONGEST = tests/disagg/test_break_even.py tests/disagg/test_goodput.py tests/disagg/test_rate_sweep.py
LEFT_OUT = $(if $(LONG),,$(LONGEST:%=--ignore %))
FEWER = $(if $(LONG),--endings 1,--workload long-prompts-into-steady-decode)
UV ?= uv

help:  ## this list
	@echo "make TARGET [PYTHON=python3.12] [VLLM=0.30.0] [DYNAMO=1] [BUDGET=10m] [ARGS='options for pytest, or for uv in make lock']"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' Makefile | expand -t 16

lab: setup  ## the main job: two real vLLM servers, a router, KV transfer; a report and a table of verdicts; BUDGET=10m
	$(PYTEST) $(MAIN_JOB) $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

lab-dynamo: DYNAMO = 1
lab-dynamo: setup  ## NVIDIA Dynamo on the lab's nodes: etcd, NATS, frontend and workers alone, together, compared
	$(PYTEST) -m dynamo $(ARGS)

versions: VLLM = $(or $(OLD),$(error which versions? as in: make versions OLD=0.30.0 [NEW=0.31.0]))
versions: setup  ## two vLLM versions in turns, OLD=0.30.0 [NEW=0.31.0]: verdicts, and what differs
	$(if $(NEW),@$(MAKE) --no-print-directory setup VLLM=$(NEW))
	$(PYTEST) tests/disagg/test_versions.py --against $(OLD) $(if $(NEW),--vllm $(NEW)) $(ARGS)

test: setup  ## the selftests, every live module but dynamo in short form; LONG=1: the longest files and other models too
	$(PYTEST) selftest $(ARGS)
	@if unshare --net --mount true 2>/dev/null && [ -x /usr/sbin/sshd ]; then \
		set -ex; $(PYTEST) tests --short -m "not disagg and not dynamo" $(ARGS); \
		$(PYTEST) tests/tuning --lab embedded-ways --short $(ARGS); \
		$(PYTEST) $(OVER_SSH) $(LEFT_OUT) --lab two-hosts --short $(FEWER) $(ARGS); \
	else \
		set -ex; $(PYTEST) tests $(LEFT_OUT) --short -m "not dynamo" $(ARGS); \
		$(PYTEST) tests/tuning --lab embedded-ways --short $(ARGS); \
		echo "test: lab two-hosts left out: it needs root, network namespaces and /usr/sbin/sshd (openssh-server)"; \
	fi
ifdef LONG
	$(PYTEST) tests/disagg/test_path.py --lab hybrid --short $(ARGS)
	$(PYTEST) tests/disagg/test_path.py --lab latent --short $(ARGS)
	$(PYTEST) tests/routing/test_disaggregated.py --lab two-to-one --short $(ARGS)
endif

test-dynamo: DYNAMO = 1
test-dynamo: setup  ## module dynamo in short form; a test skipped because etcd or NATS is missing fails
	$(PYTEST) tests/dynamo --short --no-skips $(ARGS)

selftest: setup  ## the tests that need no server
	$(PYTEST) selftest $(ARGS)

lint: setup  ## ruff, mypy, the contract of the rooms, and imports beside dependencies (pyproject.toml)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports --no-cache
	.venv/bin/python docs/generate.py --check
	.venv/bin/deptry .

setup:  ## make .venv, or bring it up to date; VLLM=X.Y.Z: also one for servers of that version; DYNAMO=1: for Dynamo
	@python="$(PYTHON)"; "$$python" -m disagglab.install $(if $(VLLM),--vllm "$(VLLM)")$(if $(DYNAMO), --dynamo) || { \
		status=$$?; [ $$status -lt 126 ] || { \
		echo "set-up: $$python does not run" >&2; \
		echo "    mend: apt-get install python3 python3-venv, or name one: make $(MAKECMDGOALS) PYTHON=PATH" >&2; }; \
	exit $$status; }

lock:  ## compile the main locks again, or with VLLM=X.Y.Z those of that version; needs uv (UV=PATH)
	"$(PYTHON)" requirements/lock.py "$(UV)" $(if $(VLLM),--vllm "$(VLLM)") $(ARGS)

offline-pack:  ## what a GPU host without registry needs, in pieces: OUT=FOLDER
	PYTHON="$(PYTHON)" offline/pack.sh "$(or $(OUT),$(error where to? as in: make offline-pack OUT=parts))"

clean:  ## delete .venv
	rm -rf .venv
