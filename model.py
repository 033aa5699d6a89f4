"""The network: a Llama-type decoder, its loss, and its generation with a KV cache.

Llama (Touvron et al. 2023, arXiv:2302.13971): pre-normalisation by RMSNorm, rotary positions,
SwiGLU, no biases. The options make it Llama 2/3 (grouped-query attention, rope_scaling), Qwen2
(qkv_bias) or Qwen3 (qk_norm), weight for weight as in `transformers`. Nothing in here knows of
files, tokenizers or process groups.

Shapes: B sequences, T tokens, S cached tokens, C = dim, H = n_heads, K = n_kv_heads, D = head_dim,
V = vocab_size.
"""
import functools
import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100                  # a target that the loss does not count
CACHE_STEP = 128               # the visible part of the KV cache grows by so many places
POSITIVE = ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
            "max_seq_len", "rope_theta")
ROPE_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


# -----------------------------------------------------------------------------------------------
# the shape

@dataclass
class ModelConfig:
    """The shape of the network; ValueError, with a sentence, for a shape that cannot work."""
    vocab_size: int
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 0            # 0: as many as n_heads; fewer: query heads share keys and values
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
        if self.head_dim == 0 and self.n_heads:
            if self.dim % self.n_heads:
                raise ValueError(f"n_heads ({self.n_heads}) must divide dim ({self.dim})")
            self.head_dim = self.dim // self.n_heads
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.hidden_dim = self.hidden_dim or 64 * math.ceil(self.dim * 8 / 3 / 64)
        for name in POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)} and must be above 0")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn "
                             "pairs of numbers")
        scaling = self.rope_scaling
        if scaling is None:
            return
        if scaling.keys() != ROPE_SCALING or min(scaling.values()) <= 0:
            raise ValueError(f"rope_scaling ({scaling}) must give {', '.join(sorted(ROPE_SCALING))}"
                             ", all above 0")
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError(f"rope_scaling ({scaling}): low_freq_factor must be below "
                             "high_freq_factor")


# -----------------------------------------------------------------------------------------------
# the blocks

class RMSNorm(nn.Module):
    """x / rms(x) * weight, in the dtype of x. Zhang and Sennrich 2019, arXiv:1910.07467.

    The result is cast back because autocast on CUDA computes rms_norm in float32 from PyTorch 2.12
    on, while the attention kernels want queries, keys and values in one half precision.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        C, bias = config.dim, config.qkv_bias
        query = config.n_heads * config.head_dim
        key = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(C, query, bias)
        self.wk = nn.Linear(C, key, bias)
        self.wv = nn.Linear(C, key, bias)
        self.wo = nn.Linear(query, C, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity      # which ignores its arguments
        self.q_norm = norm(config.head_dim, config.norm_eps)
        self.k_norm = norm(config.head_dim, config.norm_eps)

    def forward(self, x, rope, mask=None, cache=None, cu_seqlens=None):
        B, T, C = x.shape
        heads = B, T, -1, self.head_dim
        q = self.q_norm(self.wq(x).view(heads))                                # (B, T, H, D)
        k = self.k_norm(self.wk(x).view(heads))                                # (B, T, K, D)
        v = self.wv(x).view(heads)                                             # (B, T, K, D)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache is not None:
            k, v = remember(k, v, *cache, mask.shape[-1])                      # (B, S, K, D)
        if cu_seqlens is None:
            y = attend(q, k, v, mask)                                          # (B, T, H, D)
        else:
            y = attend_packed(q, k, v, cu_seqlens)
        return self.wo(y.reshape(B, T, -1))                                    # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: one projection gates the other. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, config):
        super().__init__()
        C, hidden = config.dim, config.hidden_dim
        self.w1 = nn.Linear(C, hidden, bias=False)
        self.w3 = nn.Linear(C, hidden, bias=False)
        self.w2 = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        gate = F.silu(self.w1(x))                                              # (B, T, hidden_dim)
        return self.w2(gate * self.w3(x))                                      # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x, rope, mask=None, cache=None, cu_seqlens=None):
        h = self.attention_norm(x)
        x = x + self.attention(h, rope, mask, cache, cu_seqlens)               # (B, T, C)
        return x + self.ffn(self.ffn_norm(x))


def rope_table(config):
    """cos and sin of position x frequency, (2, max_seq_len, 1, D) float32, for rotate().

    The first half of the sines is negated. Su et al. 2021, arXiv:2104.09864.
    """
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim  # (D / 2,)
    frequency = 1 / config.rope_theta ** exponents
    if config.rope_scaling:
        frequency = scaled(frequency, **config.rope_scaling)
    position = torch.arange(config.max_seq_len).float()                        # (T,)
    angle = torch.outer(position, frequency)                                   # (T, D / 2)
    cos, sin = angle.cos(), angle.sin()
    cos = torch.cat((cos, cos), dim=1)                                         # (T, D)
    sin = torch.cat((-sin, sin), dim=1)
    return torch.stack((cos, sin)).unsqueeze(2)


def scaled(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3's frequencies for a longer context.

    Those that turn less than low_freq_factor times in the original context become `factor` times
    slower, those that turn more than high_freq_factor times stay, with a ramp in between. Source:
    meta-llama/llama-models, models/llama3/model.py, apply_scaling.
    """
    turns = original_max_position_embeddings * frequency / (2 * math.pi)       # (D / 2,)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def rotate(x, rope):
    """Turn each pair (x[i], x[i + D/2]) by its position's angle.

    x (B, T, heads, D), rope (2, [B,] T, 1, D).
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)                                                  # (B, T, heads, D/2)
    swapped = torch.cat((b, a), dim=-1)
    return x * cos + swapped * sin


def attend(q, k, v, mask=None):
    """softmax(q k / sqrt(D)) v for q (B, T, H, D) and k, v (B, S, K, D); returns (B, T, H, D).

    mask: bool (B, 1, T, S), True where a query may look; None: causal.
    """
    q = q.transpose(1, 2)                                                      # (B, H, T, D)
    k = k.transpose(1, 2)                                                      # (B, K, S, D)
    v = v.transpose(1, 2)
    n_shared = q.shape[1] // k.shape[1]
    if q.device.type != "cpu" and n_shared > 1:
        # or older versions keep all scores, in float32, or fail (MPS)
        k = k.repeat_interleave(n_shared, dim=1)
        v = v.repeat_interleave(n_shared, dim=1)
    y = F.scaled_dot_product_attention(
        q, k, v,
        attn_mask=mask,
        is_causal=mask is None and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def attend_packed(q, k, v, cu_seqlens):
    """attend() within each of the documents that start at cu_seqlens, as in Model.forward()."""
    from torch.nn.attention.varlen import varlen_attn          # see packed_options()
    T = q.shape[1]                             # no document is longer
    options = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    y = varlen_attn(
        q.flatten(0, 1),                                                       # (B * T, H, D)
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens, cu_seqlens, T, T,
        window_size=(-1, 0),                   # all that is earlier, nothing that is later
        **options)
    return y.view_as(q)


@functools.cache
def packed_options():
    """The arguments of PyTorch's attention over packed documents; () where it has none.

    It is imported only where it can run: the import takes longer than that of all else.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
        return inspect.signature(varlen_attn).parameters       # "enable_gqa" came with PyTorch 2.13
    except ImportError:
        return ()


def document_mask(cu_seqlens, shape):
    """The mask of attend(), bool (B, 1, T, T), for the documents that start at cu_seqlens.

    A query sees what is earlier in its own document. shape: (B, T).
    """
    tokens = torch.arange(math.prod(shape), dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    document = torch.bucketize(tokens, cu_seqlens, right=True)  # each token's, from 1
    document = document.view(shape)                                            # (B, T)
    queries = document[:, None, :, None]                                       # (B, 1, T, 1)
    keys = document[:, None, None, :]                                          # (B, 1, 1, T)
    return (queries == keys).tril()


def has_flash_attention(device):
    """Whether PyTorch's FlashAttention runs there: NVIDIA cards from Ampere on."""
    return (device.type == "cuda"
            and torch.version.hip is None
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device)[0] >= 8)


def product_dtype(t):
    """The dtype of matrix products with the tensor t: autocast's where it is on, else its own."""
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else t.dtype


# -----------------------------------------------------------------------------------------------
# the model

class Model(nn.Module):
    is_compiled = False            # by compile(): changes the memory of a training step
    recompute = False              # keep only the blocks' inputs for the backward pass
    shares = 1                     # processes that share the weights, see sharding.py
    keeps_weights = True           # all weights are there during a step, not a block's at a time
    offloads = False               # what bytes_kept() counts is in the host's memory
    has_muon = True                # for the matrices of the blocks: one moment, AdamW keeps two
    static_caches = False          # by compile_generation(): a CUDA graph writes to the same places
    kept_caches = None             # these places

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.register_buffer("rope", rope_table(config), persistent=False)
        self.apply(self.init_weights)
        # 2 n_layers terms add up in the residual stream: smaller ones keep its variance
        std = 0.02 / math.sqrt(2 * config.n_layers)
        for block in self.blocks:
            nn.init.normal_(block.attention.wo.weight, std=std)
            nn.init.normal_(block.ffn.w2.weight, std=std)

    @staticmethod
    def init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_state(cls, shape, weights):
        """The network of a checkpoint: shape as in vars(ModelConfig), weights its state_dict.

        All weights must fit. The tensors become the network's own: no random initialisation, no
        second copy.
        """
        with torch.device("meta"):
            model = cls(ModelConfig(**shape))
        model.rope = rope_table(model.config)
        model.load_state_dict(weights, assign=True)
        if model.config.tie_embeddings:
            model.head.weight = model.embedding.weight
        return model

    def forward(self, x, y=None, cu_seqlens=None, per_token=False):
        """Logits, or with targets their loss.

        x (B, T) int64 token ids; y (B, T) int64 the token that follows each, IGNORE where none
        counts; cu_seqlens (N + 1,) int32: where the N documents start in the B * T tokens laid end
        to end (every row starts one), then B * T; documents do not see each other. None: each row
        is one document.
        Returns (B, T, V) logits, or with y the *sum* of the cross-entropies in nats, a float32
        scalar; per_token: each of them, float32 (B, T), 0 where none counts.
        """
        mask = None
        dtype = product_dtype(self.norm.weight)
        if cu_seqlens is not None and not self.has_packed_attention(dtype):
            mask = document_mask(cu_seqlens, x.shape)
            cu_seqlens = None
        rope = self.rope[:, :x.shape[1]]
        h = self.hidden(x, rope, mask, cu_seqlens=cu_seqlens)                  # (B, T, C)
        if y is None:
            return self.logits(h)                                              # (B, T, V)
        loss = self.loss(h.flatten(0, 1), y.flatten(), per_token)              # () or (B * T,)
        return loss.view(y.shape).clone() if per_token else loss               # sharding: no view

    def hidden(self, x, rope, mask=None, caches=None, cu_seqlens=None):
        """The normalised output of the last block, (B, T, C).

        mask: see attend(); cu_seqlens: see attend_packed(); caches: for every layer the keys and
        values so far and the slots of the tokens x, as remember() takes them. The mask then covers
        the visible part of the cache.
        """
        h = self.embedding(x)                                                  # (B, T, C)
        h = h.to(product_dtype(h))             # the residual stream has the dtype of the products
        rope = rope.to(h.dtype)
        caches = caches or [None] * len(self.blocks)
        training = torch.is_grad_enabled()
        for block, cache in zip(self.blocks, caches):
            # compiled in training only: the shapes of generation change and would recompile it
            run = block.forward if self.is_compiled and not training else block
            if self.recompute and training:    # Chen et al. 2016, arXiv:1604.06174
                h = checkpoint(run, h, rope, mask, cache, cu_seqlens, use_reentrant=False,
                               preserve_rng_state=False)       # nothing is random in it
            else:
                h = run(h, rope, mask, cache, cu_seqlens)
        return self.norm(h)

    def logits(self, h, weight=None):
        """The scores of all tokens, (..., V), for hidden states (..., C).

        Training, evaluation, generation and the exams all come here. weight: in place of the
        head's, for the loss, which takes its gradient.
        """
        return F.linear(h, self.head.weight if weight is None else weight)

    def loss(self, h, y, per_token=False):
        """The cross-entropies of hidden states (N, C) and targets (N,): their sum, or each, (N,).

        Some rows at a time: all logits at once, (N, V), would be the largest tensor of a small
        model by far. The backward pass of `per_token` computes them again.
        """
        weight = self.head.weight.to(h.dtype)
        rows = loss_rows(h.device, self.config.vocab_size)
        if torch.is_grad_enabled() and not per_token:
            return ChunkedLoss.apply(h, weight, y, rows, self.nats)
        parts = []
        for hs, ys in zip(h.split(rows), y.split(rows)):
            part = checkpoint(self.nats, hs, weight, ys, "none", use_reentrant=False,
                              preserve_rng_state=False)
            parts.append(part)
        nats = torch.cat(parts)
        return nats if per_token else nats.sum()

    def nats(self, h, weight, y, reduction="sum"):
        """The cross-entropies, float32, of hidden states (n, C) and targets (n,).

        0 where none counts. reduction "none": each, (n,).
        """
        logits = self.logits(h, weight).float()                                # (n, V)
        return F.cross_entropy(logits, y, ignore_index=IGNORE, reduction=reduction)

    def next_logits(self, x, rope, mask, caches):
        """The scores of the token that follows x (B, T), float32 (B, V); the rest as hidden()."""
        h = self.hidden(x, rope, mask, caches)                                 # (B, T, C)
        return self.logits(h[:, -1]).float()

    decode = next_logits                       # for one token of each sequence; may be compiled

    def compile(self):
        """Compile what training runs most: the blocks, once as they are alike, and the loss."""
        torch._dynamo.config.optimize_ddp = False              # or DDP cuts large blocks in two
        for block in self.blocks:
            block.compile()
        self.nats = torch.compile(self.nats)
        self.is_compiled = True

    def compile_generation(self):
        """Compile the step of generate(); on CUDA it is replayed as a graph: fewer launches.

        There one generate() must end before the next begins: they use the same caches.
        """
        self.static_caches = self.norm.weight.is_cuda
        mode = "reduce-overhead" if self.static_caches else None
        self.decode = torch.compile(self.next_logits, mode=mode)

    def has_packed_attention(self, dtype):
        """Whether attend_packed() takes this network, on its device, in this dtype."""
        c = self.config
        option = "window_size" if c.n_heads == c.n_kv_heads else "enable_gqa"
        return (has_flash_attention(self.rope.device)
                and option in packed_options()
                and dtype in (torch.bfloat16, torch.float16)
                and c.head_dim % 8 == 0
                # between these, cards such as RTX 30 and 40 have no backward pass
                and (c.head_dim <= 192 or c.head_dim == 256))

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len):
        """Floating-point operations of one training step per token.

        6 per weight of a matrix product (2 forward, 4 backward; Kaplan et al. 2020,
        arXiv:2001.08361, section 2.1), and 12 H D per layer and token attended to, of which a
        causal row has seq_len / 2 on average.
        """
        c = self.config
        matrices = [p for p in self.blocks.parameters() if p.ndim == 2]
        weights = sum(p.numel() for p in matrices) + c.vocab_size * c.dim
        attended = c.n_layers * c.n_heads * c.head_dim * seq_len // 2
        return 6 * weights + 12 * attended

    def bytes_kept(self, shares=0):
        """Bytes that a process keeps from step to step, if so many share them; 0: as many as do.

        Float32 weights; of those that are trained the gradients (DDP's buckets are the gradients)
        and the moments.
        """
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        numbers = self.n_params() + 3 * trained
        if self.has_muon:
            matrices = [p for p in self.blocks.parameters() if p.requires_grad and p.ndim == 2]
            numbers -= sum(p.numel() for p in matrices)
        return 4 * numbers / (shares or self.shares)

    def bytes_to_train(self, rows, T, dtype, shares=0):
        """Estimate of the peak memory, in bytes, of a training step with `rows` rows of T tokens.

        bytes_kept(); the weights in the dtype of the products; what each block keeps for the
        backward pass; and on top the larger of a block's backward pass and the loss. The factors
        were measured, see the test. Where processes share the model, each gathers the weights of
        two blocks at a time, or all of them, and has the whole gradients of two.
        """
        c, size = self.config, dtype.itemsize
        shares = shares or self.shares
        heads = (c.n_heads + c.n_kv_heads) * c.head_dim
        if self.is_compiled:
            numbers = 4 * c.dim + 3 * heads + 2 * c.hidden_dim
            per_logit = 2 * size
        else:
            numbers = 4 * c.dim + 5 * heads + 4 * c.hidden_dim
            per_logit = 12
        if size < 4 and not self.is_compiled:  # the norms keep copies in float32
            numbers += 4 * c.dim + 2 * heads
        if not self.has_packed_attention(dtype):
            # attention keeps the mask in this dtype and, on CUDA, shared keys for every head
            numbers += T + 2 * (c.n_heads - c.n_kv_heads) * c.head_dim * self.rope.is_cuda
        block = rows * T * numbers * size
        chunk = min(rows * T, loss_rows(self.rope.device, c.vocab_size))
        loss = c.vocab_size * chunk * per_logit
        if self.head.weight.requires_grad:
            loss += c.vocab_size * c.dim * (4 + size)
        total = 0 if self.offloads else self.bytes_kept(shares)
        in_blocks = sum(p.numel() for p in self.blocks.parameters())
        outside = self.n_params() - in_blocks
        is_cut = shares > 1 or self.offloads
        at_once = in_blocks
        if is_cut and not self.keeps_weights:
            at_once = min(in_blocks, 2 * in_blocks // c.n_layers)
        if size < 4 or is_cut:                 # copies for the products
            total += size * (outside + at_once)
        if is_cut:                             # gradients of two blocks, not yet divided
            trained = sum(p.numel() for p in self.blocks.parameters() if p.requires_grad)
            total += (size + 4) * min(trained, 2 * trained // c.n_layers)
        kept = rows * T * c.dim * size if self.recompute else block
        return total + c.n_layers * kept + max(block, loss)


# -----------------------------------------------------------------------------------------------
# the loss

class ChunkedLoss(torch.autograd.Function):
    """nats(h, weight, y) summed over a few rows at a time.

    Each chunk's logits give their share of the loss and of both gradients at once and are dropped,
    so no logits are kept for the backward pass and none are computed twice. The idea is that of
    Hsu et al. 2024 (Liger Kernel), arXiv:2410.10989, section 3.2.
    """

    @staticmethod
    def forward(ctx, h, weight, y, rows, nats):
        total = torch.zeros((), device=h.device)
        trained = ctx.needs_input_grad[1]      # not with LoRA
        weight = weight.detach().requires_grad_(trained)
        dh = torch.empty_like(h)                                               # (N, C)
        dw = None
        if trained:                            # in float32, as there are many chunks
            dw = torch.zeros_like(weight, dtype=torch.float32)                 # (V, C)
        for hs, ys, dhs in zip(h.split(rows), y.split(rows), dh.split(rows)):
            with torch.enable_grad():
                hs = hs.detach().requires_grad_()
                part = nats(hs, weight, ys)
            inputs = (hs, weight) if trained else hs
            dhs[:], *dw_part = torch.autograd.grad(part, inputs)
            if trained:
                dw += dw_part[0]
            total += part.detach()
        ctx.save_for_backward(dh, dw)
        return total

    @staticmethod
    def backward(ctx, scale):
        dh, dw = ctx.saved_tensors
        if dw is not None:
            dw.mul_(scale)
        return dh * scale.to(dh.dtype), dw, None, None, None                   # cast by autograd


def loss_rows(device, vocab_size):
    """Rows of logits at a time, which bounds their memory.

    A CPU wants few, near its cache, a GPU wants work.
    """
    if device.type == "cuda":
        return max(512, min(8192, 2**26 // vocab_size))
    return max(256, min(1024, 2**23 // vocab_size))


# -----------------------------------------------------------------------------------------------
# generation

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
             repetition_penalty=1.0, stop_ids=(), pad_id=0, generator=None):
    """Yield, step by step, the next token of every prompt: B ids, None where a sequence has ended.

    prompts: B lists of ids, of any lengths >= 1, each shorter than max_seq_len (ValueError
    otherwise). A sequence ends with its first stop id (which is yielded) or where the context is
    full. temperature 0 is greedy. Keys and values are kept: the prompts go through the network
    once, then one token of each sequence per step.
    """
    config, device = model.config, model.norm.weight.device
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    if min(lengths) < 1 or longest >= config.max_seq_len:
        raise ValueError(f"prompts of {min(lengths)} to {longest} tokens; each needs at least 1 "
                         f"and fewer than max_seq_len ({config.max_seq_len})")
    # shorter prompts are padded on the left: all sequences then write to the same place
    B = len(prompts)
    pads = [longest - n for n in lengths]
    pad = torch.tensor(pads, device=device)                                    # (B,)
    x = torch.full((B, longest), pad_id, device=device)                        # (B, T)
    seen = torch.zeros(B, config.vocab_size, dtype=torch.bool, device=device)
    for b, prompt in enumerate(prompts):
        x[b, pads[b]:] = torch.tensor(prompt)
        seen[b, x[b, pads[b]:]] = True
    ends = [config.max_seq_len + n for n in pads]              # where the context of each is full
    size = min(max(ends), longest + max_new_tokens)
    caches = empty_caches(model, B, size)
    places = torch.arange(caches[0][0].shape[2], device=device)
    slots = places[:longest]                                   # where the keys and values of x go
    alive = [True] * B
    for length in range(longest, size):
        n_visible = CACHE_STEP * math.ceil(length / CACHE_STEP)
        visible = places[:n_visible]
        mask = cache_mask(visible, slots, pad)                                 # (B, 1, T, S)
        positions = (slots - pad[:, None]).clamp(0, config.max_seq_len - 1)    # (B, T)
        read = model.next_logits if length == longest else model.decode
        layers = [(*cache, slots) for cache in caches]
        logits = read(x, model.rope[:, positions], mask, layers)               # (B, V)
        x = choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator)
        seen.scatter_(1, x, True)
        slots = places[length:length + 1]
        ids = x[:, 0].tolist()
        yield [token if going else None for token, going in zip(ids, alive)]
        alive = [going and token not in stop_ids and length + 1 < end
                 for token, going, end in zip(ids, alive, ends)]
        if not any(alive):
            return


def empty_caches(model, B, size):
    """Room for the keys and values of `size` tokens, for every layer: two (B, K, size, D).

    They keep their place and size, so that a compiled step fits every token. For a CUDA graph,
    which belongs to its caches, they may be larger, and are those of the last answer if they can
    be: what is left in them is never visible.
    """
    c, weight = model.config, model.norm.weight
    if model.static_caches:
        few_sizes = min(2**math.ceil(math.log2(size)), c.max_seq_len)
        size = max(size, few_sizes)            # a padded batch may need more than max_seq_len
        if model.kept_caches:
            n_rows, _, room, _ = model.kept_caches[0][0].shape
            if n_rows == B and room >= size:
                return model.kept_caches
    shape = B, c.n_kv_heads, size, c.head_dim
    caches = []
    for _ in model.blocks:
        keys = torch.zeros(shape, dtype=product_dtype(weight), device=weight.device)
        values = torch.zeros_like(keys)
        if model.static_caches:                # without the mark no graph may write to them
            # guarded, PyTorch 2.6 would compile the network anew for other caches
            torch._dynamo.mark_static_address(keys, guard=False)
            torch._dynamo.mark_static_address(values, guard=False)
        caches.append((keys, values))
    if model.static_caches:
        model.kept_caches = caches
    return caches


def remember(k, v, keys, values, slots, n_visible):
    """Write k and v (B, T, K, D) to the places slots (T,) of a layer's cache.

    Returns its first n_visible places, (B, n_visible, K, D) each.
    """
    keys[:, :, slots] = k.transpose(1, 2)      # not index_copy_, which MPS lacks in PyTorch 2.6
    values[:, :, slots] = v.transpose(1, 2)
    keys = keys[:, :, :n_visible]                                              # (B, K, S, D)
    values = values[:, :, :n_visible]
    return keys.transpose(1, 2), values.transpose(1, 2)


def cache_mask(visible, slots, pad):
    """Which of the visible places (S,) the tokens in the slots (T,) see; bool (B, 1, T, S).

    All that is earlier, but for the first pad (B,) places; padding sees itself, or its softmax
    would be NaN.
    """
    is_text = visible >= pad[:, None, None]                                    # (B, 1, S)
    slots = slots[:, None]                                                     # (T, 1)
    mask = (visible <= slots) & is_text                                        # (B, T, S)
    mask = mask | (visible == slots)
    return mask[:, None]


def choose(logits, seen, temperature, top_k, top_p, repetition_penalty, generator):
    """Draw the next tokens, (B, 1), from logits (B, V).

    seen (B, V) bool marks the tokens of prompt and answer. Repetition penalty: Keskar et al. 2019,
    arXiv:1909.05858, section 4.1. top_p: Holtzman et al. 2019, arXiv:1904.09751, the fewest tokens
    whose probabilities reach top_p.
    """
    if repetition_penalty != 1.0:
        lower = logits / repetition_penalty
        lower = torch.where(logits > 0, lower, logits * repetition_penalty)
        logits = torch.where(seen, lower, logits)
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        k = min(top_k, logits.shape[-1])
        last = logits.topk(k).values[:, -1:]                                   # (B, 1)
        logits = logits.masked_fill(logits < last, -math.inf)
    p = logits.softmax(-1)                                                     # (B, V)
    if top_p == 1:
        return torch.multinomial(p, 1, generator=generator)
    p, order = likeliest(p, top_p)                                             # (B, k), falling
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, drawn)


def likeliest(p, top_p):
    """The largest probabilities of p (B, V), falling, and their ids: as many as reach top_p."""
    few = p.topk(min(512, p.shape[-1]))        # usually enough, and faster than sorting all
    if few.values.sum(-1).min() >= top_p:
        return few
    return p.sort(descending=True)
