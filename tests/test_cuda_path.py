"""What the code would do on a CUDA device, shown without one.

The dtypes and shapes that every operation would get, and the packed training step with plain loops
in the place of the attention kernels.
"""
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

import model as models
from conftest import ROOT, run
from model import IGNORE, Model, ModelConfig

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# dim, query heads, length of a row; two layers are enough, as all are alike
SHAPES = [(512, 4, 512), (768, 6, 512), (1024, 8, 1024), (1536, 12, 1024)]

needs_varlen = pytest.mark.skipif(
    "enable_gqa" not in models.packed_options(),
    reason="attention over packed documents of grouped heads came with PyTorch 2.13")


# ---- fake tensors: what autocast on CUDA hands to attention --------------------------------------

@pytest.fixture
def cuda(monkeypatch):
    """A card of the Ampere generation, as far as model.py asks about it."""
    monkeypatch.setattr(models, "has_flash_attention", lambda device: device.type == "cuda")


def seen_by_attention(config, dtype, T, packed):
    """[(name of the kernel, its q, k, v)] of a forward pass, and the dtype of the hidden states.

    With fake tensors on "cuda", under autocast to dtype.
    """
    from torch._subclasses import FakeTensorMode
    seen = []

    def spy(name):
        def call(q, k, v, *args, **kwargs):
            seen.append((name, q, k, v))
            return torch.empty_like(q)
        return call

    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), \
            FakeTensorMode(allow_non_fake_inputs=True):
        with suppress(ImportError):            # older versions have none
            patch.setattr("torch.nn.attention.varlen.varlen_attn", spy("packed"))
        patch.setattr(F, "scaled_dot_product_attention", spy("dense"))
        patch.setattr(F, "embedding", lambda x, weight, *more:
                      weight.new_empty(*x.shape, weight.shape[1]))
        model = Model(config)
        fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda")
        for module in model.modules():
            for name, p in list(module._parameters.items()):
                module._parameters[name] = None if p is None else torch.nn.Parameter(fake(p))
            for name, b in list(module._buffers.items()):
                module._buffers[name] = fake(b)
        x = torch.empty(2, T, dtype=torch.int64, device="cuda")
        starts = torch.empty(5, dtype=torch.int32, device="cuda") if packed else None
        if dtype != torch.float32:
            # torch.autocast("cuda") itself refuses a build without CUDA
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", dtype)
            torch.set_autocast_cache_enabled(False)
            torch.autocast_increment_nesting()
        try:
            if packed and not model.has_packed_attention(models.product_dtype(model.norm.weight)):
                starts = None
            h = model.hidden(x, model.rope.narrow(1, 0, T), cu_seqlens=starts)
        finally:
            if dtype != torch.float32:
                torch.autocast_decrement_nesting()
                torch.clear_autocast_cache()
                torch.set_autocast_enabled("cuda", False)
                torch.set_autocast_cache_enabled(True)
    return seen, h.dtype


@needs_varlen
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("n_kv_heads", [0, 2])
@pytest.mark.parametrize("dim, n_heads, T", SHAPES)
def test_the_packed_kernel_gets_what_it_takes(cuda, dim, n_heads, T, n_kv_heads, qk_norm, dtype):
    config = ModelConfig(16_384, dim, 2, n_heads, n_kv_heads, max_seq_len=T, qk_norm=qk_norm)
    seen, hidden = seen_by_attention(config, dtype, T, packed=True)
    assert [name for name, *_ in seen] == ["packed"] * 2 and hidden == dtype
    for _, q, k, v in seen:
        assert q.dtype == k.dtype == v.dtype == dtype
        assert q.device.type == k.device.type == v.device.type == "cuda"
        assert q.shape == (2 * T, n_heads, config.head_dim) and k.shape == v.shape
        assert k.shape[1] in (n_heads, config.n_kv_heads)
        assert q.shape[2] % 8 == 0 and q.shape[2] <= 256


@pytest.mark.parametrize("dtype", [*HALF.values(), torch.float32])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_dense_attention_gets_one_dtype_too(cuda, qk_norm, dtype):
    config = ModelConfig(1000, 256, 2, 2, 1, qk_norm=qk_norm)
    seen, hidden = seen_by_attention(config, dtype, 64, packed=False)
    assert [name for name, *_ in seen] == ["dense"] * 2 and hidden == dtype
    for _, q, k, v in seen:
        assert q.dtype == k.dtype == v.dtype == dtype
        # with fewer keys than queries the one kernel that is left keeps all scores in float32
        assert q.shape == k.shape == v.shape


@needs_varlen
@pytest.mark.parametrize("dtype, head_dim, packed", [
    (torch.bfloat16, 64, True), (torch.float16, 128, True), (torch.bfloat16, 256, True),
    (torch.bfloat16, 264, False), (torch.bfloat16, 200, False), (torch.bfloat16, 36, False),
    (torch.float32, 64, False)])
def test_what_the_packed_kernel_does_not_take_goes_the_dense_way(cuda, dtype, head_dim, packed):
    config = ModelConfig(1000, 64, 2, 2, head_dim=head_dim)
    seen, _ = seen_by_attention(config, dtype, 64, packed=True)
    assert [name for name, *_ in seen] == ["packed" if packed else "dense"] * 2


# ---- plain loops in the place of the kernels: the packed training step ---------------------------

def register_loops():
    """Make loops over the documents the CPU's kernels of PyTorch's packed attention."""
    import torch.nn.attention.varlen as varlen

    def scores(q, k):
        n = len(q)
        grouped = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        s = torch.einsum("qhd,khd->hqk", q.float(), grouped.float()) / q.shape[-1] ** 0.5
        later = torch.ones(n, n).triu(1).bool()
        return s.masked_fill(later, -torch.inf).softmax(-1)                    # (H, n, n)

    def forward(q, k, v, cu, cu_k, longest, longest_k, *args, **kwargs):
        assert q.dtype in HALF.values()
        assert k.dtype == v.dtype == q.dtype
        assert cu.dtype == torch.int32
        assert int(cu.diff().max()) <= longest
        assert int(cu[-1]) == len(q)
        out, r = torch.empty_like(q), q.shape[1] // k.shape[1]
        for a, b in zip(cu.tolist(), cu.tolist()[1:]):
            p = scores(q[a:b], k[a:b])
            out[a:b] = torch.einsum("hqk,khd->qhd", p, v[a:b].repeat_interleave(r, dim=1).float())
        return out, torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(d, q, k, v, out, lse, cu, *args, **kwargs):
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        r = q.shape[1] // k.shape[1]
        for a, b in zip(cu.tolist(), cu.tolist()[1:]):
            p, g = scores(q[a:b], k[a:b]), d[a:b].float()
            dp = torch.einsum("qhd,khd->hqk", g, v[a:b].repeat_interleave(r, dim=1).float())
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
            dq[a:b] = torch.einsum("hqk,khd->qhd", ds, k[a:b].repeat_interleave(r, dim=1).float())
            dk[a:b] = torch.einsum("hqk,qhd->khd", ds, q[a:b].float()).unflatten(1, (-1, r)).sum(2)
            dv[a:b] = torch.einsum("hqk,qhd->khd", p, g).unflatten(1, (-1, r)).sum(2)
        return dq, dk, dv

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(backward)
    models.has_flash_attention = lambda device: True


def cuda_rule():
    """Autocast on CUDA, since PyTorch 2.12, computes rms_norm in float32; on a CPU it does not."""
    plain = F.rms_norm

    def rms_norm(x, shape, weight=None, eps=None):
        if torch.is_autocast_enabled("cpu"):
            return plain(x.float(), shape, None if weight is None else weight.float(), eps)
        return plain(x, shape, weight, eps)
    F.rms_norm = rms_norm


def rounds(step, rank=0):
    """Micro-batches (x, y, cu_seqlens) of one step, more of them on rank 0."""
    random = torch.Generator().manual_seed(100 * step + rank)
    for i in range(3 - rank):
        B = 3 if (step, i) == (2, 1) else 4
        cuts = torch.randint(1, B * 64, (2 + 5 * ((step + i) % 3),), generator=random)
        starts = torch.unique(torch.cat((torch.arange(0, B * 64 + 1, 64), cuts))).int()
        x, y = (torch.randint(1000, (B, 64), generator=random) for _ in range(2))
        y[torch.rand(B, 64, generator=random) < 0.3] = IGNORE
        yield x, y, starts


def network(**options):
    torch.manual_seed(0)
    model = Model(ModelConfig(1000, 64, 3, 4, max_seq_len=64, qk_norm=True, **options))
    for p in model.parameters():
        # large enough that documents matter to each other
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.1)
    return model


BEGIN = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
import runtime
import test_cuda_path as path
from optim import make_optimizers
path.cuda_rule()
path.register_loops()

def report():
    # one write for the whole line: what two processes print() to one pipe can mix within a line
    graphs = counters["stats"]["unique_graphs"]
    os.write(1, b"%d %d\\n" % (sum(counters["graph_break"].values()), graphs))
"""

PACKED = """
for n_kv_heads in (0, 2):
    counters.clear()
    torch._dynamo.reset()
    packed, dense = (path.network(n_kv_heads=n_kv_heads) for _ in range(2))
    packed.compile()
    dense.has_packed_attention = lambda dtype: False
    for step in range(4):
        for x, y, starts in path.rounds(step):
            losses = []
            for model in (packed, dense):
                model.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = model(x, y, starts)
                loss.backward()
                losses.append(loss.item())
            assert abs(losses[0] / losses[1] - 1) < 1e-3, losses
            for (name, a), b in zip(packed.named_parameters(), dense.parameters()):
                # 0.05 was seen, and 0.9 where documents see each other
                assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm() + 1e-4, name
    report()
"""

DDP = """
dist.init_process_group("gloo")
rank = dist.get_rank()
process = runtime.Process(rank, rank, 2, torch.device("cpu"))
model, alone = path.network(), path.network()
model.compile()
forward = runtime.parallel(model, process, "", "float32")
alone.has_packed_attention = lambda dtype: False
optimizers = make_optimizers(model, 1e-3, 1e-3, 0.1, "bfloat16")
for step in range(3):
    buckets = [p.grad.data_ptr() for p in model.parameters()] if step > 1 else []
    micro = list(path.rounds(step, rank))                 # 3 on rank 0, 2 on rank 1
    for i, (x, y, starts) in enumerate(micro):
        with forward.no_sync() if i < len(micro) - 1 else torch.enable_grad():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = forward(x, y, starts)
            (loss * 2 / 1000).backward()
        if buckets:                                       # no second copy beside them
            assert buckets == [p.grad.data_ptr() for p in model.parameters()]
    # the gradients of both ranks by one process, with dense masks
    alone.load_state_dict(model.state_dict())
    alone.zero_grad()
    for other in range(2):
        for x, y, starts in path.rounds(step, other):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = alone(x, y, starts)
            (loss / 1000).backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters()):
        assert (a.grad - b.grad).norm() < 0.1 * b.grad.norm() + 1e-4, (step, name)
    for optimizer in optimizers:
        optimizer.step()
    runtime.clear_gradients(forward, optimizers)
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
others = weights.clone()
dist.broadcast(others, 0)
assert torch.equal(weights, others)
report()
dist.destroy_process_group()
"""


@needs_varlen
@pytest.mark.parametrize("script, processes, prints", [
    pytest.param(PACKED, 0, 2, id="one process"),
    pytest.param(DDP, 2, 2, id="DDP")])
def test_compiled_packed_steps_equal_the_dense_mask_and_compile_as_often_as_expected(
        tmp_path, script, processes, prints):
    """In processes of their own, as the loops stay registered.

    A block compiles for its first shape, then once for any number of documents and once for any
    number of rows; the loss twice: five graphs.
    """
    (tmp_path / "script.py").write_text(BEGIN + script, encoding="utf-8")
    done = run(tmp_path / "script.py", tmp_path, torchrun=processes)
    assert done.rc == 0, done.err[-3000:]
    counts = [tuple(map(int, line.split())) for line in done.out.splitlines()]
    assert len(counts) == prints, done.out
    assert all(breaks == 0 and graphs <= 5 for breaks, graphs in counts), done.out
    assert "deprecated" not in done.err, done.err
