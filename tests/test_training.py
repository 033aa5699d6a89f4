"""pretrain.py, sft.py and the runtime under them.

The order of the data, the loss of the global batch, exact resume, faults. Most runs happen in this
process: train() sets the constants of a stage and calls its main(). Where processes matter
(torchrun, SIGKILL, exit codes) the script itself runs.
"""
import base64
import csv
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DID, ROOT, WHERE, WHO, dialogue, run, story, write_pretrain, write_sft

import checkpoints
import config
import pretrain
import runtime
import sft
from model import IGNORE, Model, ModelConfig
from optim import make_optimizers
from tokenizer import load as load_tokenizer

CPU = torch.device("cpu")
SHAPE = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_seq_len=32)
LONG = 80  # the context of fine-tuning: examples have 13 to 74
COMMON = dict(
    micro_batch=2,
    max_steps=6,
    eval_interval=3,
    warmup=0.34,
    lr=0.01,
    muon_lr=0.01,
    device="cpu",
    dtype="float32",
    sample_prompts="",
    log_interval=1,
    compile="off",
)


@pytest.fixture(scope="module")
def settings(tok, pretrain_dir, sft_dir, tmp_path_factory):
    """{stage: its constants for a tiny run}.

    A global batch is 5 rows, so that no number of processes divides it.
    """
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **{**SHAPE, "max_seq_len": LONG}))
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_model(path, model, tok, "pretrain")
    common = dict(COMMON, tokenizer=tok.name)
    return {
        pretrain: dict(
            common,
            **SHAPE,
            init_from="",
            batch_tokens=5 * 32,
            data_dir=str(pretrain_dir),
        ),
        sft: dict(
            common,
            max_seq_len=0,
            batch_tokens=5 * LONG,
            data_dir=str(sft_dir),
            checkpoint=str(path),
        ),
    }


def save_model(path, model, tok, stage, **more):
    state = {
        "stage": stage,
        "model": model.state_dict(),
        "shape": vars(model.config),
        "step": 0,
        "constants": {},
        "tokenizer": tok.name,
        "tokenizer_sha256": tok.sha256,
        **more,
    }
    checkpoints.save(str(path), state)


@contextmanager
def constants(stage, **values):
    """The stage with these constants, and without what costs time.

    The runs of whole scripts measure the processor and draw the curve.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(stage, name, value)
        patch.setattr(runtime, "matmul_rate", lambda device, dtype: 1e9)
        patch.setattr(runtime, "draw_curve", lambda out_dir, title: "no curve")
        # pytest has handlers of its own, which come back afterwards
        numbers = signal.SIGINT, signal.SIGTERM
        handlers = {number: signal.getsignal(number) for number in numbers}
        try:
            yield patch
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture
def train(settings, tmp_path):
    """train(stage, folder, **changes) runs main(); returns its log, a dict of floats a step."""
    def call(stage, folder, **changes):
        values = {**settings[stage], "out_dir": str(tmp_path / folder), **changes}
        with constants(stage, **values):
            stage.main()
        return read_log(tmp_path / folder)
    return call


@pytest.fixture
def train_script(settings, tmp_path):
    """The same as train(), but the script itself runs; returns what conftest.run() returns."""
    def call(stage, folder, *arguments, torchrun=0, code=None, **changes):
        arguments = *flags(settings, stage, out_dir=tmp_path / folder, **changes), *arguments
        script = f"{stage.__name__}.py"
        return run(script, tmp_path, *arguments, torchrun=torchrun, code=code)
    return call


def flags(settings, stage, **changes):
    values = {**settings[stage], **changes}
    return [f"--{name}={value}" for name, value in values.items()]


def read_log(folder):
    with open(folder / "log.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


def losses(log):
    validations = [row["val_loss"] for row in log if "val_loss" in row]
    return [row["loss"] for row in log] + validations


def last_state(folder):
    return checkpoints.load(folder / "last.pt")


def model_of(saved):
    return Model.from_state(saved["shape"], saved["model"])


def refused(call, *args, **named):
    """The sentence with which it ends: SystemExit, one line, exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        call(*args, **named)
    assert isinstance(stopped.value.code, str)
    assert "\n" not in stopped.value.code
    return stopped.value.code


BOTH = pytest.mark.parametrize("stage", [pretrain, sft], ids=["pretrain", "sft"])


# ---- the order of the data -----------------------------------------------------------------------

@pytest.mark.parametrize(
    "n_rows, batch", [(1, 1), (1, 4), (7, 3), (13, 5), (10, 5), (12, 31), (97, 8)]
)
def test_every_row_comes_once_per_epoch(n_rows, batch):
    def epochs_of(seed):
        steps = range(3 * n_rows)  # whole epochs, for any batch
        rows = [runtime.batch_rows(step, batch, n_rows, seed) for step in steps]
        return np.concatenate(rows).reshape(-1, n_rows)

    epochs = epochs_of(seed=5)
    assert len(epochs) == 3 * batch
    for epoch in epochs:
        assert sorted(epoch) == list(range(n_rows))
    if n_rows > 5:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], np.arange(n_rows))
        assert not np.array_equal(epochs, epochs_of(seed=6))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("micro_batch", [1, 2, 4, 100])
def test_the_processes_share_the_batch_whatever_their_number(world_size, micro_batch):
    rows = runtime.batch_rows(3, 7, 30, seed=0)
    pieces = []
    for rank in range(world_size):
        process = SimpleNamespace(rank=rank, world_size=world_size)
        pieces += runtime.micro_batches(rows, micro_batch, process)
    assert sorted(int(row) for piece in pieces for row in piece) == sorted(rows)
    assert all(1 <= len(piece) <= micro_batch for piece in pieces)


def test_a_batch_of_documents_starts_each_with_bos_and_wants_its_eos():
    tok = SimpleNamespace(bos_id=1, eos_id=2)
    data = np.array([11, 12, 2, 2, 13, 14, 15, 2, 16, 2, 17, 18, 2], dtype="<u2")
    with constants(pretrain, max_seq_len=5, mask_documents=True):
        x, y, cu_seqlens = pretrain.read_batch(data, np.array([0, 1, 2]), tok, CPU)
    assert x.tolist() == [
        [11, 12, 1, 1, 13],
        [14, 15, 1, 16, 1],
        [17, 18, 1, 1, 1],
    ]
    assert y.tolist() == [
        [12, 2, 2, 13, 14],
        [15, 2, 16, 2, 17],
        [18, 2, IGNORE, IGNORE, IGNORE],
    ]
    assert cu_seqlens.tolist()[:7] == [0, 2, 3, 5, 7, 9, 10]
    assert cu_seqlens.tolist()[-1] == 15
    assert cu_seqlens.dtype == torch.int32
    with constants(pretrain, max_seq_len=5, mask_documents=False):
        assert pretrain.read_batch(data, np.array([0]), tok, CPU)[2] is None


@pytest.mark.parametrize("length", [2, 31, 32, 33, 34, 64, 65, 66, 1000])
def test_every_token_but_the_first_is_a_target_once_in_an_epoch(length):
    rng = np.random.default_rng(length)
    tok = SimpleNamespace(bos_id=1, eos_id=2)
    is_eos = rng.random(length) < 0.1
    data = np.where(is_eos, 2, rng.integers(3, 400, length)).astype("<u2")
    rows = np.arange(math.ceil((length - 1) / 32))
    with constants(pretrain, max_seq_len=32):
        x, y, _ = pretrain.read_batch(data, rows, tok, CPU)
    counted = y != IGNORE
    assert y[counted].tolist() == data[1:].tolist()
    assert x[counted].tolist() == np.where(data == 2, 1, data)[:-1].tolist()
    assert not (x == tok.eos_id).any()


@BOTH
def test_the_schedule_warms_up_and_ends_at_lr_min(stage):
    with constants(stage, warmup=1 / 11, max_steps=110, lr_min=0.1):
        assert stage.schedule(1) == pytest.approx(0.1)  # the first step moves already
        assert stage.schedule(10) == pytest.approx(1.0)
        assert stage.schedule(60) == pytest.approx(0.55)  # half-way down the cosine
        assert stage.schedule(110) == pytest.approx(0.1)
        values = [stage.schedule(step) for step in range(1, 111)]
        assert values[:10] == sorted(values[:10])
        assert values[9:] == sorted(values[9:], reverse=True)
    for warmup, max_steps in ((0.0, 1), (1.0, 1), (0.2, 2), (1.0, 5), (2.0, 5)):
        with constants(stage, warmup=warmup, max_steps=max_steps, lr_min=0.1):
            assert 0 < stage.schedule(max_steps) <= 1


@BOTH
@pytest.mark.parametrize("max_steps, peak", [(10, 1), (100, 2), (1_000, 20), (1_000_000, 500)])
def test_by_default_a_short_run_leaves_its_warm_up_and_a_long_one_does_not_stay_in_it(
    stage, max_steps, peak
):
    """Otherwise a run of ten steps, enough for ninety sentences, would learn nothing."""
    steps = range(1, min(max_steps, 1000) + 1)
    with constants(stage, max_steps=max_steps):
        assert max(steps, key=stage.schedule) == peak


# ---- packing -------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(8))
def test_pack_puts_every_example_in_one_row_and_wastes_little(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 300))
    longest = max(2, size // rng.integers(1, 5))
    n_examples = int(rng.integers(1, 800))
    lengths = rng.integers(1, longest + 1, n_examples).clip(max=size)
    rows = sft.pack(lengths, size)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < sum(lengths[i] for i in row) <= size
    optimum = max(math.ceil(lengths.sum() / size), (lengths > size / 2).sum())
    assert len(rows) <= 11 / 9 * optimum + 1  # Johnson's bound


def test_pack_of_full_half_and_no_examples():
    assert len(sft.pack(np.full(5, 8), 8)) == 5
    assert len(sft.pack(np.full(6, 4), 8)) == 3
    assert sft.pack(np.array([], dtype=int), 8) == []
    assert len(sft.pack(np.array([7, 1, 6, 2, 5, 3, 4, 4]), 8)) == 4


@pytest.fixture(scope="module")
def examples(settings, tok):
    """The training split, the network to start from, and two lists with one entry per example.

    The split is packed. The lists hold (ids, mask), and the naive nats of each target.
    """
    with constants(sft, **settings[sft]):
        meta = json.loads(Path(sft.data_dir, "meta.json").read_text("utf-8"))
        data = sft.Examples("train", meta, LONG, tok.vocab_size)
        model = model_of(checkpoints.load(sft.checkpoint))
    singles, nats = [], []
    for a, b in zip(data.starts, data.starts[1:]):
        ids = data.tokens[a:b].tolist()
        mask = data.mask[a:b].tolist()
        with torch.no_grad():
            logp = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        singles.append((ids, mask))
        targets = [t for t in range(1, len(ids)) if mask[t]]
        nats.append([-logp[t - 1, ids[t]].item() for t in targets])
    return data, model, singles, nats


def test_a_batch_of_examples_counts_the_answers_from_their_first_token(settings, tok, examples):
    data, _, singles, _ = examples
    with constants(sft, **settings[sft]):
        x, y, cu_seqlens = sft.read_batch(data, np.arange(len(data.rows)), tok, CPU)
    assert any(len(row) > 1 for row in data.rows)
    starts = []  # of the examples in the flattened batch
    for b, row in enumerate(data.rows):
        line = x[b].tolist()
        targets = y[b].tolist()
        at = 0
        for ids, mask in (singles[i] for i in row):
            starts.append(b * LONG + at)
            end = at + len(ids) - 1
            counted = [id if m else IGNORE for id, m in zip(ids[1:], mask[1:])]
            assert line[at:end] == ids[:-1]
            assert targets[at:end] == counted
            # the header of the turn predicts the first token of the answer
            header = ids.index(tok.controls["<|assistant|>"])
            assert targets[at + header] == ids[header + 1] != IGNORE
            assert targets[end - 1] == tok.end_id
            at = end
        assert set(line[at:]) <= {tok.pad_id}
        assert set(targets[at:]) <= {IGNORE}
        if at < LONG:
            starts.append(b * LONG + at)  # the padding is a document, too
    sums = (y != IGNORE).sum(1)
    assert sums.tolist() == data.targets.tolist()
    assert sums.sum() == sum(sum(mask) for _, mask in singles)
    assert cu_seqlens.tolist() == starts + [len(data.rows) * LONG]


def test_a_packed_row_has_the_loss_of_its_examples_alone(settings, tok, examples):
    data, model, _, nats = examples
    with constants(sft, **settings[sft]), torch.no_grad():
        for i, row in enumerate(data.rows):
            loss = model(*sft.read_batch(data, np.array([i]), tok, CPU))
            expected = sum(sum(nats[j]) for j in row)
            assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_the_loss_is_the_mean_over_all_answer_tokens_of_the_global_batch(
    train, examples, micro_batch
):
    data, _, _, nats = examples
    [row] = train(sft, "a", max_steps=1, micro_batch=micro_batch)
    picked = []
    for i in runtime.batch_rows(0, 5, len(data.rows), sft.seed):
        for j in data.rows[i]:
            picked += nats[j]
    assert row["loss"] == pytest.approx(sum(picked) / len(picked), rel=1e-5)


def test_the_pretraining_loss_is_the_mean_over_all_tokens_of_the_global_batch(
    train, tmp_path, pretrain_dir, tok
):
    # with learning rates of 0 the saved weights are the initial ones
    [row] = train(pretrain, "a", max_steps=1, lr=0.0, muon_lr=0)
    model = model_of(last_state(tmp_path / "a"))
    data = np.fromfile(pretrain_dir / "train.bin", dtype="<u2").astype(int)
    documents = np.cumsum(np.append(0, data[:-1] == tok.eos_id))
    n_rows = math.ceil((len(data) - 1) / 32)
    picked = []
    for i in runtime.batch_rows(0, 5, n_rows, pretrain.seed):
        start = i * 32
        y = data[start + 1 : start + 33]
        x = data[start : start + len(y)]
        # an input belongs to the document of its target: eos becomes the bos of the next one
        inputs = np.where(x == tok.eos_id, tok.bos_id, x)
        belongs = documents[start + 1 : start + 1 + len(y)]
        for document in np.unique(belongs):
            mine = belongs == document
            with torch.no_grad():
                logits = model(torch.tensor(inputs[mine])[None])[0].double()
            targets = torch.tensor(y[mine])
            picked += F.cross_entropy(logits, targets, reduction="none").tolist()
    assert row["loss"] == pytest.approx(sum(picked) / len(picked), rel=1e-5)


def validation_data(stage, folder, tok):
    """(the validation split as the stage reads it, its number of rows)."""
    if stage is pretrain:
        data = np.fromfile(folder / "val.bin", dtype="<u2")
        return data, math.ceil((len(data) - 1) / 32)
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    data = sft.Examples("val", meta, LONG, tok.vocab_size)
    return data, len(data.rows)


@BOTH
def test_the_validation_loss_is_the_mean_over_the_whole_split(
    train, settings, tok, tmp_path, stage
):
    log = train(stage, "a", max_steps=2, eval_interval=1)
    model = model_of(last_state(tmp_path / "a"))
    nats = n = n_bytes = 0
    with constants(stage, **settings[stage]), torch.no_grad():
        data, n_rows = validation_data(stage, Path(stage.data_dir), tok)
        for i in range(n_rows):
            x, y, cu_seqlens = stage.read_batch(data, np.array([i]), tok, CPU)
            logits = model(x, cu_seqlens=cu_seqlens)[0].double()
            nats += F.cross_entropy(logits, y[0], reduction="sum", ignore_index=IGNORE).item()
            targets = y[y != IGNORE]
            n += len(targets)
            n_bytes += sum(len(tok.pieces[target]) for target in targets)
    assert log[-1]["val_loss"] == pytest.approx(nats / n, rel=1e-5)
    assert log[-1]["val_bpb"] == pytest.approx(nats / n_bytes / math.log(2), rel=1e-5)


# ---- any split of the work gives the same run ----------------------------------------------------

@BOTH
def test_the_losses_do_not_depend_on_the_micro_batch(train, stage):
    one, three, all_rows = (
        losses(train(stage, f"m{m}", micro_batch=m)) for m in (1, 3, 100)
    )
    assert one == pytest.approx(three, rel=1e-5)
    assert one == pytest.approx(all_rows, rel=1e-5)
    assert one[5] < one[0] - 0.1  # it learns: the steps were taken


@BOTH
def test_two_processes_have_the_losses_of_one(train, train_script, tmp_path, stage):
    one = train(stage, "one")
    done = train_script(stage, "two", torchrun=2)
    assert done.rc == 0, done.err
    assert "2 x cpu" in done.out
    two = read_log(tmp_path / "two")
    assert len(two) == 6
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-5)


def test_one_process_needs_no_process_group(train, monkeypatch):
    not_needed = lambda *a, **k: pytest.fail("a process group")
    monkeypatch.setattr(torch.distributed, "init_process_group", not_needed)
    assert len(train(pretrain, "a", max_steps=1)) == 1


@BOTH
def test_the_gradient_is_clipped_to_the_norm_that_was_asked_for(train, tmp_path, stage):
    """AdamW's first moments are (1 - beta1) times the gradient after one step."""
    for clip, name in ((0.01, "clipped"), (0.0, "free")):
        [row] = train(stage, name, max_steps=1, grad_clip=clip, muon_lr=0.0)
        [adamw] = last_state(tmp_path / name)["optimizers"]
        beta1, _ = adamw["param_groups"][0]["betas"]
        moments = [state["exp_avg"].flatten() for state in adamw["state"].values()]
        norm = torch.cat(moments).norm().item() / (1 - beta1)
        assert row["grad_norm"] > 0.1
        assert norm == pytest.approx(clip or row["grad_norm"], rel=1e-4)


@BOTH
@pytest.mark.parametrize("rows", [1, 2])
def test_validation_takes_as_many_tokens_as_it_may(train, settings, tok, tmp_path, stage, rows):
    size = 32
    folder = settings[stage]["data_dir"]
    if stage is sft:
        size = LONG
        rng = random.Random(4)
        chats = [dialogue(rng, 2) for _ in range(20)]
        folder = str(write_sft(tmp_path / "data", tok, chats, chats))
    log = train(stage, "a", max_steps=1, eval_tokens=rows * size + 1, data_dir=folder)
    model = model_of(last_state(tmp_path / "a"))
    with constants(stage, **{**settings[stage], "data_dir": folder}), torch.no_grad():
        data, _ = validation_data(stage, Path(folder), tok)
        x, y, cu_seqlens = stage.read_batch(data, np.arange(rows), tok, CPU)
        nats = model(x, y, cu_seqlens).item() / (y != IGNORE).sum().item()
    assert log[0]["val_loss"] == pytest.approx(nats, rel=1e-5)


def naive_adamw(p, gradients, lr, decay, beta1=0.8, beta2=0.95, eps=1e-8):
    """Loshchilov and Hutter 2019, algorithm 2."""
    m = v = torch.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        mean = m / (1 - beta1**t)
        variance = v / (1 - beta2**t)
        p = p - lr * decay * p - lr * mean / (variance.sqrt() + eps)
    return p


def test_adamw_is_the_naive_one_with_its_betas():
    model = Model(ModelConfig(50, **SHAPE))
    [optimizer] = make_optimizers(model, 0.01, 0, 0.3)
    random = torch.Generator().manual_seed(7)
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    gradients = {}
    for name, p in params.items():
        gradients[name] = [torch.randn(p.shape, generator=random) for _ in range(4)]
    for step in range(4):
        for name, p in params.items():
            p.grad = gradients[name][step].clone()
        optimizer.step()
    for name, p in params.items():
        decay = 0.3 if p.ndim == 2 else 0.0
        expected = naive_adamw(before[name], gradients[name], 0.01, decay)
        torch.testing.assert_close(p.data, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_in_bfloat16_have_the_losses_of_one(train, train_script, tmp_path):
    one = train(pretrain, "one", dtype="bfloat16")
    done = train_script(pretrain, "two", torchrun=2, dtype="bfloat16")
    assert done.rc == 0, done.err
    assert "products in bfloat16" in done.out
    for a, b in zip(one, read_log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=0.05)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@BOTH
def test_half_precision_learns_like_float32(train, stage, dtype, tmp_path):
    half = train(stage, "half", dtype=dtype)
    full = train(stage, "full")
    assert [row["loss"] for row in half] != [row["loss"] for row in full]
    for a, b in zip(half, full):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    saved = last_state(tmp_path / "half")
    assert saved["model"]["embedding.weight"].dtype == torch.float32
    assert bool(saved["scaler"]) == (dtype == "float16")
    assert saved["skipped"] == 0


def set_initial_scale(monkeypatch, init_scale):
    scaler = partial(torch.amp.GradScaler, init_scale=init_scale)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


SKIPPING = dict(dtype="float16", max_steps=40, eval_interval=40, batch_tokens=2 * 32)


def test_an_overflow_in_float16_skips_the_step_lowers_the_scale_and_is_counted(
    train, tmp_path, monkeypatch, capsys
):
    set_initial_scale(monkeypatch, 2.0**40)
    log = train(pretrain, "a", **SKIPPING)
    saved = last_state(tmp_path / "a")
    assert 10 < saved["skipped"] < 35
    assert f"{saved['skipped']} skipped" in capsys.readouterr().out
    assert saved["scaler"]["scale"] == 2.0 ** (40 - saved["skipped"])
    assert all(torch.isfinite(w).all() for w in saved["model"].values())
    skipped = [row for row in log if not math.isfinite(row["grad_norm"])]
    assert len(skipped) == saved["skipped"]
    assert log[-1]["loss"] < log[0]["loss"]
    assert math.isfinite(log[-1]["val_loss"])


def test_a_poisoned_float16_run_ends_with_a_sentence_instead_of_skipping_for_ever(
    train, monkeypatch
):
    real = Model.loss
    poisoned = lambda self, h, y, per_token: real(self, h, y) * math.nan
    monkeypatch.setattr(Model, "loss", poisoned)
    with pytest.raises(SystemExit, match="step [0-9]+: the loss is nan"):
        train(pretrain, "a", **{**SKIPPING, "max_steps": 500, "eval_interval": 500})


@pytest.fixture(scope="module")
def large_tok(tmp_path_factory):
    """A rank file of 70,000 tokens; the characters of the stories are the last of them."""
    texts = (*WHO, *WHERE, *DID, "从前，在。")
    characters = sorted({c.encode() for text in texts for c in text})
    pieces = [bytes([b]) for b in range(256)]
    pieces += sorted({c[:2] for c in characters})
    n_fillers = 69_999 - len(pieces) - len(characters)
    pieces += [b"filler %d" % i for i in range(n_fillers)]
    pieces += characters
    lines = [b"%s %d\n" % (base64.b64encode(piece), i) for i, piece in enumerate(pieces)]
    path = tmp_path_factory.mktemp("large") / "large.tiktoken"
    path.write_bytes(b"".join(lines))
    return load_tokenizer(str(path))


@BOTH
def test_ids_above_65535_are_trained_on_and_resumed(train, settings, large_tok, tmp_path, stage):
    text = "小猫在河边唱了一首歌。"
    answer = "在河边。"
    ids = large_tok.encode(text)
    assert large_tok.vocab_size == 70_000
    assert min(ids) > 65_535
    small = dict(SHAPE, dim=8, hidden_dim=8, n_layers=1)
    folder = tmp_path / "data"
    how = dict(
        tokenizer=large_tok.name,
        data_dir=str(folder),
        batch_tokens=5 * 32,
        eval_interval=1,
        warmup=0.0,
        lr_min=1.0,
    )
    if stage is pretrain:
        how.update(small)
        write_pretrain(folder, large_tok, [text] * 60, ["小猫在河边。"] * 9, "uint32")
        targets = {*ids, large_tok.eos_id}
    else:
        chat = [
            {"role": "user", "content": "小猫"},
            {"role": "assistant", "content": answer},
        ]
        write_sft(folder, large_tok, [chat] * 60, [chat] * 9, "uint32")
        how["checkpoint"] = str(tmp_path / "base.pt")
        base = Model(ModelConfig(70_000, **small))
        save_model(how["checkpoint"], base, large_tok, "pretrain")
        targets = {*large_tok.encode(answer), large_tok.eos_id}
    with constants(stage, **{**settings[stage], **how, "max_seq_len": 32}):
        if stage is pretrain:
            data = np.fromfile(folder / "train.bin", "<u4")
        else:
            meta = checkpoints.read_meta(f"{folder}/meta.json", large_tok, "prepare_sft.py")
            data = sft.Examples("train", meta, 32, 70_000)
        _, y, _ = stage.read_batch(data, np.arange(5), large_tok, CPU)
        assert set(y[y != IGNORE].tolist()) == targets
    log = train(stage, "whole", **how, max_steps=2)
    assert log[1]["val_loss"] < log[0]["val_loss"] < math.log(70_000)
    train(stage, "halves", **how, max_steps=1)
    train(stage, "halves", **how, max_steps=2, resume=True)
    same_run(tmp_path / "whole", tmp_path / "halves")


# ---- the device ----------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "cuda, error, said",
    [
        (None, None, "was built without CUDA"),
        ("13.0", "The NVIDIA driver on your system is too old\nmore", "too old"),
        ("13.0", "", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_card_that_pytorch_cannot_use_is_named_with_the_reason(
    monkeypatch, capsys, cuda, error, said
):
    def init():
        if error:
            raise RuntimeError(error)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name == "nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert runtime.start("auto").device.type in ("cpu", "mps")
    assert said in capsys.readouterr().out.strip()
    assert "\n" not in runtime.unusable_card()
    with pytest.raises(SystemExit, match=said):
        runtime.start("cuda")


def test_without_a_card_nothing_is_said_of_one(monkeypatch, capsys):
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    monkeypatch.setattr(runtime.os.path, "exists", lambda path: False)
    runtime.start("cpu")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "dtype, expected", [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_model_is_loaded_with_its_tokenizer_in_the_precision_that_was_asked_for(
    tok, other_tok, tmp_path, dtype, expected
):
    original = Model(ModelConfig(tok.vocab_size, **SHAPE))
    path = str(tmp_path / "best.pt")
    save_model(path, original, tok, "sft", val_bpb=1.5)
    model, found, saved = runtime.load_model(path, "", "cpu", dtype)
    assert found.sha256 == tok.sha256
    assert saved["stage"] == "sft"
    assert saved["val_bpb"] == 1.5
    assert "model" not in saved
    assert not model.training
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, w in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], w.to(expected))
        assert w.dtype == torch.float32
    wrong_tok = refused(runtime.load_model, path, other_tok.name, "cpu", dtype)
    assert "was trained with" in wrong_tok
    assert "not usable here" in refused(runtime.load_model, path, "", "tpu", dtype)


@pytest.mark.parametrize(
    "free, world_size, expected", [(1e6, 1, 1), (2e9, 1, 8), (80e9, 1, 64), (80e9, 4, 16)]
)
def test_a_micro_batch_fills_the_memory_of_a_card_but_not_more_than_its_share_of_the_batch(
    monkeypatch, free, world_size, expected
):
    model = Model(ModelConfig(16_384, 512, 8, 4))
    process = runtime.Process(0, 0, world_size, torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    rows = runtime.rows_that_fit(model, process, "bfloat16", 64, 512)
    needed, of_twice = (
        model.bytes_to_train(n, 512, torch.bfloat16) - 4 * model.n_params()
        for n in (rows, 2 * rows)
    )
    is_largest = needed < 0.9 * free <= of_twice
    assert rows == expected or free == 2e9 and is_largest
    assert rows & (rows - 1) == 0


ROWS_OF_TWO = """
import os
import torch
import torch.distributed as dist
import runtime
from model import Model, ModelConfig
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.cuda.mem_get_info = lambda device: ((2e9, 80e9)[rank], 80e9)
process = runtime.Process(rank, rank, 2, torch.device("cuda", rank))
model = Model(ModelConfig(16_384, 512, 8, 4))
rows = runtime.rows_that_fit(model, process, "bfloat16", 128, 512)
os.write(1, b"%d\\n" % rows)                   # in one piece, unlike print()
dist.destroy_process_group()
runtime.end_at_once(0)                         # as runs end: PyTorch 2.6 may hang otherwise
"""


def test_the_card_with_the_least_memory_decides_for_all(tmp_path):
    """Processes that share a model must run it equally often, or they wait for ever."""
    (tmp_path / "script.py").write_text(ROWS_OF_TWO, encoding="utf-8")
    done = run(tmp_path / "script.py", tmp_path, torchrun=2)
    assert done.rc == 0, done.err
    assert done.out.split()[-2:] == ["8", "8"], done.out      # in PyTorch 2.9 gloo speaks before


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_run_is_announced_with_its_cost(monkeypatch, capsys, world_size):
    monkeypatch.setattr(runtime, "matmul_rate", lambda device, dtype: 1e10)
    monkeypatch.setattr(runtime, "busy_threads", lambda: 0)
    model = Model(ModelConfig(1000, **SHAPE))
    process = runtime.Process(0, 0, world_size, CPU)
    run_of_3000_steps = model, process, "float32", 3000, 10, 4, 600, 32
    facts = runtime.announce(*run_of_3000_steps)
    lines = capsys.readouterr().out.splitlines()
    for what, sentence in facts.items():
        assert f"{what:<11} {sentence}" in lines
    n_params = sum(p.numel() for p in model.parameters())
    assert f"{n_params:,}, of which 32,000 embed" in facts["parameters"]
    at_a_time = 3 if world_size == 4 else 4
    step = f"320 tokens = 10 rows of 32, at most {at_a_time} at a time"
    assert step in facts["step"]
    assert "steps: 3,000, tokens: 960,000, epochs: 50.00 (rows: 600)" in facts["training"]
    seconds = 960_000 * model.flops_per_token(32) / (0.35e10 * world_size)
    assert facts["time"].startswith(f"about {seconds:.0f} s = 9.6e+05 tokens")
    assert f"{world_size} x cpu" in facts["device"]
    assert "products in float32" in facts["device"]
    assert "a mask over whole rows" in facts["attention"]
    assert "load" not in facts
    assert facts["compiled"] == "no"
    monkeypatch.setattr(runtime, "busy_threads", lambda: 2)
    monkeypatch.setattr(runtime.os, "cpu_count", lambda: 4)
    for threads, is_said in (1, False), (2, False), (3, True):
        monkeypatch.setattr(runtime.torch, "get_num_threads", lambda: threads)
        facts = runtime.announce(*run_of_3000_steps)
        assert ("2 other threads are busy on 4 cores" in facts.get("load", "")) == is_said


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="no /proc")
def test_busy_threads_are_those_of_others():
    """Beside a process that computes there is one more, on a machine that may have others."""
    with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"],
                          stdout=subprocess.PIPE) as busy:
        busy.stdout.readline()
        try:
            assert runtime.busy_threads() >= 1
        finally:
            busy.kill()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (121, "2 min"),
        (7199, "120 min"),
        (7201, "2.0 h"),
        (172_000, "47.8 h"),
        (172_800, "2.0 days"),
    ],
)
def test_a_time_has_the_unit_that_reads_well(seconds, text):
    assert runtime.seconds_as_text(seconds) == text


@pytest.mark.parametrize("seconds, size", [(0.02, 256), (0.006, 512)])
def test_products_are_timed_up_to_the_first_that_takes_ten_milliseconds(
    monkeypatch, seconds, size
):
    """By a clock on which a product of 256 takes so many seconds, and one of 512 twice as many."""
    clock, shapes = [0.0], []

    def randn(*shape, real=torch.randn, **options):
        shapes.append(shape)
        return real(*shape, **options)

    def perf_counter():
        clock[0] += seconds * shapes[-1][0] / 256
        return clock[0]

    monkeypatch.setattr(runtime.torch, "randn", randn)
    monkeypatch.setattr(runtime.time, "perf_counter", perf_counter)
    rate = runtime.matmul_rate(CPU, "float32")
    assert shapes[-1] == (size, size)
    assert rate == pytest.approx(2 * size**3 / (seconds * size / 256))


def test_speeds_leave_out_validations_and_run_json_the_first_step_too(
    monkeypatch, tmp_path, capsys
):
    now = [1000.0]
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    meter = runtime.Meter(0, 10, runtime.Process(0, 0, 1, CPU))
    for step in range(1, 6):
        now[0] += 100 if step == 1 else 2  # the first step compiles
        row = dict(step=step, tokens=64 * step, lr=0.1, loss=2.0, grad_norm=1.0)
        meter.step(row, 3 * (step > 2), 2)
        if step in (3, 5):
            with meter.paused():
                now[0] += 50
    lines = capsys.readouterr().out.splitlines()
    second, fourth = [line for line in lines if line.startswith("step")]
    assert "2/10" in second
    assert "1 tokens/s" in second  # 128 tokens in 102 s
    assert "skipped" not in second
    assert "4/10" in fourth
    assert "32 tokens/s  12 s left  3 skipped" in fourth
    meter.save(str(tmp_path / "run.json"), {"device": "a device", "memory": "some"})
    [session] = checkpoints.read_run(tmp_path / "run.json")
    assert session["seconds"] == 208
    assert session["timed_seconds"] == 8
    assert session["timed_tokens"] == 4 * 64
    assert session["from_step"] == 0
    assert session["to_step"] == 5
    assert session["device"] == "a device"
    meter.close()


# ---- stopping and resuming -----------------------------------------------------------------------

def same_run(a, b):
    """Two runs have the same bytes in the log, and the same weights and optimizer states."""
    assert (a / "log.csv").read_bytes() == (b / "log.csv").read_bytes()
    for name in ("last.pt", "best.pt"):
        one, two = (checkpoints.load(folder / name) for folder in (a, b))
        assert one["step"] == two["step"]
        assert one.keys() == two.keys()
        same_tensors(one["model"], two["model"])
        assert one.get("best") == two.get("best")
        assert one.get("val_loss") == two.get("val_loss")
        optimizers = one.get("optimizers", []), two.get("optimizers", [])
        for x, y in zip(*optimizers, strict=True):
            for i in x["state"]:
                same_tensors(x["state"][i], y["state"][i])


def same_tensors(a, b):
    assert all(torch.equal(a[name], b[name]) for name in a)


@BOTH
def test_a_run_stopped_by_sigterm_finishes_its_step_and_resumes_exactly(
    train, tmp_path, stage, capsys
):
    how = dict(max_steps=9, eval_interval=4)
    assert len(train(stage, "whole", **how)) == 9
    schedule = stage.schedule

    def with_signal(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "schedule", with_signal)
        train(stage, "stopped", **how)
    assert "stopped after step 5, saved in" in capsys.readouterr().out
    assert last_state(tmp_path / "stopped")["step"] == 5
    assert len(read_log(tmp_path / "stopped")) == 5
    train(stage, "stopped", **how, resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")


def with_signals(*numbers):
    return f"""
import os, runtime, signal
rows = runtime.batch_rows
def interrupted(step, *rest):
    for number in {tuple(map(int, numbers))} if step == 3 else ():
        os.kill(os.getpid(), number)
    return rows(step, *rest)
runtime.batch_rows = interrupted
"""


@pytest.mark.parametrize(
    "stage, numbers, code, said",
    [
        (pretrain, [signal.SIGINT], 130, "stopping after this step (Ctrl-C again: at once)"),
        (sft, [signal.SIGTERM] * 2, 143, "stopping after this step"),
        (sft, [signal.SIGINT] * 2, 130, "stopped at once; what was saved last is whole"),
    ],
)
def test_the_exit_code_says_which_signal_stopped_a_run(
    train_script, tmp_path, stage, numbers, code, said
):
    done = train_script(stage, "a", code=with_signals(*numbers))
    lines = done.err.splitlines()
    assert done.rc == code, done.err
    assert lines.count(said) == 1, done.err
    assert "Traceback" not in done.err
    assert sum("stopping after" in line for line in lines) == 1
    assert ("Ctrl-C" in done.err) == (signal.SIGINT in numbers)
    at_once = numbers == [signal.SIGINT] * 2
    assert last_state(tmp_path / "a")["step"] == (3 if at_once else 4)


def test_ctrl_c_is_answered_by_one_of_several_processes(settings, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{with_signals(signal.SIGINT)}"
        f"runpy.run_path({str(ROOT / 'pretrain.py')!r}, run_name='__main__')"
    )
    arguments = flags(settings, pretrain, out_dir=tmp_path / "a")
    done = run(script, tmp_path, *arguments, torchrun=2)
    assert done.rc != 0
    assert done.err.count("stopping after this step") == 1
    assert last_state(tmp_path / "a")["step"] == 4


EARLY = """
import os, signal, checkpoints
def read_meta(*arguments):
    os.kill(os.getpid(), {})
checkpoints.read_meta = read_meta
"""


@pytest.mark.parametrize(
    "stage, number",
    [(pretrain, signal.SIGINT), (sft, signal.SIGTERM)],
    ids=["pretrain", "sft"],
)
def test_a_signal_before_the_first_step_ends_in_a_sentence(train_script, tmp_path, stage, number):
    done = train_script(stage, "a", code=EARLY.format(int(number)))
    assert done.rc == 128 + number
    assert done.err.strip() == "stopped before the first step"
    assert not (tmp_path / "a").exists()


@BOTH
def test_resume_alone_takes_the_constants_of_the_run(
    train, train_script, settings, tmp_path, stage
):
    train(stage, "whole")
    part = train_script(stage, "a", code=with_signals(signal.SIGTERM))
    assert part.rc == 143, part.err
    resume = f"{stage.__name__}.py", tmp_path, "--resume", f"--out_dir={tmp_path / 'a'}"
    other = run(*resume, "--batch_tokens=640", "--seed=8")
    assert other.rc == 1
    before = settings[stage]["batch_tokens"]
    assert f"batch_tokens (then {before}, now 640)" in other.err
    rest = run(*resume, "--log_interval=2")
    assert rest.rc == 0, rest.err
    assert "finished at step 6" in rest.out
    assert "changed: log_interval (then 1, now 2)\n" in rest.out
    assert "from step 4" in rest.out
    saved = torch.load(tmp_path / "a" / "last.pt")
    assert saved["constants"]["lr"] == 0.01
    assert saved["constants"]["log_interval"] == 2
    same_run(tmp_path / "whole", tmp_path / "a")


KILL = """
import os, signal, checkpoints
save, written = checkpoints.save, 0
def save_and_die(path, state):
    global written
    written += path.endswith("last.pt")
    if path.endswith("last.pt") and written == 3:
        if {when} == "while saving":
            checkpoints.config.os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
        save(path, state)
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, state)
checkpoints.save = save_and_die
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize(
    "stage, when",
    [(pretrain, "after saving"), (sft, "while saving")],
    ids=["pretrain", "sft"],
)
def test_a_killed_run_resumes_exactly(train, train_script, tmp_path, stage, when):
    how = dict(max_steps=8, eval_interval=4, save_interval=2)  # saves after 2, 4, 6, 8
    train(stage, "whole", **how)
    folder = tmp_path / "killed"
    killed = train_script(stage, "killed", code=KILL.format(when=repr(when)), **how)
    assert killed.rc == -signal.SIGKILL, killed.err
    assert last_state(folder)["step"] == (6 if when == "after saving" else 4)
    resumed = train_script(stage, "killed", "--resume", **how)
    assert resumed.rc == 0, resumed.err
    curve = folder / "curve.png"
    assert curve.stat().st_size > 1000 or "pip install matplotlib" in resumed.out
    same_run(tmp_path / "whole", folder)


def test_a_float16_run_resumes_with_its_scale(train, tmp_path, monkeypatch):
    set_initial_scale(monkeypatch, 2.0**30)
    how = dict(dtype="float16", max_steps=24, eval_interval=12)
    how.update(warmup=0.0, lr_min=1.0)  # no step depends on max_steps
    train(pretrain, "whole", **how)
    train(pretrain, "stopped", **{**how, "max_steps": 12})
    train(pretrain, "stopped", **how, resume=True)
    same_run(tmp_path / "whole", tmp_path / "stopped")
    one, two = (last_state(tmp_path / name) for name in ("whole", "stopped"))
    assert one["scaler"] == two["scaler"]
    assert one["skipped"] == two["skipped"] > 5


@BOTH
def test_a_worse_validation_does_not_replace_the_best_also_after_resuming(
    train, tmp_path, stage, monkeypatch
):
    validations = iter([5.0, 4.0, 4.5, 4.25, 3.0])
    monkeypatch.setattr(runtime, "evaluate", lambda *args: (next(validations), 1.0))
    train(stage, "a", max_steps=3, eval_interval=1)
    for max_steps, best, of_step in ((3, 4.0, 2), (4, 4.0, 2), (5, 3.0, 5)):
        train(stage, "a", max_steps=max_steps, eval_interval=1, resume=True)
        assert last_state(tmp_path / "a")["best"] == best
        assert checkpoints.load(tmp_path / "a" / "best.pt")["step"] == of_step


@BOTH
def test_a_prompt_longer_than_the_context_is_left_out_with_a_sentence(
    train, tmp_path, stage, capsys
):
    prompts = "从前|" + "我" * 500
    train(stage, "a", max_steps=1, sample_prompts=prompts, sample_tokens=3)
    assert "too long for the context" in capsys.readouterr().out
    assert (tmp_path / "a" / "best.pt").exists()
    assert (tmp_path / "a" / "last.pt").exists()


@BOTH
def test_what_only_watches_a_run_cannot_end_it(train, tmp_path, stage, monkeypatch, capsys):
    saved = []

    def fails(*arguments, **named):
        saved.append({path.name for path in (tmp_path / "a").glob("*.pt")})
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(stage, "generate", fails)
    monkeypatch.setattr(runtime.json, "dump", fails)
    with constants(stage):
        monkeypatch.setattr(runtime, "draw_curve", fails)
    assert len(train(stage, "a", max_steps=2, eval_interval=1, sample_prompts="从前")) == 2
    said = capsys.readouterr().out
    assert said.count("samples: not shown (CUDA out of memory)") == 2
    assert "run.json: not shown" in said
    assert all(names == {"best.pt", "last.pt"} for names in saved)
    assert len(saved) == 4


def test_training_goes_on_when_nobody_reads_its_output(settings, tmp_path):
    how = dict(out_dir=tmp_path / "a", sample_prompts="从前", sample_tokens=3)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *flags(settings, pretrain, **how)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=200) == 0
    assert len(read_log(tmp_path / "a")) == 6


@BOTH
def test_resuming_a_finished_run_changes_nothing(train, tmp_path, stage):
    train(stage, "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(stage, "b", resume=True)
    same_run(tmp_path / "a", tmp_path / "b")


@BOTH
def test_a_run_is_never_overwritten_unasked(train, tmp_path, stage):
    first = train(stage, "a", max_steps=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    said = refused(train, stage, "a", max_steps=2)
    assert "--resume" in said
    assert "--overwrite" in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert train(stage, "a", max_steps=2, overwrite=True) == first
    # where there is nothing to resume, the run starts
    assert len(train(stage, "new", max_steps=2, resume=True)) == 2


@BOTH
def test_resuming_without_muon_what_began_with_it_is_refused(train, stage):
    train(stage, "a", max_steps=1)
    assert "muon_lr" in refused(train, stage, "a", resume=True, muon_lr=0.0)


@BOTH
def test_resuming_takes_the_learning_rates_of_now(train, tmp_path, stage):
    train(stage, "a", max_steps=2)
    before = last_state(tmp_path / "a")["model"]
    train(stage, "a", max_steps=6, resume=True, lr=1e-12, muon_lr=1e-12)
    after = last_state(tmp_path / "a")
    assert after["step"] == 6
    for name, w in before.items():
        torch.testing.assert_close(after["model"][name], w, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    "how",
    [dict(eval_interval=1), dict(eval_interval=99, save_interval=1)],
    ids=["validated", "saved"],
)
@BOTH
def test_a_diverging_run_stops_with_a_sentence_and_leaves_no_poisoned_checkpoint(
    train, tmp_path, stage, how
):
    good = train(stage, "a", max_steps=2, **how)
    said = refused(train, stage, "a", max_steps=20, resume=True, lr=1e38, muon_lr=1e38, **how)
    assert "step" in said
    assert "last.pt" in said
    ids = torch.tensor([[1, 20, 30, 40]])
    for path in (tmp_path / "a").glob("*.pt"):
        saved = checkpoints.load(path)
        assert all(torch.isfinite(w).all() for w in saved["model"].values())
        with torch.no_grad():
            logits = model_of(saved)(ids)
        assert torch.isfinite(logits).all(), f"{path.name} of step {saved['step']}"
    on = train(stage, "a", max_steps=3, resume=True, **how)  # it goes on from there
    assert len(on) == 3
    assert on[:2] == good
    assert math.isfinite(on[2]["loss"])


# ---- what a user can get wrong -------------------------------------------------------------------

@pytest.fixture
def broken(train, settings, tmp_path):
    """broken(stage, harm, **changes): the sentence with which the stage refuses damaged data.

    harm(folder) damages a copy of the data.
    """
    def call(stage, harm=lambda folder: None, **changes):
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(settings[stage]["data_dir"], folder)
        harm(folder)
        said = refused(train, stage, "a", **{"data_dir": str(folder), **changes})
        assert not list((tmp_path / "a").glob("*.pt"))
        return said
    return call


def swap(a, b):
    def harm(folder):
        os.rename(folder / a, folder / "aside")
        os.rename(folder / b, folder / a)
        os.rename(folder / "aside", folder / b)
    return harm


def cut(name, n):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-n])


def remove(name):
    return lambda folder: os.remove(folder / name)


def replace_meta(text):
    return lambda folder: (folder / "meta.json").write_text(text)


def edit_meta(**changes):
    def harm(folder):
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        meta.update(changes)
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return harm


def write_id(name, id):
    def harm(folder):
        ids = np.fromfile(folder / name, dtype="<u2")
        ids[-2] = id
        ids.tofile(folder / name)
    return harm


@pytest.mark.parametrize(
    "harm, said",
    [
        (cut("train.bin", 1), "train.bin"),
        (cut("train.bin", 2), "train.bin"),
        (cut("val.bin", 4), "val.bin"),
        (swap("train.bin", "val.bin"), "bin"),
        (remove("val.bin"), "missing"),
        (remove("meta.json"), "prepare_"),
        (cut("meta.json", 5), "whole JSON"),
        (write_id("train.bin", 400), "holds 400"),
        (edit_meta(format=2), "format 2"),
        (replace_meta("[]"), "meta.json"),
        (replace_meta('{"format": 1}'), "meta.json"),
    ],
)
@BOTH
def test_damaged_bins_are_refused(broken, stage, harm, said):
    assert said in broken(stage, harm)


@pytest.mark.parametrize("name", ["train.mask", "train.idx", "val.idx"])
def test_a_damaged_mask_or_index_is_refused(broken, name):
    assert name in broken(sft, cut(name, 1))


@BOTH
def test_bins_of_another_tokenizer_are_refused(broken, stage, other_tok):
    said = broken(stage, tokenizer=other_tok.name)
    assert "made with" in said
    assert other_tok.name in said


def test_a_checkpoint_of_another_tokenizer_is_refused(broken, other_tok, tmp_path):
    path = tmp_path / "other.pt"
    save_model(path, Model(ModelConfig(other_tok.vocab_size, **SHAPE)), other_tok, "pretrain")
    assert "was trained with" in broken(sft, checkpoint=str(path))


@BOTH
def test_resuming_the_run_of_another_tokenizer_shape_or_data_is_refused(
    train, tmp_path, stage, settings
):
    train(stage, "a", max_steps=1)
    path = tmp_path / "a" / "last.pt"
    saved = torch.load(path)
    others = ("tokenizer", "0" * 64), ("n_layers", 7), ("rows", 1), ("data", "0123abcd")
    for name, other in others:
        torch.save({**saved, "identity": {**saved["identity"], name: other}}, path)
        assert name in refused(train, stage, "a", resume=True)
    torch.save(saved, path)
    assert "seed" in refused(train, stage, "a", resume=True, seed=8)
    more = 2 * settings[stage]["batch_tokens"]
    assert "batch_tokens" in refused(train, stage, "a", resume=True, batch_tokens=more)


def test_resuming_the_run_of_another_stage_is_refused(train, tmp_path):
    train(pretrain, "a", max_steps=2, max_seq_len=LONG, batch_tokens=5 * LONG)
    before = (tmp_path / "a" / "last.pt").read_bytes()
    checkpoint = str(tmp_path / "a" / "best.pt")
    assert "pretrain" in refused(train, sft, "a", resume=True, checkpoint=checkpoint)
    assert (tmp_path / "a" / "last.pt").read_bytes() == before


@BOTH
def test_best_pt_in_the_place_of_last_pt_is_refused(train, tmp_path, stage):
    train(stage, "a", max_steps=1)
    shutil.copy(tmp_path / "a" / "best.pt", tmp_path / "a" / "last.pt")
    assert "last.pt" in refused(train, stage, "a", resume=True)


@BOTH
def test_without_a_validation_text_it_says_so(train, tok, tmp_path, stage):
    rng = random.Random(1)
    if stage is pretrain:
        write_pretrain(tmp_path / "data", tok, [story(rng, 5)] * 9, [])
    else:
        write_sft(tmp_path / "data", tok, [dialogue(rng, 1)] * 9, [])
    assert "val" in refused(train, stage, "a", data_dir=str(tmp_path / "data"))


@BOTH
def test_without_a_training_text_it_says_so(train, tok, tmp_path, stage):
    rng = random.Random(1)
    if stage is pretrain:
        write_pretrain(tmp_path / "data", tok, [], [story(rng, 5)])
    else:
        write_sft(tmp_path / "data", tok, [], [dialogue(rng, 1)])
    assert "train" in refused(train, stage, "a", data_dir=str(tmp_path / "data"))


def test_examples_longer_than_the_context_are_refused(broken, tok, tmp_path):
    path = tmp_path / "short.pt"
    save_model(path, Model(ModelConfig(tok.vocab_size, **SHAPE)), tok, "pretrain")
    assert "--max_seq_len=32" in broken(sft, checkpoint=str(path))


class Payload:
    """What a malicious checkpoint holds: unpickled, it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def hostile_checkpoints(model, tok, folder):
    """(the bytes of a sound checkpoint, {what is wrong: the bytes of a bad one})."""
    state = {
        "format": 1,
        "stage": "pretrain",
        "model": model.state_dict(),
        "shape": vars(model.config),
        "tokenizer": tok.name,
        "tokenizer_sha256": tok.sha256,
    }

    def saved(state):
        torch.save(state, folder / "saved.pt")
        return (folder / "saved.pt").read_bytes()

    whole = saved(state)
    rng = random.Random(0)
    cases = {}
    for n in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        cases[f"cut at {n}"] = whole[:n]
    for i in range(150):
        cases[f"noise {i}"] = rng.randbytes(rng.randrange(1, 2000))
    for i in range(60):  # a bad sector in the zip directory or the pickle
        at = rng.choice([rng.randrange(3000), len(whole) - rng.randrange(1, 3000)])
        noise = rng.randbytes(200)
        cases[f"200 bytes of noise at {at}"] = whole[:at] + noise + whole[at + 200 :]
    payload = Payload(str(folder / "ran"))
    cases["text"] = b"hello"
    cases["a pickle"] = pickle.dumps([1, 2])
    cases["no checkpoint"] = saved({"a": 1})
    cases["a list"] = saved([1])
    cases["newer"] = saved({**state, "format": 2})
    cases["only a number"] = saved({"format": 1})
    cases["payload"] = saved({**state, "x": payload})
    cases["bare payload"] = pickle.dumps(payload)
    return whole, cases


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_broken_or_malicious_checkpoint_is_refused_and_nothing_in_it_runs(tok, tmp_path):
    model = Model(ModelConfig(tok.vocab_size, **SHAPE))
    path = tmp_path / "best.pt"
    whole, cases = hostile_checkpoints(model, tok, tmp_path)
    open_payload = pickle.loads(cases["bare payload"])  # ordinary unpickling does run it
    open_payload.close()
    os.remove(tmp_path / "ran")
    wrong = {}
    for name, data in cases.items():
        path.write_bytes(data)
        try:
            state = checkpoints.load(str(path))
            wrong[name] = f"was taken: {list(state)}"
        except SystemExit as stopped:
            assert str(path) in stopped.code
            assert "\n" not in stopped.code
        except Exception as error:
            wrong[name] = repr(error)[:80]
    assert not (tmp_path / "ran").exists()
    assert wrong == {}
    path.write_bytes(whole)
    assert checkpoints.load(str(path))["shape"] == vars(model.config)


def test_compiled_blocks_have_the_losses_of_plain_ones(train, monkeypatch):
    """5 rows in rounds of 5.

    Validation, which has another number of rows, and generation run uncompiled.
    """
    compiled = []

    def compile(self, real=torch.nn.Module.compile):
        compiled.append(type(self).__name__)
        real(self)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    how = dict(max_steps=3, micro_batch=5, sample_prompts="从前", sample_tokens=5)
    plain = train(pretrain, "off", compile="off", **how)
    fast = train(pretrain, "on", compile="on", **how)
    assert compiled == ["Block"] * SHAPE["n_layers"]
    assert len(losses(fast)) == 4
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-5)


@pytest.mark.parametrize(
    "compiler, tokens, expected", [("g++", 10**12, 2), ("g++", 1000, 0), ("", 10**12, 0)]
)
def test_a_cpu_compiles_long_runs_where_there_is_a_compiler(
    monkeypatch, compiler, tokens, expected
):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name == compiler)
    model = Model(ModelConfig(400, **SHAPE))
    runtime.compiled(model, "auto", runtime.Process(0, 0, 1, CPU), tokens)
    assert len(compiled) == expected


@pytest.mark.parametrize(
    "compiler, triton, generation, expected",
    [
        ("clang++", True, 7, True),
        ("", True, 7, False),
        ("clang++", False, 7, False),
        ("clang++", True, 6, False),
    ],
)
def test_a_card_compiles_where_triton_can(
    monkeypatch, capsys, compiler, triton, generation, expected
):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name == compiler)
    util = SimpleNamespace(find_spec=lambda name: triton or None)
    monkeypatch.setattr(runtime, "importlib", SimpleNamespace(util=util))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    process = runtime.Process(0, 0, 1, torch.device("cuda", 0))
    runtime.compiled(Model(ModelConfig(400, **SHAPE)), "auto", process, 1000)
    assert bool(compiled) == expected
    assert ("nothing is compiled" in capsys.readouterr().out) != expected


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(n_heads=5), "n_heads"),
        (dict(dim=33), "n_heads"),
        (dict(batch_tokens=31), "batch_tokens"),
        (dict(n_heads=4, n_kv_heads=3), "n_kv_heads"),
        (dict(dim=6), "even"),
        (dict(rope_theta=-1.0), "rope_theta"),
    ],
)
def test_a_network_that_cannot_work_is_refused(broken, changes, said):
    assert said in broken(pretrain, **changes)


BAD = [
    "--dtype=fp8", "--device=tpu", "--compile=maybe", "--micro_batch=-1", "--batch_tokens=0",
    "--seed=-1", "--seed=12345678901234567890123", "--batch_tokens=-64", "--log_interval=0",
    "--eval_interval=0", "--eval_interval=-3", "--save_interval=-1", "--max_steps=-5",
    "--epochs=0", "--epochs=-1", "--lr=-1", "--grad_clip=-1", "--warmup=-1",
]
BAD_SHAPES = [
    "--dim=0", "--dim=-32", "--n_layers=0", "--n_heads=0", "--hidden_dim=-1", "--max_seq_len=0",
    "--max_seq_len=-32",
]


@pytest.mark.parametrize(
    "stage, argument",
    [(pretrain, a) for a in BAD + BAD_SHAPES] + [(sft, a) for a in BAD],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_constant_that_cannot_work_is_refused(train, stage, argument):
    name = argument[2:].partition("=")[0]

    def call():
        changed = config.override({**vars(stage), "__name__": "__main__"}, [argument])
        values = {name: changed[name]}
        if name == "epochs":
            values["max_steps"] = 0
        train(stage, "a", **values)

    assert name in refused(call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is there")
def test_a_device_that_is_not_there_is_refused(broken):
    assert "not usable here, but cpu is" in broken(pretrain, device="cuda")


@BOTH
def test_more_processes_than_rows_are_refused_before_any_waits_for_another(
    broken, stage, monkeypatch
):
    waits = lambda *a, **k: pytest.fail("it waits for the others")
    monkeypatch.setattr(runtime, "WORLD_SIZE", 6)
    monkeypatch.setattr(torch.distributed, "init_process_group", waits)
    said = broken(stage)
    assert "5 rows" in said
    assert "6 processes" in said


@pytest.mark.parametrize(
    "argument, said", [("--n_heads=5", "n_heads"), ("--n_head=8", "perhaps --n_heads=")]
)
def test_an_error_ends_the_script_with_a_sentence_and_not_a_traceback(
    train_script, tmp_path, argument, said
):
    done = train_script(pretrain, "a", argument)
    assert done.rc == 1
    assert said in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "a").exists()
