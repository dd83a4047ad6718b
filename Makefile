# The commands of the README. Each creates .venv if it is missing.
PYTHON ?= python3
RUN := .venv/bin
DEMO := demo_run
HUB_ID :=
SMALL :=
EPOCHS := $(if $(SMALL),1,3)
PANELS := $(if $(SMALL),false,true)
# Else every process would compile again what it imports: some 5,000 modules.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test lint

# Python's own pip takes twice as long to resolve; and it would compile 20,000 modules, of which the
# scripts import a quarter, one after the other.
.venv/.ready: requirements.txt requirements-export.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install --quiet --disable-pip-version-check pip==26.3
	$(RUN)/pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	touch $@

# Weights, a small Marathi corpus, then the three scripts as a user runs them. SMALL=true takes a
# tenth of the sentences, one epoch and no panel: CI tests that with smaller models.
demo: .venv/.ready
	$(RUN)/python -m demo.whisper_base --output_dir $(DEMO)/whisper-base $(if $(HUB_ID),--hub_id $(HUB_ID))
	$(RUN)/python -m demo.speak_corpus --output_dir $(DEMO)/corpus --voices_per_sentence 1 $(if $(SMALL),--train_sentences 24 --dev_sentences 4 --test_sentences 6)
	$(RUN)/python preprocess.py --source $(DEMO)/corpus --language mr --model $(DEMO)/whisper-base --output_dir $(DEMO)/prepared
	$(RUN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no train_lora.py --model $(DEMO)/whisper-base --data_dir $(DEMO)/prepared --output_dir $(DEMO)/run --num_epochs $(EPOCHS) --global_batch_size 8 --max_batch_seconds 30
	@echo "adapter $(DEMO)/run/adapter, curves: $(RUN)/tensorboard --logdir $(DEMO)/run/tensorboard"
	$(RUN)/python eval_wer.py --model $(DEMO)/whisper-base --adapter $(DEMO)/run/adapter --data_dir $(DEMO)/prepared --compare_base true --output_dir $(DEMO)/wer --panels $(PANELS)

test: .venv/.ready
	$(RUN)/python -m pytest -n auto --dist worksteal --durations 5

lint: .venv/.ready
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/hadolint docker/Dockerfile
