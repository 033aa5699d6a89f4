# make demo   the whole pipeline on a small corpus of our own, in minutes, on a CPU: read what it prints
# make test   the tests
# Both make what they need in .venv first. Every line below is a command that can be typed by hand.

PYTHON = .venv/bin/python
DEMO   = --tokenizer=data/demo/tokenizer.model

demo: .venv/demo
	$(PYTHON) data/make_demo.py
	$(PYTHON) train_tokenizer.py --out=data/demo/tokenizer.model --vocab_size=4096 --max_piece_length=4
	$(PYTHON) prepare_pretrain.py $(DEMO) --corpora=text:data/demo/stories.jsonl --data_dir=data/demo/pretrain
	$(PYTHON) pretrain.py $(DEMO) --data_dir=data/demo/pretrain --out_dir=out/demo/pretrain --overwrite --dim=192 --n_layers=4 --n_heads=6 --max_seq_len=256 --batch_tokens=4096 --max_steps=300 --warmup=0.07 --lr=3e-3 --muon_lr=5e-3 --eval_interval=100 --sample_prompts="从前|有一天，小兔"
	$(PYTHON) prepare_sft.py $(DEMO) --corpora=messages:data/demo/chat.jsonl --data_dir=data/demo/sft --max_seq_len=256 --show=2
	$(PYTHON) sft.py $(DEMO) --checkpoint=out/demo/pretrain/best.pt --data_dir=data/demo/sft --out_dir=out/demo/sft --overwrite --batch_tokens=2048 --epochs=3 --lr=3e-3 --muon_lr=4e-3 --eval_interval=200
	$(PYTHON) sample.py --checkpoint=out/demo/pretrain/best.pt --prompt=从前 --n_samples=3
	$(PYTHON) sample.py --checkpoint=out/demo/sft/best.pt --prompt=请讲一个小兔和小熊的故事。
	$(PYTHON) eval_bleu.py --checkpoint=out/demo/sft/best.pt --questions=data/demo/heldout.jsonl --n_questions=0
	$(PYTHON) -m extras.report --pretrain_dir=out/demo/pretrain --sft_dir=out/demo/sft
	@echo; echo "all of it on a page: out/demo/sft/report.md   answers: out/demo/sft/bleu.md"
	@echo "talk to it: $(PYTHON) sample.py --checkpoint=out/demo/sft/best.pt"

test: .venv/test
	$(PYTHON) -m pytest -q -n auto --maxprocesses=8 --dist=loadfile tests

# The PyTorch of the Python that calls make, where that sees a card; else one pinned build, without CUDA if pip has it.
.venv/bin/python:
	python3 -m venv $$(python3 -c "import torch; print('--system-site-packages' * torch.cuda.is_available())" 2>/dev/null) .venv
	$(PYTHON) -c "import torch" 2>/dev/null || { command -v nvidia-smi >/dev/null && $(PYTHON) -m pip install --quiet torch; } || \
	$(PYTHON) -m pip install --quiet torch==2.13.0+cpu || $(PYTHON) -m pip install --quiet torch==2.13.0

.venv/demo: .venv/bin/python requirements.txt
	$(PYTHON) -m pip install --quiet -r requirements.txt matplotlib
	@touch $@

# The chat page is tested in a browser: the system's, or one that Playwright downloads, or in CI
# Debian's. Without any, those tests are skipped; so are those of Spark without the system's Java 17.
.venv/test: .venv/demo Makefile
	$(PYTHON) -m pip install --quiet pytest pytest-xdist sacrebleu transformers accelerate safetensors tokenizers gguf pyarrow \
	zstandard peft trl starlette uvicorn openai playwright pyspark
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	echo "installing a browser for the tests of the page"; \
	$(PYTHON) -m playwright install --only-shell chromium >/dev/null 2>&1 || \
	{ test -n "$$CI" && apt-get update -qq && apt-get install -qq --no-install-recommends chromium >/dev/null; } || \
	echo "no browser could be installed: the tests of the page will be skipped"
	@touch $@

.PHONY: demo test
