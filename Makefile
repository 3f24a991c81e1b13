# Two commands do everything: `make run` (the toy experiment) and `make test`.
#
#   ACCELERATOR=cpu|cuda   which pinned list is installed (default cpu)
#   TORCH_INDEX=URL        extra package index for the CPU build of torch, where the default index offers
#                          only CUDA builds: TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   SEED=n                 seed of `make run`; of the moments at which `make chaos` kills
#   DATA=dir               `make data-demo`: photographs of your own (with placeholder captions) beside the toy's
#   ONLY="only=[...]"     `make ablate-demo`: some of the study's variants
#   PYTHON=python3.11      interpreter that the virtual environment is made from

ACCELERATOR ?= cpu
PYTHON ?= python3.11
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin
TRL := $(VENV)/benchmarks-trl
INSTALLED := $(VENV)/.installed-$(ACCELERATOR)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
export HF_HUB_OFFLINE ?= 1

.PHONY: run test test-unit check format setup bench bench-rewards bench-trl chaos data-demo cold-start-demo ablate-demo toy-weights clean

setup: $(INSTALLED)

$(INSTALLED): requirements/$(ACCELERATOR).txt pyproject.toml tools/torchvision_on_cpu.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned $(ACCELERATOR) set into $(VENV) (about three minutes)"
	$(PIP) $(INDEX) -r requirements/$(ACCELERATOR).txt
	$(PIP) --no-build-isolation --editable .
	$(BIN)/python tools/torchvision_on_cpu.py
	touch $@

run: setup
	$(BIN)/rl-system train experiment=toy seed=$(SEED) overwrite=true

test: test-unit
	$(BIN)/python -m pytest -m "not unit" --durations=40 --durations-min=2

test-unit: setup
	$(BIN)/python -m pytest -m unit -n 2

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: bench-rewards bench-trl
	$(BIN)/python -m benchmarks.logprob_head
	$(BIN)/python -m benchmarks.shared_prompt
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.guidance
	$(BIN)/python -m benchmarks.async_speedup
	$(BIN)/python -m benchmarks.degradation
	$(BIN)/python -m benchmarks.memory_plan
	$(BIN)/python -m benchmarks.weight_push
	$(BIN)/python -m benchmarks.best_of_n

bench-rewards: setup
	$(BIN)/python -m benchmarks.rewards
	$(BIN)/python -m benchmarks.reward_hiding

# TRL lies beside the pinned set, on the path of its own process only.
bench-trl: setup
	test -d $(TRL)/trl || $(PIP) --target $(TRL) trl==1.16.0
	$(BIN)/python -m benchmarks.trl_loop --trl $(TRL)

chaos: setup
	$(BIN)/python -m benchmarks.chaos --seed $(SEED)

# Both folders may be there already: then only what is missing is made.
data-demo: setup
	$(BIN)/python -m toy.export_photographs runs/data-demo/toy
	$(BIN)/rl-system prepare-data input=runs/data-demo/toy/photographs output=runs/data-demo/toy-prepared \
		captions=runs/data-demo/toy/captions.jsonl objects=runs/data-demo/toy/captions.jsonl \
		min_pixels=0 min_file_kib=0 sharpen_target=false images_per_shard=64
ifdef DATA
	$(BIN)/python -m toy.export_photographs runs/data-demo/own --captions-of $(DATA)
	$(BIN)/rl-system prepare-data input=$(DATA) output=runs/data-demo/own-prepared \
		captions=runs/data-demo/own/captions.jsonl crop=512 min_file_kib=0 images_per_shard=8
endif

cold-start-demo: setup
	$(BIN)/python -m toy.export_photographs runs/cold-start-demo/toy --count 2048
	$(BIN)/rl-system prepare-data input=runs/cold-start-demo/toy/photographs output=runs/cold-start-demo/data \
		captions=runs/cold-start-demo/toy/captions.jsonl objects=runs/cold-start-demo/toy/captions.jsonl \
		min_pixels=0 min_file_kib=0 sharpen_target=false images_per_shard=128
	$(BIN)/rl-system cold-start recipe=toy data=runs/cold-start-demo/data output_dir=runs/cold-start-demo seed=$(SEED) \
		overwrite=true

# Hours on two cores; a study that was stopped goes on. ONLY="only=[full,no_grpo]" takes some variants.
ablate-demo: setup
	$(BIN)/python -m toy.export_photographs runs/ablate-demo/toy --count 2048 --pairs 64
	$(BIN)/rl-system ablate study=toy output=runs/ablate-demo/study photographs=runs/ablate-demo/toy/photographs \
		captions=runs/ablate-demo/toy/captions.jsonl objects=runs/ablate-demo/toy/captions.jsonl \
		test_lr=runs/ablate-demo/toy/test/lr test_hr=runs/ablate-demo/toy/test/hr $(ONLY)

toy-weights: setup
	$(BIN)/python -m toy.train_vq
	$(BIN)/python -m toy.train_grounding_dino
	$(BIN)/python -m toy.train_sam
	$(BIN)/python -m toy.train_qwen_vl --steps 2000 4000 --seed 0
	$(BIN)/python -m toy.train_qwen_vl --steps 0 3000 --seed 1 --start toy/weights/qwen_vl
	$(BIN)/python -m toy.train_qwen_vl --steps 0 9000 --seed 2 --pools 2000 --start toy/weights/qwen_vl
	$(BIN)/python -m toy.tokenizer toy/weights/policy
	$(BIN)/python -m toy.train_policy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
