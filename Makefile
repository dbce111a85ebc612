# Folio: a GPT from a blank page to an aligned assistant.
#
#   make all        the four stages on the realm of Arden, then a table
#   make test       the tests
#   make rankings   sample answers and have them ranked, before make reward (which does it else)
#   make pretrain | sft | reward | rlhf [PROFILE=arden|shakespeare|own|web] [DATA=path] [ARGS="--seed 1"]
#                   [ACCELERATE=ddp PROCESSES=8]   on several GPUs
#   make rlhf METHOD=ppo|rloo|grpo|dpo   by another method, into out/<profile>/rlhf_<method>
#   make chat [STAGE=sft] [ARGS="--temperature 1"]
#   make rlhf_judge   PPO on Arden with the known truth as reward, beside out/arden/rlhf
#   make arden-report [FOLDERS="out/arden out/arden-1"]   the alignment story in one table
#   make seeds SEEDS="0 1 2"   all of Arden from each seed, into out/arden, out/arden-1, ..., one table
#   make rounds ROUNDS=2   rank the policy's answers, train the reward model on, align again
#   make sweep STAGE=sft FIELD=learning_rate VALUES="1e-4 3e-4 1e-3"   one run each, figures on dev
#   make frontier   every method against KL on Arden, resumable [ARGS="--methods ppo --seeds 0"]
#   make realm [SEED=7] [PEOPLE=400]   another realm to read, in out/realm/7; REALM=7 behind any of
#                   these targets trains on it: make all REALM=7, make chat REALM=7
#   make check-data [CONFIG=configs/own/sft.yaml] [DATA=path]   what a stage would train on
#   make lesson     the lesson's ladder on Tiny Shakespeare, rung by rung [DATA=path]
#   make bench-rlhf [TRL112=path/to/python]   our PPO's speed and memory, and TRL 1.12's beside
#   make bench-pretrain   pretraining's speed [DATA=path] [NANOGPT=path to a checkout, to run beside]
#   make bench-pretrain-gpu   the same on a GPU, at GPT-2's size [DATA=path] [NANOGPT=path]
#   make bench-decoding   on a GPU, sampling's speed against the memory's, and its share of PPO's time
#   make check      style, lint and types

PROFILE ?= arden
ACCELERATE ?= single
STAGE ?=
REALM ?=
NAME = $(if $(REALM),realm/$(REALM),$(PROFILE))
FOLDER = out/$(NAME)
CONFIGS = $(if $(REALM),$(FOLDER)/configs,configs/$(PROFILE))
CONFIG ?= $(CONFIGS)/sft.yaml
ARGS ?=
PYTHON ?= python3
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= true
# Keep freed memory: page faults cost a few hundredths of a training step on CPU (docs/log.md)
export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184

BIN := .venv/bin
LAUNCH = $(BIN)/accelerate launch --quiet --config_file configs/accelerate/$(ACCELERATE).yaml $(if $(PROCESSES),--num_processes $(PROCESSES))
BY_METHOD = $(if $(METHOD),--method $(METHOD) --output_dir $(FOLDER)/rlhf_$(METHOD))
WITH_DATA = $(if $(DATA),--data "$(DATA)")
STAGES := pretrain sft reward rlhf

.PHONY: setup test check check-data all chat lesson clean rankings seeds rounds sweep rlhf_judge arden-report frontier bench-rlhf bench-pretrain bench-pretrain-gpu bench-decoding realm $(STAGES)

setup: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(STAGES): setup
	$(LAUNCH) -m $@ --config $(CONFIGS)/$@.yaml $(WITH_DATA) $(if $(filter rlhf,$@),$(BY_METHOD)) $(ARGS)

all: setup
	@for stage in $(STAGES); do $(MAKE) --no-print-directory $$stage || exit 2; done
	$(BIN)/python -m common.report $(FOLDER)

rankings: setup
	$(BIN)/python -m reward.collect --config $(CONFIGS)/reward.yaml $(WITH_DATA) $(ARGS)

rlhf_judge: setup
	$(LAUNCH) -m rlhf --config $(if $(REALM),$(CONFIGS),configs/arden)/rlhf_judge.yaml $(ARGS)

arden-report: setup
	$(BIN)/python -m common.arden.report $(if $(FOLDERS),$(FOLDERS),$(if $(REALM),$(FOLDER),out/arden))

realm: setup
	$(BIN)/python -m common.arden.realm $(if $(SEED),--seed $(SEED)) $(if $(PEOPLE),--people $(PEOPLE))

seeds: setup
	$(BIN)/python -m common.arden.seeds --profile $(if $(REALM),$(NAME),arden) --seeds $(or $(SEEDS),0 1 2)

rounds: setup
	$(BIN)/python -m common.rounds --profile $(NAME) --rounds $(or $(ROUNDS),2) $(ARGS)

sweep: setup
	$(BIN)/python -m common.sweep --profile $(NAME) --stage $(STAGE) --field $(FIELD) --values $(VALUES) -- $(WITH_DATA) $(ARGS)

frontier: setup
	$(BIN)/python -m rlhf.frontier $(if $(REALM),--stage_config $(CONFIGS)/rlhf.yaml --output_dir $(FOLDER)/frontier) $(ARGS)

bench-rlhf: setup
	TRL112=$(TRL112) OMP_NUM_THREADS=1 $(BIN)/python -m rlhf.bench $(ARGS)

lesson: setup
	$(BIN)/python -m pretrain.lesson --config configs/shakespeare/lesson.yaml $(WITH_DATA) $(ARGS)

bench-pretrain: setup
	$(BIN)/python -m pretrain.bench $(WITH_DATA) $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(ARGS)

bench-pretrain-gpu: setup
	$(BIN)/python -m pretrain.bench_gpu $(WITH_DATA) $(if $(NANOGPT),--nanogpt $(NANOGPT)) $(ARGS)

bench-decoding: setup
	$(BIN)/python -m rlhf.bench.decoding $(ARGS)

chat: setup
	$(BIN)/python -m common.chat --profile $(NAME) $(if $(STAGE),--stage $(STAGE)) $(ARGS)

check-data: setup
	$(BIN)/python -m common.check_data --config $(CONFIG) $(WITH_DATA) $(ARGS)

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(FOLDER)
