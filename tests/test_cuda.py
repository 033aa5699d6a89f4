"""What needs a card: run by `make test` for everyone who has one, skipped elsewhere."""
import csv
import importlib.util

import pytest
import torch

import conftest
import runtime
from model import IGNORE, VARLEN, Model, ModelConfig, generate
from optim import make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALF = [torch.bfloat16, torch.float16]
SMALL = dict(dim=128, n_layers=2, n_heads=2, max_seq_len=128, qk_norm=True)


def network(vocab_size=1000, **options):
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size, **{**SMALL, **options}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.05)
    return model


def batch(B=4, T=128, vocab_size=1000):
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randint(vocab_size, (B, T), generator=random) for _ in range(2))
    y[torch.rand(B, T, generator=random) < 0.3] = IGNORE
    cuts = torch.randint(1, B * T, (10,), generator=random)
    return x, y, torch.unique(torch.cat((torch.arange(0, B * T + 1, T), cuts))).int()


def loss_and_gradients(model, x, y, starts, dtype):
    """The loss, the gradients on the CPU in float32, whether attention was packed."""
    kind = model.norm.weight.device.type
    model.zero_grad()
    with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
        packed = model.has_packed_attention(dtype)
        loss = model(x, y, starts)
    (loss / (y != IGNORE).sum()).backward()
    return loss.item(), torch.cat([p.grad.float().cpu().flatten() for p in model.parameters()]), packed


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_kv_heads", [0, 1])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_loss_and_gradients_of_packed_documents_are_those_of_the_cpu(dtype, n_kv_heads, compiled):
    """On cards from Ampere on by FlashAttention in half precision, else by the dense mask."""
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no bfloat16 on this card")
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")
    expected, gradients, _ = loss_and_gradients(network(n_kv_heads=n_kv_heads), *batch(), torch.float32)
    model = network(n_kv_heads=n_kv_heads).cuda()
    if compiled:
        model.compile()
    loss, ours, packed = loss_and_gradients(model, *(t.cuda() for t in batch()), dtype)
    if dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 8 and torch.version.hip is None:
        assert packed == ("window_size" in VARLEN)
    assert loss == pytest.approx(expected, rel=1e-3)   # without the mask of documents the gradients differ by 0.86
    assert (ours - gradients).norm() < (0.1 if dtype != torch.float32 else 1e-3) * gradients.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_resumes_to_the_same_losses(tok, pretrain_dir, tmp_path, dtype):
    if dtype == "bfloat16" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no bfloat16 on this card")
    settings = [f"--tokenizer={tok.name}", f"--data_dir={pretrain_dir}", f"--dtype={dtype}", "--device=cuda", "--dim=64",
                "--n_layers=2", "--n_heads=2", "--max_seq_len=64", "--batch_tokens=512", "--eval_interval=4",
                "--max_steps=8", "--lr_min=1.0", "--warmup=0.0", "--sample_prompts=从前"]
    for arguments in (["--out_dir=whole"], ["--out_dir=halves", "--max_steps=4"], ["--out_dir=halves", "--resume"]):
        done = conftest.run("pretrain.py", tmp_path, *settings, *arguments, timeout=400)
        assert done.rc == 0, done.err[-2000:]
    logs = [list(csv.DictReader(open(tmp_path / name / "log.csv", encoding="utf-8"))) for name in ("whole", "halves")]
    assert len(logs[0]) == len(logs[1]) == 8
    for one, two in zip(*logs):                # atomics in the backward of the embedding round in any order
        assert float(one["loss"]) == pytest.approx(float(two["loss"]), rel=2e-3)
    assert float(logs[0][-1]["loss"]) < float(logs[0][0]["loss"])


@pytest.mark.parametrize("dim, n_layers, T, rows", [(512, 8, 512, 16), (768, 6, 1024, 8)])
def test_the_estimate_of_memory_is_right_within_15_percent(dim, n_layers, T, rows):
    torch._dynamo.reset()
    model = Model(ModelConfig(16_384, dim, n_layers, dim // 128, max_seq_len=T, qk_norm=True)).cuda()
    model.compile()
    name, autocast, _ = runtime.precision(torch.device("cuda", 0), "auto")
    optimizers = make_optimizers(model, 1e-3, 1e-3, 0.1, name)
    x, y, starts = (t.cuda() for t in batch(rows, T, 16_384))
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):                     # gradients of a first round are there in the second
            with autocast:
                loss = model(x, y, starts)
            (loss / x.numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    expected = model.bytes_to_train(rows, T, getattr(torch, name))
    assert torch.cuda.max_memory_allocated() == pytest.approx(expected, rel=0.15)


def test_generation_is_that_of_the_cpu():
    torch.set_float32_matmul_precision("highest")
    prompts = [[5, 6, 7], [8], [9] * 20]
    answers = [list(generate(network().to(where), prompts, 30, temperature=0)) for where in ("cpu", "cuda")]
    assert answers[0] == answers[1]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="torch.compile needs Triton there")
def test_compiled_generation_is_that_without(capfd):
    """Also in a second answer, whose caches lie elsewhere; and it does run as a CUDA graph."""
    model, prompts = network().cuda(), [[5, 6, 7], [8]]
    expected = list(generate(model, prompts, 30, temperature=0))
    model.compile_generation()
    assert [list(generate(model, prompts, 30, temperature=0)) for _ in range(2)] == [expected] * 2
    assert "skipping cudagraphs" not in capfd.readouterr().err


@pytest.mark.parametrize("processes, how", [(2, []), (0, ["--shard=full", "--offload"])], ids=["two", "offload"])
def test_two_cards_and_one_that_offloads_have_the_losses_of_one(tok, pretrain_dir, tmp_path, processes, how):
    if torch.cuda.device_count() < processes:
        pytest.skip("one CUDA device")
    settings = [f"--tokenizer={tok.name}", f"--data_dir={pretrain_dir}", "--dim=64", "--n_layers=2", "--n_heads=2",
                "--max_seq_len=64", "--batch_tokens=512", "--max_steps=6", "--sample_prompts="]
    losses = []
    for n, name, options in ((0, "one", []), (processes, "other", how)):
        done = conftest.run("pretrain.py", tmp_path, *settings, *options, f"--out_dir={name}", torchrun=n, timeout=400)
        assert done.rc == 0, done.err[-2000:]
        with open(tmp_path / name / "log.csv", encoding="utf-8") as f:
            losses.append([float(row["loss"]) for row in csv.DictReader(f)])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
