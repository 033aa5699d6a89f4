"""--shard, --offload, --recompute: the same losses and checkpoints as without, across processes."""
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed.fsdp as fsdp
from conftest import run, write_pairs
from test_dpo import pair
from test_training import constants, save_model

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
    folder, rng = tmp_path_factory.mktemp("start"), random.Random(5)
    torch.manual_seed(0)
    save_model(folder / "best.pt", Model(ModelConfig(tok.vocab_size, **SHAPE)), tok, "pretrain")
    train, val = ([pair(rng) for _ in range(n)] for n in (14, 5))
    pairs = write_pairs(folder / "pairs", tok, train, val)
    every = dict(tokenizer=tok.name, device="cpu", dtype="float32", max_steps=6, eval_interval=3,
                 lr=3e-3, muon_lr=3e-3, warmup=0.0, lr_min=1.0, sample_prompts="")
    rows = dict(every, batch_tokens=4 * 96, max_seq_len=96, compile="off")
    return {"pretrain": dict(rows, **{**SHAPE, "data_dir": str(pretrain_dir)}),
            "sft": dict(rows, data_dir=str(sft_dir), checkpoint=str(folder / "best.pt")),
            "dpo": dict(every, data_dir=str(pairs), checkpoint=str(folder / "best.pt"),
                        batch_pairs=4, micro_batch=1)}


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
    one, two = (checkpoints.read_log(folder / "log.csv") for folder in (a, b))
    assert len(one) == len(two) == 6
    for x, y in zip(one, two):
        for name in ("loss", "grad_norm"):
            assert float(x[name]) == pytest.approx(float(y[name]), rel=rel)
    if rel > 1e-3:
        return
    one, two = (checkpoints.load(folder / "last.pt", to_resume=True) for folder in (a, b))
    assert one["model"].keys() == two["model"].keys() and one["step"] == two["step"] == 6
    for weights in one["model"], two["model"]:                   # tied ones are written once
        is_one = weights["embedding.weight"].data_ptr() == weights["head.weight"].data_ptr()
        assert is_one == one["shape"]["tie_embeddings"]
    for name, w in one["model"].items():
        assert type(w) is torch.Tensor
        torch.testing.assert_close(w, two["model"][name], rtol=1e-2, atol=1e-4)
    for x, y in zip(one["optimizers"], two["optimizers"], strict=True):
        assert x["state"].keys() == y["state"].keys() and x["state"]
        for i, moments in x["state"].items():
            for name, moment in moments.items():
                torch.testing.assert_close(moment, y["state"][i][name], rtol=5e-2, atol=1e-4)


def test_an_older_pytorch_is_refused_with_its_version(monkeypatch):
    monkeypatch.setattr(sharding, "OLDEST", "99")
    two = runtime.Process(0, 0, 2, torch.device("cpu"))
    with pytest.raises(SystemExit, match="needs PyTorch 99"):
        runtime.check_sharding("full", False, "off", "float32", 4, two)


@is_new
@pytest.mark.parametrize("stage, shard, more", [
    (pretrain, "full", dict(n_kv_heads=1, tie_embeddings=False)),
    (pretrain, "optimizer", dict(muon_lr=0.0)), (pretrain, "full", dict(dtype="bfloat16")),
    (sft, "full", dict(lora_rank=3)), (dpo, "optimizer", dict(offload=True))],
    ids=["pretrain", "optimizer, AdamW", "bfloat16", "LoRA", "dpo, offload"])
def test_processes_that_share_a_model_learn_what_one_process_learns(train, stage, shard, more):
    alone = {name: value for name, value in more.items() if name != "offload"}
    one, two = train(stage, "one", **alone), train(stage, "two", 2, shard=shard, **more)
    same(one, two, 2e-2 if "dtype" in more else 1e-3)


@is_new
@pytest.mark.parametrize("stage, shard, more", [
    (pretrain, "full", dict(n_kv_heads=1, tie_embeddings=False)),
    (dpo, "optimizer", dict(lora_rank=3))], ids=["pretrain", "LoRA"])
def test_one_process_offloads_and_resumes_with_and_without(train, monkeypatch, stage, shard, more):
    policies, fully_shard = [], fsdp.fully_shard
    monkeypatch.setattr(fsdp, "fully_shard", lambda module, **how: policies.append(
        how["offload_policy"]) or fully_shard(module, **how))
    whole, offload = train(stage, "whole", **more), dict(shard=shard, offload=True)
    assert not policies
    train(stage, "there", max_steps=3, **offload, **more)
    same(whole, train(stage, "there", resume=True, **more))
    train(stage, "back", max_steps=3, **more)
    same(whole, train(stage, "back", resume=True, **offload, **more))
    assert len(policies) == 2 * 3 and all(isinstance(p, fsdp.CPUOffloadPolicy) for p in policies)


@is_new
def test_a_run_resumes_with_shards_or_without(train):
    whole = train(pretrain, "whole")
    train(pretrain, "parts", 2, shard="full", max_steps=3)
    same(whole, train(pretrain, "parts", resume=True))
    train(pretrain, "back", max_steps=3)
    same(whole, train(pretrain, "back", 2, resume=True, shard="full"))


def test_the_estimate_of_memory_divides_what_is_shared(tok):
    model = Model(ModelConfig(tok.vocab_size, **{**SHAPE, "n_layers": 8}))
    weights, alone = model.n_params(), model.bytes_to_train(1, 8, torch.float32)
    model.shares, model.keeps_weights = 4, True
    kept = model.bytes_to_train(1, 8, torch.float32)
    model.keeps_weights = False
    full = model.bytes_to_train(1, 8, torch.float32)
    # Muon, for the matrices of the blocks, has one moment for AdamW's two
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    held = 16 * weights - 4 * matrices
    blocks = sum(p.numel() for p in model.blocks.parameters())
    gradients = (4 + 4) * blocks * 2 / 8                         # of two blocks, also as sent
    assert alone - kept == held * 3 / 4 - 4 * weights - gradients      # all weights are gathered
    assert kept - full == 4 * blocks * 6 / 8                               # or those of two blocks
    assert model.bytes_to_train(1, 8, torch.float32, shares=1) == alone
    model.offloads = True
    assert full - model.bytes_to_train(1, 8, torch.float32) == model.bytes_kept() == held / 4
    make_optimizers(model, 1e-3, 0, 0.1)
    assert model.bytes_kept() == 16 * weights / 4


def test_the_memory_of_other_numbers_of_processes_is_announced(tok):
    model, told = Model(ModelConfig(tok.vocab_size, 512, 8, 4)), (1, 8, torch.float32)
    assert "processes" not in runtime.memory_as_text(model, *told)
    model.shares, model.keeps_weights = 2, False
    gib = [f"{model.bytes_to_train(*told, n) / 2**30:.1f}" for n in (1, 2, 8)]
    assert len(set(gib)) == 3
    assert f"({', '.join(gib)} GiB with 1, 2, 8" in runtime.memory_as_text(model, *told)
    model.offloads = True
    gib = [f"{model.bytes_kept(n) / 2**30:.1f}" for n in (1, 2, 8)]
    sentence = runtime.memory_as_text(model, *told)
    assert f"{gib[1]} GiB in the host's memory" in sentence
    assert f"moments ({', '.join(gib)} GiB with" in sentence


def test_validation_keeps_nothing_for_a_backward_pass(tok):
    model, x = Model(ModelConfig(tok.vocab_size, **SHAPE)), torch.arange(5, 45)[None]
    kept, token_bytes = [], np.ones(tok.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
        alone = runtime.Process(0, 0, 1, x.device)
        runtime.evaluate(model, [(x, x, None)], token_bytes, nullcontext(), alone)
    assert not kept


def test_recomputing_changes_no_number_and_keeps_less(tok):
    torch.manual_seed(0)
    model = Model(ModelConfig(tok.vocab_size, **{**SHAPE, "n_layers": 6}))
    x = torch.randint(0, tok.vocab_size, (2, 96))
    found = []
    for model.recompute in (False, True):
        kept = []
        hooks = (lambda t: kept.append(t.nbytes) or t), (lambda t: t)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = model(x, x)
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in model.parameters()], sum(kept),
                      model.bytes_to_train(2, 96, torch.float32)))
    (loss, grads, kept, estimate), (same_loss, same_grads, less, smaller) = found
    assert loss == same_loss and all(map(torch.equal, grads, same_grads))
    assert less < kept / 2 and smaller < estimate


@is_new
@pytest.mark.parametrize("shard, n, batch, more, says", [
    ("some", 2, 4, {}, "choose optimizer or full"), ("full", 1, 4, {}, "torchrun"),
    ("full", 2, 3, {}, "2 processes cannot share a batch of 3"),
    ("full", 2, 4, dict(compile="on"), "--compile=on"),
    ("full", 2, 4, dict(dtype="float16"), "float16")])
def test_what_cannot_be_sharded_is_refused(shard, n, batch, more, says):
    process = runtime.Process(0, 0, n, torch.device("cpu"))
    with pytest.raises(SystemExit, match=says):
        usual = dict(offload=False, compile="auto", dtype="float32")
        runtime.check_sharding(shard, **{**usual, **more}, batch=batch, process=process)


def test_what_cannot_be_offloaded_is_refused():
    alone, mac = (runtime.Process(0, 0, 1, torch.device(name)) for name in ("cpu", "mps"))
    for shard, process, says in ("", alone, "--shard=full"), ("full", mac, "MPS"):
        with pytest.raises(SystemExit, match=f"^--offload.*{says}"):
            runtime.check_sharding(shard, True, "off", "float32", 4, process)
