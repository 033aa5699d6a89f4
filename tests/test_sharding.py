"""--shard, --offload, --recompute: the same losses and checkpoints as without, across processes."""
import random
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed.fsdp as fsdp
from conftest import run, write_pairs
from test_dpo import pair
from test_training import constants, read_log, save_model

import checkpoints
import dpo
import pretrain
import runtime
import sft
import sharding
from model import Model, ModelConfig
from optim import make_optimizers

SHAPE = dict(dim=32, n_layers=2, n_heads=2, max_seq_len=96)
is_new = pytest.mark.skipif(torch.__version__ < sharding.OLDEST, reason="needs a newer PyTorch")


@pytest.fixture(scope="module")
def settings(tok, pretrain_dir, sft_dir, tmp_path_factory):
    """{stage: constants of a short run}"""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    start = str(folder / "best.pt")
    save_model(start, Model(ModelConfig(tok.vocab_size, **SHAPE)), tok, "pretrain")
    rng = random.Random(5)
    train, val = ([pair(rng) for _ in range(n)] for n in (14, 5))
    pairs = str(write_pairs(folder / "pairs", tok, train, val))
    every = dict(
        tokenizer=tok.name,
        device="cpu",
        dtype="float32",
        max_steps=6,
        eval_interval=3,
        lr=3e-3,
        muon_lr=3e-3,
        warmup=0.0,
        lr_min=1.0,
        sample_prompts="",
    )
    rows = dict(every, batch_tokens=4 * 96, max_seq_len=96, compile="off")
    return {
        "pretrain": {**rows, **SHAPE, "data_dir": str(pretrain_dir)},
        "sft": dict(rows, data_dir=str(sft_dir), checkpoint=start),
        "dpo": dict(every, data_dir=pairs, checkpoint=start, batch_pairs=4, micro_batch=1),
    }


@pytest.fixture
def train(settings, tmp_path):
    def train(stage, name, processes=0, **values):
        values = {**settings[stage.__name__], "out_dir": str(tmp_path / name), **values}
        if processes:
            arguments = (f"--{name}={value}" for name, value in values.items())
            done = run(f"{stage.__name__}.py", tmp_path, *arguments, torchrun=processes)
            assert done.rc == 0, done.err
        else:
            with constants(stage, **values):
                stage.main()
        return tmp_path / name
    return train


def same(a, b, rel=1e-3):
    """The logs of two runs, and their last.pt, but for rounding."""
    one, two = (read_log(folder) for folder in (a, b))
    assert len(one) == len(two) == 6
    for x, y in zip(one, two):
        for name in ("loss", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=rel)
    if rel > 1e-3:
        return
    one, two = (
        checkpoints.load(folder / "last.pt", to_resume=True)
        for folder in (a, b)
    )
    assert one["model"].keys() == two["model"].keys()
    assert one["step"] == two["step"] == 6
    for weights in one["model"], two["model"]:  # tied ones are written once
        embedding = weights["embedding.weight"]
        is_tied = embedding.data_ptr() == weights["head.weight"].data_ptr()
        assert is_tied == one["shape"]["tie_embeddings"]
    for name, w in one["model"].items():
        assert type(w) is torch.Tensor
        torch.testing.assert_close(w, two["model"][name], rtol=1e-2, atol=1e-4)
    for x, y in zip(one["optimizers"], two["optimizers"], strict=True):
        assert x["state"]
        assert x["state"].keys() == y["state"].keys()
        for i, moments in x["state"].items():
            for name, moment in moments.items():
                expected = y["state"][i][name]
                torch.testing.assert_close(moment, expected, rtol=5e-2, atol=1e-4)


def test_an_older_pytorch_is_refused_with_its_version(monkeypatch):
    monkeypatch.setattr(sharding, "OLDEST", "99")
    two = runtime.Process(0, 0, 2, torch.device("cpu"))
    with pytest.raises(SystemExit, match="needs PyTorch 99"):
        runtime.check_sharding("full", False, "off", "float32", 4, two)


@is_new
@pytest.mark.parametrize(
    "stage, shard, more",
    [
        (pretrain, "full", dict(n_kv_heads=1, tie_embeddings=False)),
        (pretrain, "optimizer", dict(muon_lr=0.0)),
        (pretrain, "full", dict(dtype="bfloat16")),
        (sft, "full", dict(lora_rank=3)),
        (dpo, "optimizer", dict(offload=True)),
    ],
    ids=["pretrain", "optimizer, AdamW", "bfloat16", "LoRA", "dpo, offload"],
)
def test_processes_that_share_a_model_learn_what_one_process_learns(train, stage, shard, more):
    alone = {name: value for name, value in more.items() if name != "offload"}
    one = train(stage, "one", **alone)
    two = train(stage, "two", 2, shard=shard, **more)
    same(one, two, 2e-2 if "dtype" in more else 1e-3)


@is_new
@pytest.mark.parametrize(
    "stage, shard, more",
    [
        (pretrain, "full", dict(n_kv_heads=1, tie_embeddings=False)),
        (dpo, "optimizer", dict(lora_rank=3)),
    ],
    ids=["pretrain", "LoRA"],
)
def test_one_process_offloads_and_resumes_with_and_without(train, monkeypatch, stage, shard, more):
    policies = []

    def fully_shard(module, real=fsdp.fully_shard, **how):
        policies.append(how["offload_policy"])
        return real(module, **how)

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    offload = dict(shard=shard, offload=True)
    whole = train(stage, "whole", **more)
    assert not policies
    train(stage, "there", max_steps=3, **offload, **more)
    same(whole, train(stage, "there", resume=True, **more))
    train(stage, "back", max_steps=3, **more)
    same(whole, train(stage, "back", resume=True, **offload, **more))
    assert len(policies) == 2 * 3
    assert all(isinstance(policy, fsdp.CPUOffloadPolicy) for policy in policies)


@is_new
def test_a_run_resumes_with_shards_or_without(train):
    whole = train(pretrain, "whole")
    train(pretrain, "parts", 2, shard="full", max_steps=3)
    same(whole, train(pretrain, "parts", resume=True))
    train(pretrain, "back", max_steps=3)
    same(whole, train(pretrain, "back", 2, resume=True, shard="full"))


def test_the_estimate_of_memory_divides_what_is_shared(tok):
    model = Model(ModelConfig(tok.vocab_size, **{**SHAPE, "n_layers": 8}))
    needed = partial(model.bytes_to_train, 1, 8, torch.float32)
    weights = model.n_params()
    alone = needed()
    model.shares, model.keeps_weights = 4, True
    kept = needed()
    model.keeps_weights = False
    full = needed()
    # Muon, for the matrices of the blocks, has one moment for AdamW's two
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    held = 16 * weights - 4 * matrices
    blocks = sum(p.numel() for p in model.blocks.parameters())
    gradients = (4 + 4) * blocks * 2 / 8  # of two blocks, also as sent
    # kept: all weights are gathered; full: those of two blocks
    assert alone - kept == held * 3 / 4 - 4 * weights - gradients
    assert kept - full == 4 * blocks * 6 / 8
    assert needed(shares=1) == alone
    model.offloads = True
    assert full - needed() == model.bytes_kept() == held / 4
    make_optimizers(model, 1e-3, 0, 0.1)
    assert model.bytes_kept() == 16 * weights / 4


def in_gib(n_bytes):
    return f"{n_bytes / 2**30:.1f}"


def test_the_memory_of_other_numbers_of_processes_is_announced(tok):
    model = Model(ModelConfig(tok.vocab_size, 512, 8, 4))
    task = 1, 8, torch.float32
    assert "processes" not in runtime.memory_as_text(model, *task)
    model.shares, model.keeps_weights = 2, False
    gib = [in_gib(model.bytes_to_train(*task, n)) for n in (1, 2, 8)]
    assert len(set(gib)) == 3
    sentence = runtime.memory_as_text(model, *task)
    assert f"({', '.join(gib)} GiB with 1, 2, 8" in sentence
    model.offloads = True
    gib = [in_gib(model.bytes_kept(n)) for n in (1, 2, 8)]
    sentence = runtime.memory_as_text(model, *task)
    assert f"{gib[1]} GiB in the host's memory" in sentence
    assert f"moments ({', '.join(gib)} GiB with" in sentence


def test_validation_keeps_nothing_for_a_backward_pass(tok):
    model = Model(ModelConfig(tok.vocab_size, **SHAPE))
    x = torch.arange(5, 45)[None]
    token_bytes = np.ones(tok.vocab_size)
    alone = runtime.Process(0, 0, 1, x.device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        runtime.evaluate(model, [(x, x, None)], token_bytes, nullcontext(), alone)
    assert not kept


def test_recomputing_changes_no_number_and_keeps_less(tok):
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **{**SHAPE, "n_layers": 6}))
    x = torch.randint(0, tok.vocab_size, (2, 96))

    def step(recompute):
        """Loss, gradients, bytes kept for the backward pass, bytes of the estimate."""
        model.recompute = recompute
        kept = []
        hooks = (lambda t: kept.append(t.nbytes) or t), (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(x, x)
        model.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        return loss.item(), gradients, sum(kept), model.bytes_to_train(2, 96, torch.float32)

    loss, gradients, kept, estimate = step(recompute=False)
    same_loss, same_gradients, less, smaller = step(recompute=True)
    assert loss == same_loss
    assert all(map(torch.equal, gradients, same_gradients))
    assert less < kept / 2
    assert smaller < estimate


@is_new
@pytest.mark.parametrize(
    "shard, n, batch, more, says",
    [
        ("some", 2, 4, {}, "choose optimizer or full"),
        ("full", 1, 4, {}, "torchrun"),
        ("full", 2, 3, {}, "2 processes cannot share a batch of 3"),
        ("full", 2, 4, dict(compile="on"), "--compile=on"),
        ("full", 2, 4, dict(dtype="float16"), "float16"),
    ],
)
def test_what_cannot_be_sharded_is_refused(shard, n, batch, more, says):
    process = runtime.Process(0, 0, n, torch.device("cpu"))
    how = dict(offload=False, compile="auto", dtype="float32", batch=batch, process=process)
    with pytest.raises(SystemExit, match=says):
        runtime.check_sharding(shard, **{**how, **more})


@is_new
def test_cards_without_nccl_cannot_share_a_model(monkeypatch):
    monkeypatch.setattr(runtime.dist, "is_nccl_available", lambda: False)
    card = runtime.Process(0, 0, 1, torch.device("cuda", 0))
    with pytest.raises(SystemExit, match="needs NCCL"):
        runtime.check_sharding("full", True, "off", "float32", 4, card)


def test_what_cannot_be_offloaded_is_refused():
    alone, mac = (runtime.Process(0, 0, 1, torch.device(name)) for name in ("cpu", "mps"))
    for shard, process, says in ("", alone, "--shard=full"), ("full", mac, "MPS"):
        with pytest.raises(SystemExit, match=f"^--offload.*{says}"):
            runtime.check_sharding(shard, True, "off", "float32", 4, process)
