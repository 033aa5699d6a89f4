"""extras/bench.py measures what training does and writes all of it down.

How fast that is, no test can say.
"""
import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import run, story, train_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import checkpoints
import pretrain
from extras import bench
from model import Model, ModelConfig

SHAPE = dict(vocab_size=5000, dim=64, n_layers=2, n_heads=2, max_seq_len=48)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `python -m extras.bench` wrote and printed, at a tiny shape."""
    folder = tmp_path_factory.mktemp("bench")
    train_tokenizer(folder / "our.model", 400)
    rng = random.Random(4)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as f:
        for _ in range(300):
            f.write(json.dumps({"text": story(rng, 9)}, ensure_ascii=False) + "\n")
    constants = dict(
        SHAPE,
        micro_batch=3,
        batch_tokens=1440,
        new_tokens=6,
        repeats=1,
        device="cpu",
        dtype="float32",
        compile="off",
        tokenizer="our.model",
        corpora="text:text.jsonl",
        text_bytes=50_000,
        out="bench.json")
    done = run("extras.bench", folder, *(f"--{name}={value}" for name, value in constants.items()))
    assert done.rc == 0, done.err
    return json.loads((folder / "bench.json").read_text("utf-8")), done.out


def values(measured, what):
    (row,) = (row for row in measured[0]["results"] if row["what"] == what)
    return np.array(row["values"])


def test_every_figure_is_there_and_possible(measured):
    written, printed = measured
    parts = {row["part"] for row in written["results"]}
    assert parts == {"training", "generation", "preparation", "checkpoints"}
    assert len(written["results"]) > 20
    assert written["machine"]["torch"] == torch.__version__
    for row in written["results"]:
        if row["what"] != "of this: removing duplicates":  # a difference of times: any sign
            assert 0 < row["low"] <= row["median"] <= row["high"] < math.inf, row
        assert f"| {row['what']} | {row['unit']} |" in printed
    for B in 1, 16:
        for context in "8 to 14", "42 to 48":  # the long one ends where the context does
            assert len(values(measured, f"generation, batch {B}, context {context}")) == 1


def test_the_flops_are_those_that_pytorch_counts(measured):
    model = Model(ModelConfig(**SHAPE, qk_norm=True))
    x = torch.randint(0, SHAPE["vocab_size"], (2, SHAPE["max_seq_len"]))
    # SDPBackend.MATH computes attention as plain products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, x).backward()
    counts = counter.get_flop_counts()["Global"]
    counted = {str(op).split(".")[1]: flops for op, flops in counts.items()}
    # bmm is attention, of which a causal one needs half
    assert counted.keys() == {"mm", "bmm"}
    expected = (counted["mm"] + counted["bmm"] / 2) / x.numel() / 1e6
    assert values(measured, "training, FLOPs per token") == pytest.approx(expected, rel=1e-6)


def test_the_figures_of_training_fit_each_other(measured):
    peak = values(measured, "peak: product of matrices") * 1e12
    flops = values(measured, "training, FLOPs per token") * 1e6
    share = values(measured, "training, share of the peak (MFU)")
    assert values(measured, "training") * flops / peak == pytest.approx(share / 100)
    weights = Model(ModelConfig(**SHAPE)).n_params()
    held = 4 * 4 * weights / 2 ** 30  # weights, gradients, two moments
    assert held < values(measured, "training, peak memory") < held + 0.5


def test_the_steps_are_those_of_pretrain_with_the_constants_of_the_bench(tmp_path, monkeypatch):
    """A network in the model's place notes the shape of each batch that it is given."""
    seen = []

    class Watched(Model):
        def forward(self, x, y, cu_seqlens):
            seen.append((x.shape, cu_seqlens is not None, self.config.dim))
            return super().forward(x, y, cu_seqlens)
    constants = dict(
        SHAPE,
        batch_tokens=48 * 10,
        micro_batch=4,
        repeats=2,
        device="cpu",
        dtype="float32",
        compile="off",
        clocks=[])
    for name, value in constants.items():
        monkeypatch.setattr(bench, name, value)
        if name in bench.constants:
            monkeypatch.setitem(bench.constants, name, value)
    monkeypatch.setattr(pretrain, "Model", Watched)
    for name, value in vars(pretrain).copy().items():  # so that all of it is restored afterwards
        monkeypatch.setattr(pretrain, name, value)
    monkeypatch.setattr(checkpoints, "Run", checkpoints.Run)
    figures = {what: values for what, _, values in bench.training()}
    assert [shape for shape, *_ in seen[:3]] == [(4, 48), (4, 48), (2, 48)]
    assert len(seen) == 3 * 4
    assert all(masked and dim == SHAPE["dim"] for _, masked, dim in seen)
    assert len(figures["training"]) == 2  # the first two steps warm up


@pytest.mark.parametrize("part, name, value, says", [
    ("main", "only", "speed", "choose one of training, generation"),
    ("main", "tokenizer", "gpt2", r"give a \*.model file"),
    ("main", "corpora", "text:nowhere.jsonl", "nowhere.jsonl"),
    ("main", "out", ".", "--out='.': cannot be written"),
    ("training", "dim", 63, r"n_heads \(4\) must divide dim \(63\)"),
    ("generation", "max_seq_len", 64,
     r"new_tokens \(64\) together are more than max_seq_len \(64\)")])
def test_mistakes_end_in_a_sentence(monkeypatch, part, name, value, says):
    monkeypatch.setattr(bench, name, value)
    with pytest.raises(SystemExit, match=says):
        getattr(bench, part)()
