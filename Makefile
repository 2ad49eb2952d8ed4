# Everything from an empty machine: each target installs what is missing first, behind a stamp.
# Where a target says what it does, `make help` prints it.

RUNTIME := .runtime
PYTHON  := $(RUNTIME)/venv/bin/python
LIGHT   := $(RUNTIME)/light.stamp
PARITY  := $(RUNTIME)/parity.stamp
CUDA    := $(RUNTIME)/cuda.stamp
CARGO   := cargo
NG      := target/release
OUT     := out
FUZZ    := 600
# Threads that wait for each other by spinning are fastest alone, and several times slower where tests
# run side by side.
test parity: export OMP_WAIT_POLICY := passive

.DEFAULT_GOAL := help
.PHONY: help runtime parity-runtime build cuda demo signs emoji test parity soak page bench gpu-kit gpu rtx dist lint deny fuzz clean-runtime

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

runtime: $(LIGHT) ## Install libtorch, ONNX Runtime and the OCR models into .runtime (0.65 GB)

parity-runtime: $(PARITY) ## Add the Python references: diffusers and all of torch (5 GB)

build: $(LIGHT) ## Build the programs into target/release
	$(CARGO) build --release --workspace --locked
	python3 setup/notices.py $(NG)/THIRD-PARTY.txt

cuda: build $(CUDA) ## Build, and add what computes on NVIDIA GPUs (2.7 GB; driver 580 or newer)

demo: build ## Align the embedded model, export it, sample it (out/demo)
	OUT=$(OUT)/demo ./setup/demo.sh

signs: build ## Make the embedded model again, from the font to the weights (out/signs)
	OUT=$(OUT)/signs ./setup/signs.sh

emoji: build $(PARITY) ## Make the emoji model again, from pictures to weights (needs npm, an hour or more; out/emoji)
	OUT=$(OUT)/emoji ./setup/emoji.sh

test: build ## Run every test, and those that compute once more as on lesser processors
	$(CARGO) test --release --workspace --locked
	./setup/limited.sh

parity: build $(PARITY) ## Compare our programs live with diffusers and onnxruntime (out/parity)
	HF_HUB_OFFLINE=1 $(PYTHON) -B tests/parity/run.py --programs $(NG) --out $(OUT)/parity \
	  tests/fixtures/tiny-flux/pipeline tests/fixtures/tiny-schnell/pipeline assets/signs assets/emoji

soak: build ## Load the server, kill ranks, kill runs, cut the power, damage and crowd folders, for long (out/soak)
	rm -rf $(OUT)/soak && mkdir -p $(OUT)/soak
	$(NG)/ng-export assets/signs --out $(OUT)/soak/signs
	@failed=; trial() { python3 -B "tests/soak/$$@" || failed="$$failed $$1"; }; \
	trial soak.py $(OUT)/soak/signs --program $(NG)/ng-sample; \
	trial ranks.py --program $(NG)/ng-train; \
	trial attacks.py --programs $(NG) --out $(OUT)/soak/attacks; \
	trial ends.py --programs $(NG) --out $(OUT)/soak/ends; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

page: build ## Use the server's page in headless Chromium as a person does (out/page)
	OUT=$(OUT)/page ./setup/page.sh $(RUNTIME) $(NG)

bench: build $(PARITY) ## Measure the claims of the README
	$(CARGO) bench -p benches --locked

gpu-kit: build $(PARITY) ## Pack what measures a GPU on a machine without network or Rust (out/gpu-kit)
	./setup/gpu-kit.sh $(NG) $(RUNTIME) $(OUT)/gpu-kit

gpu: gpu-kit ## Run all that needs a GPU (out/gpu-kit/results)
	PYTHON=$(abspath $(PYTHON)) $(OUT)/gpu-kit/gpu.sh

rtx: build ## Build engines of TensorRT for RTX, no GPU needed (its library, 0.3 GB; out/rtx)
	./setup/rtx.sh $(RUNTIME) $(NG) $(OUT)/rtx

dist: build ## Pack archives that run on a bare Debian (out/dist)
	./setup/dist.sh $(NG) $(RUNTIME) $(OUT)/dist

lint: $(LIGHT) ## Check format and lints
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets --locked -- -D warnings

fuzz: ## Fuzz what is read from files, FUZZ seconds each (needs cargo-fuzz)
	FUZZ=$(FUZZ) ./setup/fuzz.sh

deny: $(LIGHT) ## Check licences, sources and versions of every crate (cargo-deny)
	./setup/deny.sh $(RUNTIME)

clean-runtime: ## Remove .runtime
	rm -rf $(RUNTIME)

$(LIGHT): setup/light.sh setup/debian.sh setup/libtorch.sh setup/requirements-light.txt
	./setup/light.sh $(RUNTIME)
	@touch $@

$(CUDA): $(LIGHT) setup/cuda.sh setup/requirements-cuda.txt
	./setup/cuda.sh $(RUNTIME)
	@touch $@

$(PARITY): $(LIGHT) setup/parity.sh setup/requirements-parity.txt setup/requirements-cuda.txt \
           setup/requirements-optimum.txt \
           setup/requirements-rewards.txt setup/requirements-image-reward.txt \
           setup/requirements-openai.txt
	./setup/parity.sh $(RUNTIME)
	@touch $@
