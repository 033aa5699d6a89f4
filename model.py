"""The network: a Llama-type decoder, its loss, its generation with a KV cache, and its optimizers.

Llama (Touvron et al. 2023, arXiv:2302.13971): pre-normalisation by RMSNorm, rotary positions, SwiGLU, no biases. The
options make it Llama 2/3 (grouped-query attention, rope_scaling), Qwen2 (qkv_bias) or Qwen3 (qk_norm), weight for
weight as in `transformers`. Nothing in here knows of files, tokenizers or process groups.

Shapes: B sequences, T tokens, S cached tokens, C = dim, H = n_heads, K = n_kv_heads, D = head_dim, V = vocab_size.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

IGNORE = -100                                  # a target that the loss does not count
MUON_BATCH = 2**22                             # numbers in the matrices that Muon treats at a time: bounds its memory


@dataclass
class ModelConfig:
    """The shape of the network. Raises ValueError, with a sentence, for a shape that cannot work."""
    vocab_size: int
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 0            # 0: as many as n_heads; fewer: groups of query heads share keys and values
    head_dim: int = 0              # 0: dim / n_heads
    hidden_dim: int = 0            # width of the SwiGLU; 0: 8/3 dim rounded up to a multiple of 64
    max_seq_len: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True    # one matrix embeds the tokens and scores them
    qk_norm: bool = False          # RMSNorm on every query and key head (Qwen3)
    qkv_bias: bool = False         # biases on the query, key and value projections (Qwen2)
    rope_scaling: dict = None      # the numbers of Llama 3's scaled(); None: plain rotary positions

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)} and must be at least 1")
        if self.head_dim < 0 or self.hidden_dim < 0 or self.rope_theta <= 0:
            raise ValueError(f"head_dim ({self.head_dim}) and hidden_dim ({self.hidden_dim}) must not be negative, and "
                             f"rope_theta ({self.rope_theta}) must be above 0")
        if self.head_dim == 0 and self.dim % self.n_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must divide dim ({self.dim})")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")
        self.head_dim = self.head_dim or self.dim // self.n_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of numbers")
        self.hidden_dim = self.hidden_dim or 64 * math.ceil(self.dim * 8 / 3 / 64)
        names = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        scaling = self.rope_scaling
        if scaling is not None and (scaling.keys() != names or min(scaling.values()) <= 0 or
                                    scaling["low_freq_factor"] >= scaling["high_freq_factor"]):
            raise ValueError(f"rope_scaling ({scaling}) must give {', '.join(sorted(names))}, all above 0 and "
                             "low_freq_factor below high_freq_factor")


# -----------------------------------------------------------------------------------------------------------------
# the network

class RMSNorm(nn.Module):
    """x / rms(x) * weight, in the dtype of x. Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.head_dim = D
        self.wq = nn.Linear(C, H * D, bias=config.qkv_bias)
        self.wk = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.wv = nn.Linear(C, K * D, bias=config.qkv_bias)
        self.wo = nn.Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, mask, cache=None):
        B, T, C = x.shape
        q = rotate(self.q_norm(self.wq(x).view(B, T, -1, self.head_dim)), rope)              # (B, T, H, D)
        k = rotate(self.k_norm(self.wk(x).view(B, T, -1, self.head_dim)), rope)              # (B, T, K, D)
        v = self.wv(x).view(B, T, -1, self.head_dim)                                         # (B, T, K, D)
        if cache is not None:
            k, v = cache.append(k, v)                                                        # (B, S + T, K, D)
        return self.wo(attend(q, k, v, mask).reshape(B, T, -1))                              # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: one projection gates the other. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, rope, mask, cache=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.layers = config, None                # layers: see join()
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.register_buffer("rope", rope_table(config), persistent=False)                   # (2, max_seq_len, 1, D)
        self.apply(self.init_weights)
        for block in self.blocks:              # 2 n_layers terms add up in the residual stream: keep its variance
            for w in (block.attention.wo.weight, block.ffn.w2.weight):
                nn.init.normal_(w, std=0.02 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_state(cls, shape, weights):
        """The network of a checkpoint: shape as in vars(ModelConfig), weights its state_dict; all of them must fit.

        The tensors become the network's own: none is drawn at random first, none is there twice.
        """
        with torch.device("meta"):
            model = cls(ModelConfig(**shape))
        model.rope = rope_table(model.config)
        model.load_state_dict(weights, assign=True)
        if model.config.tie_embeddings:
            model.head.weight = model.embedding.weight
        return model

    def join(self):
        """Make the network, where it is now, ready for generation by step(). Returns the model."""
        self.layers = []
        for block in self.blocks:
            a, f, qk_norm = block.attention, block.ffn, None
            if self.config.qk_norm:            # the weights of all heads, query and key
                qk_norm = torch.cat((a.q_norm.weight.expand(self.config.n_heads, -1),
                                     a.k_norm.weight.expand(self.config.n_kv_heads, -1)))
            self.layers.append((block.attention_norm.weight, *joined(a.wq, a.wk, a.wv), qk_norm, a.wo.weight,
                                block.ffn_norm.weight, joined(f.w1, f.w3)[0], f.w2.weight))
        return self

    def forward(self, x, y=None, cu_seqlens=None):
        """Logits, or with targets their loss.

        x (B, T) int64 token ids; y (B, T) int64 the token that follows each, IGNORE where none counts;
        cu_seqlens (N + 1,) int32: where the N documents start in the B * T tokens laid end to end (every row starts
        one), then B * T; documents do not see each other. None: each row is one document.
        Returns (B, T, V) logits, or with y the *sum* of the cross-entropies in nats, a float32 scalar.
        """
        mask = None if cu_seqlens is None else document_mask(cu_seqlens, x.shape, self.norm.weight)
        h = self.hidden(x, self.rope[:, :x.shape[1]], mask)                                  # (B, T, C)
        if y is None:
            return self.head(h)                                                              # (B, T, V)
        return summed_cross_entropy(h.flatten(0, 1), self.head.weight, y.flatten())          # ()

    def hidden(self, x, rope, mask, caches=None):
        """The normalised residual stream behind the last block, (B, T, C); see attend() for mask."""
        h = self.embedding(x)                                                                # (B, T, C)
        if torch.is_autocast_enabled(h.device.type):           # the residual stream, too, in the dtype of the products
            h = h.to(torch.get_autocast_dtype(h.device.type))
        rope = rope.to(h.dtype)
        for i, block in enumerate(self.blocks):                # compiled or not: for the one shape of training only
            run = block if torch.is_grad_enabled() else block.forward
            h = run(h, rope, mask, caches[i] if caches else None)
        return self.norm(h)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len):
        """Floating-point operations of one training step per token: 6 per weight of a matrix product (2 forward, 4
        backward; Kaplan et al. 2020, arXiv:2001.08361, section 2.1), and 12 H D per layer and token attended to, of
        which a causal row has seq_len / 2 on average."""
        c = self.config
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2) + c.vocab_size * c.dim
        return 6 * matrices + 12 * c.n_layers * c.n_heads * c.head_dim * seq_len // 2

    def bytes_to_train(self, tokens, itemsize):
        """Estimate of the peak memory of a training step on `tokens` tokens (all of one micro-batch), in bytes: float32
        weights, gradients and two moments (DDP's buckets are the gradients), the weights in half precision, what each
        block keeps for the backward pass, and the loss's chunk of logits. itemsize: bytes of the products' dtype."""
        c = self.config
        weights = self.n_params() * (16 + (itemsize if itemsize < 4 else 0))
        heads = (c.n_heads + c.n_kv_heads) * c.head_dim
        kept = tokens * c.n_layers * (4 * c.dim + 4 * heads + 4 * c.hidden_dim) * itemsize
        loss = c.vocab_size * c.dim * 8 + loss_rows(self.norm.weight.device) * c.vocab_size * 10
        return weights + kept + loss


def rope_table(config):
    """cos and sin of position x frequency, (2, max_seq_len, 1, D) float32, the first half of the sines negated for
    rotate(). Su et al. 2021, arXiv:2104.09864."""
    frequency = 1 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)   # (D / 2,)
    if config.rope_scaling:
        frequency = scaled(frequency, **config.rope_scaling)
    angle = torch.outer(torch.arange(config.max_seq_len).float(), frequency)                 # (max_seq_len, D / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1))).unsqueeze(2)


def scaled(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3's frequencies for a longer context: those that turn less than low_freq_factor times in the original one
    become `factor` times slower, those that turn more than high_freq_factor times stay, with a ramp in between.
    Source: meta-llama/llama-models, models/llama3/model.py, apply_scaling."""
    turns = original_max_position_embeddings * frequency / (2 * math.pi)                     # (D / 2,)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x, rope):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle. x (B, T, heads, D), rope (2, [B,] T, 1, D)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


def attend(q, k, v, mask):
    """softmax(q k / sqrt(D)) v for q (B, T, H, D) and k, v (B, S, K, D); returns (B, T, H, D).

    mask None: causal; bool (B, 1, T, S): True where a query may look; int32 (N + 1,): the cu_seqlens of packed
    documents, each causal in itself.
    """
    grouped = q.shape[2] != k.shape[2]
    if mask is not None and mask.dtype == torch.int32:
        from torch.nn.attention.varlen import varlen_attn                                    # CUDA, half precision
        if grouped:
            k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
        T = q.shape[1]
        y = varlen_attn(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, mask, T, T, window_size=(-1, 0))
        return y.view_as(q)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,
                                       is_causal=mask is None and q.shape[1] > 1, enable_gqa=grouped)
    return y.transpose(1, 2)


def document_mask(cu_seqlens, shape, weight):
    """What attend() takes for packed documents: cu_seqlens itself where a kernel for it exists, else a bool mask
    (B, 1, T, T) that allows what is earlier and of the same document."""
    if cu_seqlens.is_cuda and torch.cuda.get_device_capability()[0] >= 8 and (
            torch.is_autocast_enabled("cuda") or weight.dtype in (torch.bfloat16, torch.float16)):
        return cu_seqlens
    B, T = shape
    starts = torch.zeros(B * T, dtype=torch.int32, device=cu_seqlens.device)
    document = starts.index_fill(0, cu_seqlens[:-1].long(), 1).cumsum(0).view(B, T)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies from hidden states, a few rows of logits at a time.

    All logits at once, (B T, V), are the largest tensor of a small model by far. Here each chunk's logits give their
    share of the loss and of both gradients at once and are dropped: no recomputation, and memory that does not grow
    with V times the batch. The idea is that of Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.
    """

    @staticmethod
    def forward(ctx, h, weight, y, rows, with_gradient):
        nats = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if with_gradient else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        rows = min(rows, len(h))               # every chunk takes the place of the one before: fresh memory is slow
        logits, logp = h.new_empty(rows, len(weight)), h.new_empty(rows, len(weight), dtype=torch.float32)
        for hs, ys, dhs in zip(h.split(rows), y[:, None].split(rows), (h if dh is None else dh).split(rows)):
            counts = ys != IGNORE                                                            # (rows, 1)
            target = ys.clamp(min=0)
            logits, logp = logits[:len(hs)], logp[:len(hs)]                                  # (rows, V)
            torch.log_softmax(logp.copy_(torch.mm(hs, weight.T, out=logits)), -1, out=logp)
            nats -= (logp.gather(1, target) * counts).sum()
            if with_gradient:                  # d nats / d logits = softmax - onehot(target), 0 where none counts
                d = logp.exp_().scatter_add_(1, target, torch.full_like(logp[:, :1], -1.0)).mul_(counts)
                d = logits.copy_(d)
                torch.mm(d, weight, out=dhs)
                for part, columns in zip(dw.split(4096), d.split(4096, dim=1)):              # a sum that stays in cache
                    part += columns.T @ hs
        if with_gradient and weight.dtype == torch.bfloat16:   # half the memory during the whole backward pass;
            del logits, logp, d                # float16 has no room for a gradient that is not yet scaled
            dw = dw.bfloat16()
        ctx.save_for_backward(dh, dw)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx, scale):
        dh, dw = ctx.saved_tensors
        return dh * scale.to(dh.dtype), dw.mul_(scale).to(ctx.weight_dtype), None, None, None


def summed_cross_entropy(h, weight, y):
    """Sum over the targets of -log softmax(h weight^T)[y], float32 (). h (N, C), weight (V, C), y (N,) with IGNORE."""
    if torch.is_autocast_enabled(h.device.type):               # autocast does not reach into an autograd.Function
        dtype = torch.get_autocast_dtype(h.device.type)
        h, weight = h.to(dtype), weight.to(dtype)
    return ChunkedCrossEntropy.apply(h, weight, y, loss_rows(h.device), torch.is_grad_enabled())


def loss_rows(device):
    """Rows of logits at a time: a CPU wants few, near its cache, a GPU wants work."""
    return 256 if device.type == "cpu" else 4096


# -----------------------------------------------------------------------------------------------------------------
# generation

class KVCache:
    """Keys and values of one layer for the tokens seen so far: (B, size, K, D) each, filled from the left; in memory,
    those of a head lie side by side."""

    def __init__(self, B, size, K, D, **kind):
        self.k, self.v = (torch.zeros(B, K, size, D, **kind).transpose(1, 2) for _ in range(2))
        self.length = 0

    def append(self, k, v):
        start, self.length = self.length, self.length + k.shape[1]
        self.k[:, start:self.length], self.v[:, start:self.length] = k, v
        return self.k[:, :self.length], self.v[:, :self.length]


def empty_caches(model, B, size):
    """A KVCache for every layer, in the dtype of its products."""
    config, device, dtype = model.config, model.norm.weight.device, model.norm.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return [KVCache(B, size, config.n_kv_heads, config.head_dim, dtype=dtype, device=device) for _ in model.blocks]


def joined(*parts):
    """Weights and biases of Linears with the same input, one below the other: one large product is faster than a few
    small ones. The Linears' own weights become views of theirs: none is there twice."""
    weight = torch.cat([part.weight.detach() for part in parts])
    for part, own in zip(parts, weight.split([part.out_features for part in parts])):
        part.weight = nn.Parameter(own)
    return weight, None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts])


def product(x, weight):
    """x weight^T, (B, out), for x (B, in), by the kernel that reads the weight fastest."""
    if len(x) == 1:
        return torch.mv(weight, x[0])[None]
    if x.is_cpu and x.dtype == torch.bfloat16:                 # oneDNN: 1.3 to 1.6 times as fast up to 256 rows
        return (weight @ x.T).T
    return x @ weight.T


def rms_norm(x, weight, eps):
    """As RMSNorm, over the last dimension. On a CPU as the LayerNorm of (x, -x), whose mean is 0: one kernel, not ten."""
    n = x.shape[-1]
    if not x.is_cpu:
        return F.rms_norm(x, (n,), eps=eps) * weight
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * n,), eps=eps)[..., :n] * weight


def step(model, x, rope, mask, caches):
    """head(hidden(x)) of a joined model for one more token of each sequence: x (B, 1), logits (B, V) float32.

    For a single token the calls of modules, the views and the casts take a CPU as long as the products do; here are as
    few of them as can be.
    """
    config, B = model.config, len(x)
    H, K, D, eps = config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps
    h = model.embedding.weight[x[:, 0]]                                                      # (B, C)
    rope = rope.to(h.dtype)
    for (attention_norm, wqkv, bias, qk_norm, wo, ffn_norm, w13, w2), cache in zip(model.layers, caches):
        qkv = product(rms_norm(h, attention_norm, eps), wqkv)
        if bias is not None:
            qkv = qkv + bias
        qkv = qkv.contiguous().view(B, 1, H + K + K, D)
        qk = qkv[:, :, :H + K]
        if qk_norm is not None:
            qk = rms_norm(qk, qk_norm, eps)
        qk = rotate(qk, rope)                                                                # (B, 1, H + K, D)
        k, v = cache.append(qk[:, :, H:], qkv[:, :, H + K:])                                 # (B, S + 1, K, D)
        h = h + product(attend(qk[:, :, :H], k, v, mask).reshape(B, -1), wo)
        gate, up = product(rms_norm(h, ffn_norm, eps), w13).chunk(2, dim=1)
        h = h + product(F.silu(gate) * up, w2)
    logits = product(rms_norm(h, model.norm.weight, eps), model.head.weight)
    return logits.to(torch.float32, memory_format=torch.contiguous_format)


@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
             stop_ids=(), pad_id=0, generator=None):
    """Yield, step by step, the next token of every prompt: lists of B ids, None where a sequence has ended.

    prompts: B lists of ids, of any lengths >= 1, each shorter than max_seq_len (ValueError otherwise). A sequence ends
    with its first stop id (which is yielded) or where the context is full. temperature 0 is greedy. The work is that
    of one forward pass over the prompts and one over a single token per step: keys and values are kept.
    """
    config, device, B = model.config, model.norm.weight.device, len(prompts)
    longest = max(map(len, prompts))
    if min(map(len, prompts)) < 1 or longest >= config.max_seq_len:
        raise ValueError(f"prompts of {min(map(len, prompts))} to {longest} tokens; each needs at least 1 and "
                         f"fewer than max_seq_len ({config.max_seq_len})")
    # shorter prompts are padded on the left: then all write to the same place of the cache, and `pad` hides the rest
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)                   # (B,)
    x = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    size = min(config.max_seq_len + int(pad.max()), longest + max_new_tokens)        # where the shortest is full, too
    caches = empty_caches(model, B, size)
    seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)
    for row, p in zip(seen, prompts):
        row[torch.tensor(p, device=device)] = True
    slot, alive = torch.arange(size, device=device), [True] * B
    ragged = bool(pad.any())
    for length in range(longest, size):
        T = x.shape[1]
        query = slot[length - T:length]                                                      # (T,)
        mask = None
        if ragged:                             # a pad position looks at itself, so that no softmax is empty
            mask = (slot[:length] >= pad[:, None])[:, None, :] & (slot[:length] <= query[:, None])
            mask = (mask | (slot[:length] == query[:, None]))[:, None]                       # (B, 1, T, length)
        rope = model.rope[:, (query - pad[:, None]).clamp(0, config.max_seq_len - 1) if ragged else query]
        if T == 1 and model.layers:
            logits = step(model, x, rope, mask, caches)                                      # (B, V)
        else:
            logits = model.head(model.hidden(x, rope, mask, caches)[:, -1]).float()
        x = choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)   # (B, 1)
        seen.scatter_(1, x, True)
        ids = x[:, 0].tolist()
        yield [token if going else None for token, going in zip(ids, alive)]
        alive = [going and token not in stop_ids and length + 1 < config.max_seq_len + longest - len(p)
                 for token, going, p in zip(ids, alive, prompts)]
        if not any(alive):
            return


def choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator):
    """Draw the next tokens, (B, 1), from logits (B, V); seen (B, V) bool marks the tokens of prompt and answer.

    Repetition penalty: Keskar et al. 2019, arXiv:1909.05858, section 4.1. top_p: Holtzman et al. 2019,
    arXiv:1904.09751, the fewest tokens whose probabilities reach top_p.
    """
    if repetition_penalty != 1.0:
        punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, punished, logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if not top_k and top_p == 1:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    p, order = likeliest(logits, top_k, top_p)                                               # (B, k), falling
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator))


def likeliest(logits, top_k, top_p):
    """The probabilities of the top_k most likely tokens, and which those are; of as many as reach top_p if top_k is 0."""
    if top_k:
        logits, order = logits.topk(min(top_k, logits.shape[-1]))
        return logits.softmax(-1), order
    p = logits.softmax(-1)
    few = p.topk(min(512, p.shape[-1]))        # mostly enough, and far less work than sorting a whole vocabulary
    return few if bool((few.values.sum(-1) >= top_p).all()) else p.sort(descending=True)


# -----------------------------------------------------------------------------------------------------------------
# optimizers

class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a weight matrix moves at the same speed.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale 0.2 sqrt(larger side), which makes learning rate
    and weight decay those of AdamW, is from Liu et al. 2025, arXiv:2502.16982, section 2.2. For the matrices inside
    the network; embeddings, head and vectors want AdamW.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype                     # of the iteration's products; rough is enough

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}                      # matrices of one shape go through the iteration as one batch
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                n = max(1, MUON_BATCH // shape.numel())
                for i in range(0, len(params), n):
                    self.update(params[i:i + n], group)

    def update(self, params, group):
        """A step of matrices of one shape."""
        grads = [p.grad for p in params]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"])).to(self.dtype)
        update = orthogonalize(nesterov).to(params[0].dtype)            # (n, rows, columns)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * 0.2 * math.sqrt(max(params[0].shape)))


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

    Decay is for matrices only (embeddings included): a norm's weight or a bias has no direction to shrink along.
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
