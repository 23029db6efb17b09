# Each target makes the virtual environment that it needs; see README.md.
#   make demo            train and evaluate a small SHA-RNN on real Wikipedia bytes, on two CPU cores
#   make demo-words      the same on words, with an adaptive input and softmax
#   make test            lint and all tests except the slow ones
#   make test-long       lint and all tests, such as those of killed runs and several workers
#   make test-312        make test on Python 3.12
#   make test-upstream   all tests except the slow ones with upstream fairseq 0.12.2 on Python 3.8
#   make bench           speed and memory of models and parts, as tables in runs/bench.md
#   make tokenization    the same text as bytes, pieces and words, compared
#   make bench-growth    how time and memory grow, as a picture in runs/growth.png

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo demo-words test test-long test-312 test-upstream has-python38 lint bench bench-growth tokenization clean

PYTHON ?= python3
VENV ?= .venv
# The first Python of a version that runs: pyenv puts a python3.8 on PATH that may not run.
find-python = $(shell for python in python$(1) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1).*/bin/python; do \
  if "$$python" -c "" 2>/dev/null; then echo "$$python"; break; fi; done)
PYTHON38 ?= $(call find-python,3.8)
PYTHON312 ?= $(call find-python,3.12)
VENV38 ?= .venv38
VENV312 ?= .venv312

BIN := $(VENV)/bin
# Two processes, each with a file of tests and one thread: more threads would compete for the cores.
PYTEST_OPTIONS ?= --numprocesses 2 --dist loadfile
DATA := data-bin/enwiki6
RUN := runs/demo
WORDS := data-bin/enwiki6-words
WORDS_RUN := runs/demo-words
# As many updates as two cores make in about four minutes: too few for dropout to help.
DEMO_WORDS_OPTIONS := --task segment_language_modeling --codec words --cpu \
  --arch sha_rnn_small --width 128 --num-layers 4 --attention-layers 2 --cell sru --window 196 \
  --cutoffs 2000,6000 --div-val 2 --dropout-input 0 --dropout-hidden 0 --dropout-output 0 \
  --tokens-per-sample 49 --batch-size 16 --batch-size-valid 16 \
  --optimizer adam --adam-betas '(0.9, 0.99)' --clip-norm 1 \
  --criterion cross_entropy_with_auxiliary_losses \
  --lr 2e-3 --lr-scheduler polynomial_decay --warmup-updates 100 \
  --total-num-update 1000 --max-update 1000 --log-interval 20 \
  --validate-interval 1000 --validate-interval-updates 250 --save-interval-updates 250 \
  --keep-interval-updates 1 --no-epoch-checkpoints

demo: $(RUN)/report.md
	@cat $<

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or 3.12; name one with 'make PYTHON=...'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt torch
	$(BIN)/pip install --constraint constraints.txt --editable '.[test,plots]'
	touch $@

# gensim's wheel contains the corpus. None of its code is run, so it needs no dependencies.
$(DATA)/dict.txt: | $(VENV)/installed
	$(BIN)/pip install --no-deps gensim==4.4.0
	$(BIN)/python preprocess/enwiki6.py --dest $(DATA)

# After an interruption training continues from its last checkpoint.
$(RUN)/trained: | $(DATA)/dict.txt
	mkdir -p $(RUN)
	$(BIN)/fairseq-hydra-train --config-dir examples/fast --config-name fast \
	  task.data=$(DATA) common.tensorboard_logdir=$(RUN)/tensorboard checkpoint.save_dir=$(RUN)/checkpoints
	touch $@

# The command does not write over an older file.
$(RUN)/test.json: $(RUN)/trained
	rm -f $@
	$(BIN)/fairseq-sha evaluate $(DATA) --path $(RUN)/checkpoints/checkpoint_last.pt --cpu \
	  --split test --batch-size 8 --tokens-per-sample 64 --json $@

$(RUN)/report.md: $(RUN)/test.json
	$(BIN)/python examples/enwiki6/report.py --data $(DATA) --run $(RUN)

demo-words: $(WORDS_RUN)/report.md
	@cat $<

$(WORDS_RUN)/trained: | $(WORDS)/dict.txt
	mkdir -p $(WORDS_RUN)
	$(BIN)/fairseq-train $(WORDS) --user-dir fairseq_sha $(DEMO_WORDS_OPTIONS) \
	  --save-dir $(WORDS_RUN)/checkpoints --tensorboard-logdir $(WORDS_RUN)/tensorboard
	touch $@

$(WORDS_RUN)/test.json: $(WORDS_RUN)/trained
	rm -f $@
	$(BIN)/fairseq-sha evaluate $(WORDS) --path $(WORDS_RUN)/checkpoints/checkpoint_last.pt --cpu \
	  --split test --batch-size 8 --tokens-per-sample 49 --json $@

$(WORDS_RUN)/report.md: $(WORDS_RUN)/test.json
	$(BIN)/python examples/enwiki6/report_words.py --data $(WORDS) --run $(WORDS_RUN)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint $(DATA)/dict.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS) tests -m "not long"

test-long: lint $(DATA)/dict.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_OPTIONS) tests

test-312:
	@test -n "$(PYTHON312)" || { \
	  echo "error: no Python 3.12 on PATH or in pyenv; name one with 'make test-312 PYTHON312=...'" >&2; \
	  exit 1; }
	$(MAKE) test PYTHON="$(PYTHON312)" VENV=$(VENV312)

$(VENV38)/installed: setup.cfg pyproject.toml constraints-upstream.txt
	@test -n "$(PYTHON38)" || { \
	  echo "error: no Python 3.8 on PATH or in pyenv; name one with 'make test-upstream PYTHON38=...'" >&2; \
	  exit 1; }
	$(PYTHON38) -m venv $(VENV38)
	$(VENV38)/bin/pip install --constraint constraints-upstream.txt --editable '.[test]'
	touch $@

has-python38:
	@test -n "$(PYTHON38)"

test-upstream: $(VENV38)/installed
	OMP_NUM_THREADS=1 $(VENV38)/bin/python -m pytest $(PYTEST_OPTIONS) tests -m "not long"

BENCHMARKS := optimizer train_step steps adaptive_span recurrences generation
# The same text as bytes, pieces and words; see examples/tokenization/README.md.
TOKENIZATIONS = enwiki6-text enwiki6-pieces1000 enwiki6-pieces8000 enwiki6-words
data-bin/enwiki6-text/dict.txt: KIND = bytes
data-bin/enwiki6-words/dict.txt: KIND = words
data-bin/enwiki6-pieces1000/dict.txt: KIND = pieces --vocabulary 1000
data-bin/enwiki6-pieces8000/dict.txt: KIND = pieces --vocabulary 8000
$(TOKENIZATIONS:%=data-bin/%/dict.txt): | $(VENV)/installed $(DATA)/dict.txt
	$(BIN)/python preprocess/enwiki6_text.py --as $(KIND) --dest $(@D)

tokenization: $(TOKENIZATIONS:%=data-bin/%/dict.txt)
	$(BIN)/fairseq-sha compare --configs $(wildcard examples/tokenization/*.yaml) --updates 1600 --seeds 1 2 3 \
	  --out runs/tokenization
	$(BIN)/python examples/tokenization/report.py --run runs/tokenization --cpu

bench: $(VENV)/installed
	mkdir -p runs
	for name in $(BENCHMARKS); do \
	  echo; echo "# $$name"; echo; $(BIN)/python -W ignore benchmarks/$$name.py; done | tee runs/bench.md
	$(BIN)/python -W ignore benchmarks/growth.py --only corpus --largest 100 | tee -a runs/bench.md

bench-growth: $(VENV)/installed
	$(BIN)/python -W ignore benchmarks/growth.py --save runs

clean:
	rm -rf $(VENV) $(VENV38) $(VENV312) data-bin runs checkpoints
