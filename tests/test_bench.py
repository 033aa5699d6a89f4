"""extras/bench.py: that it measures what training does, and writes all of it down. How fast that is, no test can say."""
import json
import math
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import run, story, train_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import pretrain
import runtime
from extras import bench
from model import Model, ModelConfig
from optim import make_optimizers

SHAPE = dict(vocab_size=5000, dim=64, n_layers=2, n_heads=2, max_seq_len=48)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `python -m extras.bench` wrote and printed, at a tiny shape."""
    folder = tmp_path_factory.mktemp("bench")
    train_tokenizer(folder / "our.model", 400)
    rng = random.Random(4)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": story(rng, 9)}, ensure_ascii=False) + "\n" for _ in range(300))
    constants = dict(SHAPE, micro_batch=3, batch_tokens=1440, new_tokens=6, repeats=1, device="cpu", dtype="float32",
                     compile="off", tokenizer="our.model", corpora="text:text.jsonl", text_bytes=50_000,
                     out="bench.json")
    done = run("extras.bench", folder, *(f"--{name}={value}" for name, value in constants.items()))
    assert done.rc == 0, done.err
    return json.loads((folder / "bench.json").read_text("utf-8")), done.out


def values(measured, what):
    (row,) = (row for row in measured[0]["results"] if row["what"] == what)
    return np.array(row["values"])


def test_every_figure_is_there_and_possible(measured):
    written, printed = measured
    assert {row["part"] for row in written["results"]} == {"training", "generation", "preparation", "checkpoints"}
    assert len(written["results"]) > 25 and written["machine"]["torch"] == torch.__version__
    for row in written["results"]:
        if row["what"] != "of this: removing duplicates":                 # a difference of two times: any sign
            assert 0 < row["low"] <= row["median"] <= row["high"] < math.inf, row
        assert f"| {row['what']} | {row['unit']} |" in printed
    for B in 1, 16:
        for context in "8 to 14", "42 to 48":                             # the long one ends where the context does
            assert len(values(measured, f"generation, batch {B}, context {context}")) == 1


def test_the_flops_are_those_that_pytorch_counts(measured):
    model = Model(ModelConfig(**SHAPE, qk_norm=True))
    x = torch.randint(0, SHAPE["vocab_size"], (2, SHAPE["max_seq_len"]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # attention as plain products
        model(x, x).backward()
    counted = {str(op).split(".")[1]: flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert counted.keys() == {"mm", "bmm"}                                # bmm: attention, of which causal needs half
    expected = (counted["mm"] + counted["bmm"] / 2) / x.numel() / 1e6
    assert values(measured, "training, FLOPs per token") == pytest.approx(expected, rel=1e-6)


def test_the_figures_of_training_fit_each_other(measured):
    share, parts = values(measured, "training, share of the peak (MFU)"), ("reading batches", "forward and backward",
                                                                           "clipping and update")
    assert sum(values(measured, f"of a step: {part}") for part in parts) == pytest.approx(100)
    peak = values(measured, "peak: product of matrices, float32") * 1e12
    flops = values(measured, "training, FLOPs per token") * 1e6
    assert values(measured, "training") * flops / peak == pytest.approx(share / 100)
    weights = Model(ModelConfig(**SHAPE)).n_params()
    held = 4 * 4 * weights / 2 ** 30                                      # weights, gradients, two moments
    assert held < values(measured, "training, peak memory") < held + 0.5


def test_a_step_is_a_step_of_pretrain(tok, pretrain_dir, tmp_path, monkeypatch):
    T, B, steps, data = 32, 4, 3, np.fromfile(pretrain_dir / "train.bin", "<u2")
    n_rows = math.ceil((len(data) - 1) / T)                               # bench.py has no last row that is padded:
    seed = next(seed for seed in range(100) if n_rows - 1 not in runtime.batch_rows(0, steps * B, n_rows, seed))
    constants = dict(tokenizer=tok.name, data_dir=pretrain_dir, out_dir=tmp_path, dim=32, n_layers=1, n_heads=2,
                     max_seq_len=T, batch_tokens=T * B, micro_batch=B, max_steps=steps, warmup=0.0, lr_min=1.0,
                     seed=seed, sample_prompts="", device="cpu", dtype="float32")
    done = run("pretrain.py", tmp_path, *(f"--{name}={value}" for name, value in constants.items()))
    assert done.rc == 0, done.err
    for name, value in dict(max_seq_len=T, BOS=tok.bos_id, EOS=tok.eos_id).items():
        monkeypatch.setattr(bench, name, value)
    torch.manual_seed(seed)
    model = Model(ModelConfig(tok.vocab_size, 32, 1, 2, max_seq_len=T, qk_norm=pretrain.qk_norm))
    optimizers = make_optimizers(model, pretrain.lr, pretrain.muon_lr, pretrain.weight_decay)
    for step, row in enumerate(checkpoints.read_log(tmp_path / "log.csv")):
        loss, norm, _ = bench.optimizer_step(data, runtime.batch_rows(step, B, n_rows, seed), True, model, model,
                                             optimizers, nullcontext(), torch.amp.GradScaler("cpu", enabled=False))
        assert (loss, norm) == pytest.approx((float(row["loss"]), float(row["grad_norm"])), rel=1e-4)
    assert step == steps - 1


@pytest.mark.parametrize("part, name, value, says", [
    ("main", "only", "speed", "choose one of training, generation"),
    ("main", "tokenizer", "gpt2", r"give a \*.model file"),
    ("main", "corpora", "text:nowhere.jsonl", "nowhere.jsonl"),
    ("training", "dim", 63, r"n_heads \(4\) must divide dim \(63\)"),
    ("generation", "max_seq_len", 64, r"new_tokens \(64\) together are more than max_seq_len \(64\)")])
def test_mistakes_end_in_a_sentence(monkeypatch, part, name, value, says):
    monkeypatch.setattr(bench, name, value)
    with pytest.raises(SystemExit, match=says):
        getattr(bench, part)()
