"""The optimizers: AdamW for embeddings, head and vectors, Muon for the matrices inside the network."""
import math

import torch
import torch.distributed as dist

from sharding import gathered, local, share

MUON_BATCHES = 8               # of the matrices of one shape, at least: so many processes share the work evenly


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a weight matrix moves at the same speed.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale 0.2 sqrt(larger side), which makes learning rate
    and weight decay those of AdamW, is from Liu et al. 2025, arXiv:2502.16982, section 2.2. For the matrices inside
    the network; embeddings, head and vectors want AdamW.

    Where several processes train together, each orthogonalises its share of the matrices and sends them to the others.
    The weights are the same, bit for bit, with any number of processes. Every gradient must be there, on all of them.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype                     # of the iteration's products; low precision is enough

    @torch.no_grad()
    def step(self):
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            batches = batches_by_shape(group["params"])
            for start in range(0, len(batches), world_size):           # a batch for every process
                turn = batches[start:start + world_size]
                updates = [self.momentum(params, group["momentum"]) for params in turn]
                if rank < len(turn):
                    updates[rank] = orthogonalize(updates[rank]).contiguous()
                if world_size > 1:             # as bytes: gloo does not know every dtype
                    sent = [dist.broadcast(update.view(torch.uint8), owner, async_op=True)
                            for owner, update in enumerate(updates)]
                    for work in sent:
                        work.wait()
                for params, update in zip(turn, updates):
                    scale = 0.2 * math.sqrt(max(params[0].shape))
                    weights = [local(p) for p in params]
                    rows = [local(share(u, p)) for u, p in zip(update.to(weights[0].dtype), params)]
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                    torch._foreach_add_(weights, rows, alpha=-group["lr"] * scale)

    def momentum(self, params, beta):
        """The Nesterov momentum of matrices of one shape, (n, rows, columns) in self.dtype; moves their buffers on."""
        grads = [local(p.grad) for p in params]
        buffers = [local(self.state[p].setdefault("momentum", torch.zeros_like(p))) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        updates = torch._foreach_lerp(grads, buffers, beta)
        return torch.stack([gathered(u.to(self.dtype), p) for u, p in zip(updates, params)])


def batches_by_shape(params):
    """Lists of matrices of one shape, which go through the iteration as one batch.

    They do not depend on the number of processes, or the same matrix would be rounded differently. On a CPU a batch
    stays near the cache; a GPU wants few launches.
    """
    by_shape, batches = {}, []
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, alike in by_shape.items():
        numbers = 2**22 if alike[0].device.type == "cpu" else 2**25
        n = max(1, min(math.ceil(len(alike) / MUON_BATCHES), numbers // shape.numel()))
        batches += [alike[i:i + n] for i in range(0, len(alike), n)]
    return batches


def orthogonalize(g):
    """The nearest (semi-)orthogonal matrices to g (n, rows, columns), singular values roughly 1: five steps of a
    Newton-Schulz iteration with Jordan's coefficients."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := g.shape[1] > g.shape[2]:
        x = x.mT
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model, lr, muon_lr, weight_decay, dtype="float32"):
    """AdamW for embeddings, head and vectors, Muon for the matrices inside the network; muon_lr 0: AdamW for all.

    Decay is for matrices only (embeddings included): norms and biases are not decayed.
    dtype: of the training's products; Muon's are bfloat16 where those are, else float32.
    Returns a list of optimizers whose groups carry "peak_lr".
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and name.startswith("blocks.")] if muon_lr else []
    taken = set(map(id, hidden))
    rest = [p for _, p in named if id(p) not in taken]
    groups = [dict(params=[p for p in rest if p.ndim >= 2], weight_decay=weight_decay),
              dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0)]
    fused = rest[0].device.type in ("cuda", "cpu")
    # beta1 of 0.8, and 0.9 as Muon's momentum: in runs of some thousand steps shorter memories than usual learn faster
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.95), fused=fused)]
    if hidden:
        optimizers.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay,
                               dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
