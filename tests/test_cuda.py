"""What needs a card: run by `make test` for everyone who has one, skipped elsewhere."""
import csv

import pytest
import torch
from torch._dynamo.utils import counters

import conftest
import runtime
import sharding
from model import IGNORE, Model, ModelConfig, generate, packed_options
from optim import make_optimizers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALF = [torch.bfloat16, torch.float16]
can_compile = torch.cuda.is_available() and runtime.can_compile(torch.device("cuda", 0))
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
    starts = torch.unique(torch.cat((torch.arange(0, B * T + 1, T), cuts)))
    return x, y, starts.int()


def loss_and_gradients(model, x, y, starts, dtype):
    """The loss, the gradients on the CPU in float32, whether attention was packed."""
    kind = model.norm.weight.device.type
    model.zero_grad()
    with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
        packed = model.has_packed_attention(dtype)
        loss = model(x, y, starts)
    (loss / (y != IGNORE).sum()).backward()
    gradients = [p.grad.float().cpu().flatten() for p in model.parameters()]
    return loss.item(), torch.cat(gradients), packed


def is_ampere_or_newer():
    """These cards compute in bfloat16 and have FlashAttention."""
    major, _ = torch.cuda.get_device_capability()
    return major >= 8


def pretrain(folder, settings, *arguments, torchrun=0):
    """Run pretrain.py with the dict of settings; returns the losses that it logs in folder."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += [f"--out_dir={folder}", *arguments]
    done = conftest.run("pretrain.py", folder.parent, *flags, torchrun=torchrun, timeout=400)
    assert done.rc == 0, done.err[-2000:]
    with open(folder / "log.csv", encoding="utf-8") as f:
        return [float(row["loss"]) for row in csv.DictReader(f)]


@pytest.fixture
def settings(tok, pretrain_dir):
    return dict(
        tokenizer=tok.name,
        data_dir=pretrain_dir,
        dim=64,
        n_layers=2,
        n_heads=2,
        max_seq_len=64,
        batch_tokens=512,
    )


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("n_kv_heads", [0, 1])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_loss_and_gradients_of_packed_documents_are_those_of_the_cpu(dtype, n_kv_heads, compiled):
    """On cards from Ampere on by FlashAttention in half precision, else by the dense mask."""
    if dtype == torch.bfloat16 and not is_ampere_or_newer():
        pytest.skip("no bfloat16 on this card")
    if compiled and not can_compile:
        pytest.skip("torch.compile does not work here")
    torch._dynamo.reset()
    torch.set_float32_matmul_precision("highest")
    model = network(n_kv_heads=n_kv_heads)
    expected, gradients, _ = loss_and_gradients(model, *batch(), torch.float32)
    model = network(n_kv_heads=n_kv_heads).cuda()
    if compiled:
        model.compile()
    on_card = (t.cuda() for t in batch())
    loss, ours, packed = loss_and_gradients(model, *on_card, dtype)
    is_half = dtype != torch.float32
    if is_half and is_ampere_or_newer() and torch.version.hip is None:
        option = "enable_gqa" if n_kv_heads else "window_size"
        assert packed == (option in packed_options())
    assert loss == pytest.approx(expected, rel=1e-3)
    # without the mask of documents the gradients would differ by 0.86
    assert (ours - gradients).norm() < (0.1 if is_half else 1e-3) * gradients.norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_resumes_to_the_same_losses(settings, tmp_path, dtype):
    if dtype == "bfloat16" and not is_ampere_or_newer():
        pytest.skip("no bfloat16 on this card")
    settings.update(dtype=dtype, device="cuda", sample_prompts="从前")
    settings.update(eval_interval=4, max_steps=8, lr_min=1.0, warmup=0.0)
    whole = pretrain(tmp_path / "whole", settings)
    pretrain(tmp_path / "halves", settings, "--max_steps=4")
    halves = pretrain(tmp_path / "halves", settings, "--resume")
    assert len(whole) == len(halves) == 8
    # atomics in the backward pass of the embedding add up in any order
    assert whole == pytest.approx(halves, rel=2e-3)
    assert whole[-1] < whole[0]


@pytest.mark.parametrize(
    "dim, n_layers, T, rows",
    [
        (512, 8, 512, 16),
        (768, 6, 1024, 8),
    ],
)
def test_the_estimate_of_memory_is_right_within_15_percent(dim, n_layers, T, rows):
    torch._dynamo.reset()
    shape = dim, n_layers, dim // 128
    model = Model(ModelConfig(16_384, *shape, max_seq_len=T, qk_norm=True)).cuda()
    if can_compile:
        model.compile()
    name, autocast, _ = runtime.precision(torch.device("cuda", 0), "auto")
    optimizers = make_optimizers(model, 1e-3, 1e-3, 0.1, name)
    x, y, starts = (t.cuda() for t in batch(rows, T, 16_384))
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the second round finds the gradients of the first
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
    on_cpu, on_card = (
        list(generate(network().to(where), prompts, 30, temperature=0))
        for where in ("cpu", "cuda")
    )
    assert on_cpu == on_card


@pytest.mark.skipif(not can_compile, reason="torch.compile does not work here")
def test_compiled_generation_is_that_without():
    """Also in later answers, in the same caches and in larger ones; and it does run as a graph."""
    counters.clear()
    model = network().cuda()
    prompts = [[5, 6, 7], [8]]
    expected = list(generate(model, prompts, 100, temperature=0))
    model.compile_generation()
    for n in 30, 30, 100, 30:
        assert list(generate(model, prompts, n, temperature=0)) == expected[:n]
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize(
    "processes, how",
    [
        (2, []),
        (0, ["--shard=full", "--offload"]),
    ],
    ids=["two", "offload"],
)
def test_two_cards_and_one_that_offloads_have_the_losses_of_one(
    settings, tmp_path, processes, how
):
    if torch.cuda.device_count() < processes:
        pytest.skip("one CUDA device")
    is_new = torch.__version__ >= sharding.OLDEST and is_ampere_or_newer()
    if how and not (is_new and torch.distributed.is_nccl_available()):
        pytest.skip("sharding needs bfloat16, NCCL and a newer PyTorch")
    settings.update(max_steps=6, sample_prompts="")
    one = pretrain(tmp_path / "one", settings)
    other = pretrain(tmp_path / "other", settings, *how, torchrun=processes)
    assert one == pytest.approx(other, rel=5e-3)
