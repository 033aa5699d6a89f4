"""The optimizers: AdamW for embeddings, head and vectors, Muon for the matrices in the network."""
import math

import torch
import torch.distributed as dist

from sharding import gathered, local, share

MUON_BATCHES = 8               # at least, of the matrices of a shape: as many processes share them


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: each direction of a matrix moves at the same speed.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale 0.2 sqrt(larger side), which
    makes learning rate and weight decay those of AdamW, is from Liu et al. 2025, arXiv:2502.16982,
    section 2.2. For the matrices inside the network; embeddings, head and vectors want AdamW.

    Where several processes train together, each orthogonalises its share of the matrices and sends
    them to the others. The weights are the same, bit for bit, with any number of processes. Every
    gradient must be there, on all of them.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype                     # of the products; low precision is enough

    @torch.no_grad()
    def step(self):
        rank, world_size = 0, 1
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        for group in self.param_groups:
            batches = batches_by_shape(group["params"])
            beta, lr, decay = group["momentum"], group["lr"], group["weight_decay"]
            for start in range(0, len(batches), world_size):   # a batch for every process
                turn = batches[start:start + world_size]
                updates = [self.momentum(params, beta) for params in turn]
                if rank < len(turn):
                    update = orthogonalize(updates[rank])
                    updates[rank] = update.contiguous()
                if world_size > 1:
                    exchange(updates)
                for params, update in zip(turn, updates):
                    self.apply(params, update, lr, decay)

    def momentum(self, params, beta):
        """The Nesterov momentum of matrices of one shape, (n, rows, columns) in self.dtype.

        Moves their buffers on.
        """
        grads, buffers = [], []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            grads.append(local(p.grad))
            buffers.append(local(state["momentum"]))
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        ahead = torch._foreach_lerp(grads, buffers, beta)
        updates = []
        for p, rows in zip(params, ahead):
            rows = rows.to(self.dtype)
            updates.append(gathered(rows, p))
        return torch.stack(updates)

    def apply(self, params, update, lr, weight_decay):
        first = params[0]
        scale = 0.2 * math.sqrt(max(first.shape))
        update = update.to(first.dtype)
        rows = [local(share(u, p)) for u, p in zip(update, params)]
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, rows, alpha=-lr * scale)


def exchange(updates):
    """Send the i-th update from process i to all others; as bytes, as gloo knows few dtypes."""
    sent = []
    for owner, update in enumerate(updates):
        data = update.view(torch.uint8)
        work = dist.broadcast(data, owner, async_op=True)
        sent.append(work)
    for work in sent:
        work.wait()


def batches_by_shape(params):
    """Lists of matrices of one shape, which go through the iteration as one batch.

    They do not depend on the number of processes, or the same matrix would be rounded differently.
    On a CPU a batch stays near the cache; a GPU wants few launches.
    """
    by_shape, batches = {}, []
    for p in params:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, alike in by_shape.items():
        device = alike[0].device.type
        limit = 2**22 if device == "cpu" else 2**25
        share = math.ceil(len(alike) / MUON_BATCHES)
        n = min(share, limit // shape.numel())
        n = max(1, n)
        for i in range(0, len(alike), n):
            batch = alike[i:i + n]
            batches.append(batch)
    return batches


def orthogonalize(g):
    """The nearest (semi-)orthogonal matrices to g (n, rows, columns), singular values roughly 1.

    Five steps of a Newton-Schulz iteration with Jordan's coefficients.
    """
    is_tall = g.shape[1] > g.shape[2]
    x = g.mT if is_tall else g
    norm = x.norm(dim=(1, 2), keepdim=True)                            # (n, 1, 1)
    x = x / (norm + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)          # -4.7750 a + 2.0315 a a
        x = torch.baddbmm(x, b, x, beta=3.4445)                         # 3.4445 x + b x
    return x.mT if is_tall else x


def make_optimizers(model, lr, muon_lr, weight_decay, dtype="float32"):
    """AdamW for embeddings, head and vectors, Muon for the matrices; muon_lr 0: AdamW for all.

    Decay is for matrices only (embeddings included): norms and biases are not decayed.
    dtype: of the training's products; Muon's are bfloat16 where those are, else float32.
    Returns a list of optimizers whose groups carry "peak_lr".
    """
    hidden, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.ndim < 2:
            vectors.append(p)
        elif muon_lr and name.startswith("blocks."):
            hidden.append(p)
        else:
            matrices.append(p)
    decayed = dict(params=matrices, weight_decay=weight_decay)
    others = dict(params=vectors, weight_decay=0.0)
    device = vectors[0].device.type
    fused = device in ("cuda", "cpu")
    # beta1 of 0.8, and 0.9 as Muon's momentum: in runs of some thousand steps shorter memories than
    # usual learn faster
    adamw = torch.optim.AdamW([decayed, others], lr=lr, betas=(0.8, 0.95), fused=fused)
    optimizers = [adamw]
    if hidden:
        half = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        muon = Muon(hidden, muon_lr, weight_decay=weight_decay, dtype=half)
        optimizers.append(muon)
    model.has_muon = bool(hidden)              # for its estimate of the memory
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
