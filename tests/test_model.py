"""model.py against transformers, torch's own functions, and loops that take the long way."""
import itertools
import math
from dataclasses import fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as models
import optim
from conftest import ROOT, run
from model import IGNORE, Model, ModelConfig, choose, generate
from optim import Muon, make_optimizers, orthogonalize

TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, max_seq_len=64)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiny(vocab_size=97, **options):
    """A small network with weights large enough to matter, vectors and biases included."""
    torch.manual_seed(0)
    model = Model(ModelConfig(vocab_size, **{**TINY, **options}))
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return model


def rows(*shape, vocab_size=97):
    return torch.randint(vocab_size, shape, generator=seeded(1))


# ---- the network ---------------------------------------------------------------------------------

THEIR_NAMES = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
}
THEIR_NAMES_IN_A_BLOCK = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}


def like_transformers(kind, config, weights):
    """The network of `transformers` of that kind, with these weights under its names."""
    import transformers
    shape = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        rms_norm_eps=config.norm_eps,
        intermediate_size=config.hidden_dim,
        max_position_embeddings=config.max_seq_len,
        rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta),
        tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager",
    )
    if kind != "Qwen2":
        shape.update(head_dim=config.head_dim, attention_bias=False)
    their_config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(their_config).eval()
    names = dict(THEIR_NAMES)
    for i in range(config.n_layers):
        for our_name, name in THEIR_NAMES_IN_A_BLOCK.items():
            names[f"blocks.{i}.{our_name}"] = f"model.layers.{i}.{name}"
    renamed = {}
    for name, w in weights.items():
        layer, _, part = name.rpartition(".")
        renamed[f"{names[layer]}.{part}"] = w
    theirs.load_state_dict(renamed)
    return theirs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("Llama", {}),
        ("Llama", dict(n_kv_heads=4, rope_theta=5e5)),
        ("Llama", dict(n_kv_heads=1, norm_eps=1e-3)),
        ("Qwen2", dict(qkv_bias=True)),
        ("Qwen3", dict(qk_norm=True, head_dim=12)),
    ],
)
def test_logits_are_those_of_transformers(kind, options, tied):
    model = tiny(tie_embeddings=tied, **options)
    theirs = like_transformers(kind, model.config, model.state_dict())
    x = rows(3, 50)
    with torch.no_grad():
        ours = model(x)
        expected = theirs(x).logits
    assert expected.std() > 1  # there is something to agree about
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_frequencies_of_llama3_are_those_of_its_rule():
    scaling = dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=256,
    )
    shape = dict(dim=128, n_heads=2, max_seq_len=4, rope_theta=5e5, rope_scaling=scaling)
    table = models.rope_table(ModelConfig(97, **shape))
    plain = [5e5 ** (-i / 64) for i in range(0, 64, 2)]
    expected = []
    for f in plain:
        turns = 256 * f / (2 * math.pi)  # in the original context
        smooth = (turns - 1) / 3
        if turns > 4:
            expected.append(f)
        elif turns < 1:
            expected.append(f / 8)
        else:
            expected.append((1 - smooth) * f / 8 + smooth * f)
    assert len({a / b for a, b in zip(expected, plain)}) > 3  # all three cases
    torch.testing.assert_close(table[0, 1, 0, :32], torch.tensor(expected).cos())
    torch.testing.assert_close(table[1, 1, 0, 32:], torch.tensor(expected).sin())


def test_packed_documents_do_not_see_each_other():
    model = tiny(qk_norm=True)
    x = rows(3, 20)
    # among the documents are a single token, a whole row, and the last token of the batch
    starts = torch.tensor([0, 7, 8, 20, 40, 41, 59, 60], dtype=torch.int32)
    with torch.no_grad():
        packed = model(x, cu_seqlens=starts).flatten(0, 1)
        blind = model(x).flatten(0, 1)
        for a, b in zip(starts, starts[1:]):
            alone = model(x.flatten()[None, a:b])[0]
            torch.testing.assert_close(packed[a:b], alone, rtol=1e-5, atol=1e-5)
            assert torch.allclose(blind[a:b], alone, atol=1e-3) == (a % 20 == 0)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(dim=30, n_heads=4, n_kv_heads=4), "must divide dim"),
        (dict(n_heads=6, n_kv_heads=4, dim=36), "must divide n_heads"),
        (dict(dim=12, n_heads=4), "even"),
        (dict(n_layers=0), "n_layers"),
        (dict(dim=-32), "dim"),
        (dict(n_heads=0), "n_heads"),
        (dict(n_kv_heads=-2), "n_kv_heads"),
        (dict(max_seq_len=0), "max_seq_len"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(hidden_dim=-64), "hidden_dim"),
        (dict(head_dim=-4), "head_dim"),
        (dict(rope_theta=0.0), "rope_theta"),
        (dict(rope_theta=-1.0), "rope_theta"),
    ],
)
def test_a_shape_that_cannot_work_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ModelConfig(**{"vocab_size": 97, **TINY, **options})


def test_weights_of_another_shape_are_refused():
    model = tiny()
    for shape in (
        dict(n_layers=3),
        dict(n_layers=1),
        dict(qk_norm=True),
        dict(dim=64),
        dict(n_kv_heads=4),
    ):
        other = {**vars(model.config), "head_dim": 0, **shape}
        with pytest.raises(RuntimeError):
            Model.from_state(other, model.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(tie_embeddings=False, n_kv_heads=4),
        dict(qk_norm=True, head_dim=12),
    ],
)
def test_flops_are_those_that_torch_counts(options):
    model = tiny(**options)
    B, T = 3, 64
    x, y = rows(B, T), rows(B, T)
    # the counter does not see fused attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, y).backward()
    c = model.config
    # torch counts all T x T scores, flops_per_token only the causal half
    other_half = 6 * c.n_layers * c.n_heads * c.head_dim * T
    assert counter.get_total_flops() == B * T * (model.flops_per_token(T) + other_half)


@pytest.mark.parametrize(
    "options", [dict(tie_embeddings=False), dict(qkv_bias=True, qk_norm=True)]
)
def test_initial_weights_have_the_deviation_of_gpt2(options):
    """0.02, and for what is added to the residual stream 0.02 / sqrt(2 n_layers)."""
    torch.manual_seed(0)
    model = Model(ModelConfig(2000, dim=64, n_layers=8, n_heads=4, **options))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.full_like(p, float("norm" in name))), name
            continue
        is_residual = name.endswith(("attention.wo.weight", "ffn.w2.weight"))
        expected = 0.02 / 4 if is_residual else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.04), name
        assert abs(p.mean().item()) < 0.05 * expected, name


def peak_of_a_step(model, rows, T, dtype):
    """Bytes at the peak of a step of two rounds with its update, as the profiler sees them."""
    optimizers = make_optimizers(model, 1e-3, 1e-3, 0.1, str(dtype).removeprefix("torch."))
    x, y = (torch.randint(model.config.vocab_size, (rows, T)) for _ in range(2))
    starts = torch.arange(0, rows * T + 1, T // 4, dtype=torch.int32)

    def step():
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(x, y, starts)
            (loss / x.numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(profile_memory=True, activities=activities) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events))
    kept = [*model.parameters()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            kept += state.values()
    return sum(t.numel() * t.element_size() for t in kept) + peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "V, dim, n_layers, T, rows",
    [
        (1000, 256, 4, 128, 4),
        (8192, 128, 2, 256, 4),
    ],
)
def test_the_estimate_of_memory_is_right_within_15_percent(V, dim, n_layers, T, rows, dtype):
    """The first is mostly weights and blocks, the second mostly the loss.

    Without the moments, a quarter would be missing.
    """
    model = Model(ModelConfig(V, dim, n_layers, 2, max_seq_len=T, qk_norm=True))
    estimate = model.bytes_to_train(rows, T, dtype)
    assert peak_of_a_step(model, rows, T, dtype) == pytest.approx(estimate, rel=0.15)


# ---- the loss ------------------------------------------------------------------------------------

def some_targets(B, T):
    """Targets in uneven numbers.

    Most of the first row, none of the second, one of the third, the rest by chance.
    """
    y = rows(B, T)
    y[torch.rand(B, T, generator=seeded(2)) < 0.4] = IGNORE
    y[1] = IGNORE
    y[2, 1:] = IGNORE
    y[2, 0] = 5
    return y


def naive_loss(model, x, y, dtype=torch.float32):
    """Cross entropy on all logits at once, summed over the targets."""
    logits = model(x).flatten(0, 1).to(dtype)
    return F.cross_entropy(logits, y.flatten(), reduction="sum", ignore_index=IGNORE)


def loss_and_gradients(model, x, y, loss_of):
    model.zero_grad()
    loss = loss_of(x, y)
    (loss * 0.37).backward()  # a scale that is not 1, as in training
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk", [256, 7, 1])  # 4 x 13 = 52 tokens: one chunk, 7 x 7 + 3, each
def test_loss_and_gradients_are_those_of_cross_entropy_on_all_logits(monkeypatch, tied, chunk):
    monkeypatch.setattr(models, "loss_rows", lambda device, vocab_size: chunk)
    model = tiny(tie_embeddings=tied, qkv_bias=True, qk_norm=True)
    x = rows(4, 13)
    y = some_targets(4, 13)
    long_way = partial(naive_loss, model, dtype=torch.float64)
    loss, gradients = loss_and_gradients(model, x, y, model)
    expected, expected_gradients = loss_and_gradients(model, x, y, long_way)
    assert loss.dtype == torch.float32
    assert expected > 50
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for name, expected in expected_gradients.items():
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=atol, msg=name)


def test_the_loss_of_no_targets_is_zero_and_moves_nothing():
    model = tiny()
    no_targets = torch.full((2, 9), IGNORE)
    loss, gradients = loss_and_gradients(model, rows(2, 9), no_targets, model)
    assert loss == 0
    assert not any(g.any() for g in gradients.values())


def test_loss_and_gradients_in_bfloat16_stay_close_to_float32():
    model = tiny(qk_norm=True, tie_embeddings=False)
    x = rows(4, 13)
    y = some_targets(4, 13)
    long_way = partial(naive_loss, model)
    expected, expected_gradients = loss_and_gradients(model, x, y, long_way)

    def rounded(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x, y)

    loss, gradients = loss_and_gradients(model, x, y, rounded)
    assert loss.dtype == torch.float32
    assert loss != expected  # it was in bfloat16
    assert abs(loss / expected - 1) < 0.02
    for name, expected in expected_gradients.items():
        assert gradients[name].dtype == torch.float32
        assert (gradients[name] - expected).norm() < 0.1 * expected.norm(), name


def test_many_chunks_in_bfloat16_add_up_in_float32():
    """A sum in bfloat16 would be wrong by 2 per cent."""
    model, random = tiny(), seeded(8)
    h = torch.randn(2000, 32, generator=random).bfloat16()
    w = torch.randn(97, 32, generator=random).bfloat16()
    y = torch.randint(5, (2000,), generator=random)
    expected = w.float().requires_grad_()
    F.cross_entropy(h.float() @ expected.T, y, reduction="sum").backward()
    w.requires_grad_()
    models.ChunkedLoss.apply(h, w, y, 1, model.nats).backward()
    assert (w.grad.float() - expected.grad).norm() < 0.01 * expected.grad.norm()


@pytest.mark.parametrize("device, numbers, rows", [("cpu", 2**23, 256), ("cuda", 2**26, 512)])
@pytest.mark.parametrize("V", [400, 4096, 16_384, 65_536, 151_936])
def test_the_logits_at_a_time_are_bounded_for_any_vocabulary(device, numbers, rows, V):
    n = models.loss_rows(torch.device(device), V)
    assert rows <= n
    assert n * V <= max(numbers, rows * V)


# ---- generation ----------------------------------------------------------------------------------

def greedy(model, prompt, n, stop_ids=()):
    """The same without a cache: the whole text again for each token."""
    answer = []
    room = model.config.max_seq_len - len(prompt)
    while len(answer) < min(n, room):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))
        answer.append(logits[0, -1].argmax().item())
        if answer[-1] in stop_ids:
            break
    return answer


def answers(model, prompts, n, **how):
    """generate() as one list of ids for each prompt; nothing may follow the end of a sequence."""
    found = []
    for column in zip(*generate(model, prompts, n, **{"temperature": 0, **how})):
        end = column.index(None) if None in column else len(column)
        assert all(token is None for token in column[end:])
        found.append(list(column[:end]))
    return found


PROMPTS = [
    [3],
    [5, 6, 7, 8, 9, 10, 11],
    [90, 2],
    [5, 6, 7, 8, 9, 10, 11, 12],
]


@pytest.mark.parametrize(
    "options",
    [
        dict(qk_norm=True),
        dict(n_kv_heads=4, qkv_bias=True, tie_embeddings=False),
    ],
)
def test_greedy_generation_is_that_without_a_cache_alone_and_in_a_batch(options):
    model = tiny(**options)
    expected = [greedy(model, prompt, 30) for prompt in PROMPTS]
    assert len({tuple(e[:5]) for e in expected}) == len(PROMPTS)  # they do differ
    assert [answers(model, [prompt], 30)[0] for prompt in PROMPTS] == expected
    assert answers(model, PROMPTS, 30) == expected
    assert answers(model, PROMPTS, 30, pad_id=17) == expected  # padding is not seen


def test_a_compiled_step_generates_the_same_beyond_the_first_places_of_the_cache(monkeypatch):
    monkeypatch.setattr(models, "CACHE_STEP", 16)
    model = tiny(n_kv_heads=2, qk_norm=True)
    expected = answers(model, PROMPTS, 40)
    sizes = []
    model.compile_generation()
    compiled = model.decode

    def decode(*inputs):
        sizes.append(inputs[2].shape[-1])
        return compiled(*inputs)

    model.decode = decode
    assert answers(model, PROMPTS, 40) == expected
    assert len(set(sizes)) >= 3
    assert len(sizes) == max(map(len, expected)) - 1


def test_the_caches_of_a_cuda_graph_are_marked_as_static():
    """Without the mark CUDA graphs are skipped, as the step writes to its inputs."""
    model = tiny()
    for model.static_caches in (False, True):
        caches = models.empty_caches(model, 1, 4)
        tensors = [t for cache in caches for t in cache]
        marks = [hasattr(t, "_dynamo_static_input_type") for t in tensors]
        assert marks == [model.static_caches] * 2 * TINY["n_layers"]


def test_answers_in_kept_caches_are_those_in_new_ones():
    model = tiny(n_kv_heads=2, qk_norm=True)
    expected = answers(model, PROMPTS, 30)
    model.static_caches = True
    places = []
    for prompts, n in ((4, 30), (4, 5), (4, 30), (1, 30), (1, 5)):
        assert answers(model, PROMPTS[:prompts], n) == [e[:n] for e in expected[:prompts]]
        places.append(model.kept_caches[0][0].data_ptr())
    assert places[0] == places[1] == places[2] and places[3] == places[4]


def test_a_padded_batch_in_kept_caches_may_need_more_than_the_context():
    model = tiny()
    prompts = [[5], list(range(5, 5 + 20))]
    expected = answers(model, prompts, 100)
    model.static_caches = True
    assert answers(model, prompts, 100) == expected
    assert len(expected[0]) == TINY["max_seq_len"] - 1 and len(expected[0]) > len(expected[1])


OTHER = dict(
    vocab_size=98,
    dim=64,
    n_layers=3,
    n_heads=8,
    n_kv_heads=4,
    head_dim=12,
    hidden_dim=64,
    max_seq_len=48,
    rope_theta=100.0,
    norm_eps=0.5,
    tie_embeddings=False,
    qk_norm=True,
    qkv_bias=True,
    rope_scaling=dict(
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
)


@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig)])
def test_every_field_changes_training_and_generation_alike(name):
    """Finds a field that the forward pass, the loss or cached generation ignores, a new one too."""
    base = tiny()
    other = tiny(**{name: OTHER[name]})
    x = rows(2, 30)
    y = some_targets(3, 30)[[0, 2]]
    with torch.no_grad():
        before, expected = (naive_loss(model, x, y) for model in (base, other))
        assert torch.isclose(other(x, y), expected, rtol=1e-5)
    # with gradients the loss takes another code path
    assert torch.isclose(other(x, y).detach(), expected, rtol=1e-5)
    assert answers(other, PROMPTS, 60) == [greedy(other, prompt, 60) for prompt in PROMPTS]
    # some fields change the scores but not which is the highest, so the scores are compared
    prompt = PROMPTS[1]
    base_scores, scores = (scores_of_generation(model, prompt, 60) for model in (base, other))
    text = prompt + scores.argmax(-1).tolist()
    with torch.no_grad():
        whole = other(torch.tensor([text]))[0, len(prompt) - 1 : -1]
    torch.testing.assert_close(scores, whole, rtol=1e-3, atol=1e-3)
    if base_scores.shape == scores.shape:
        assert not torch.allclose(base_scores, scores, rtol=1e-3)
    assert name == "max_seq_len" or not torch.isclose(before, expected, rtol=1e-4)


def scores_of_generation(model, prompt, n):
    """The logits from which generate() takes each token of one greedy answer, (n, V)."""
    read, found = model.next_logits, []

    def recorded(*inputs):
        found.append(read(*inputs))
        return found[-1]

    model.next_logits = model.decode = recorded
    list(generate(model, [prompt], n, temperature=0))
    return torch.cat(found)


def test_the_logits_are_computed_in_one_place(monkeypatch):
    """A soft cap put there reaches the loss, its gradients, evaluation and generation.

    The cap is that of Gemma 2, arXiv:2408.00118.
    """
    plain = Model.logits
    capped = lambda self, h, weight=None: 3 * torch.tanh(plain(self, h, weight) / 3)
    monkeypatch.setattr(Model, "logits", capped)
    model = tiny()
    x = rows(4, 13)
    y = some_targets(4, 13)
    assert model(x).abs().max() <= 3
    loss, gradients = loss_and_gradients(model, x, y, model)
    long_way = partial(naive_loss, model)
    expected, expected_gradients = loss_and_gradients(model, x, y, long_way)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-3)
    assert torch.isclose(model(x, y).detach(), expected, rtol=1e-5)
    found = []

    def decode(*inputs):
        found.append(model.next_logits(*inputs))
        return found[-1]

    model.decode = decode
    assert answers(model, PROMPTS, 9) == [greedy(model, prompt, 9) for prompt in PROMPTS]
    assert max(logits.abs().max() for logits in found) <= 3


def test_a_stop_id_ends_its_own_sequence_only_and_is_the_last_token():
    model = tiny(qk_norm=True)
    free = [greedy(model, prompt, 20) for prompt in PROMPTS]
    stop_ids = {free[0][4], free[1][9]}
    expected = [greedy(model, prompt, 20, stop_ids) for prompt in PROMPTS]
    assert len(expected[0]) <= 5
    assert expected[0][-1] in stop_ids
    assert len(set(map(len, expected))) > 1
    assert answers(model, PROMPTS, 20, stop_ids=stop_ids) == expected
    steps = list(generate(model, PROMPTS[:1], 20, temperature=0, stop_ids=stop_ids))
    assert len(steps) == len(expected[0])  # no step for nothing once all have ended


def test_generation_ends_where_the_context_is_full():
    model = tiny(max_seq_len=20)
    expected = greedy(model, [5, 6, 7], 100)
    assert len(expected) == 17
    assert answers(model, [[5, 6, 7]], 100) == [expected]
    assert len(answers(model, [[1] * 19], 100)[0]) == 1
    for prompt in ([1] * 20, [1] * 21, []):
        with pytest.raises(ValueError, match="tokens"):
            list(generate(model, [[1], prompt], 1))


def test_a_long_neighbour_does_not_shorten_an_answer():
    model = tiny(max_seq_len=20)
    prompts = [[5], [6] * 18, [7, 8, 9]]
    assert answers(model, prompts, 12) == [greedy(model, prompt, 12) for prompt in prompts]


def naive_distribution(logits, temperature, top_k, top_p):
    """Token by token, in plain Python."""
    highest = max(logits)
    weights = [math.exp((logit - highest) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    order = order[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weights[i] / total
    total = sum(weights[i] for i in kept)
    return {i: weights[i] / total for i in kept}


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 1, 1.0),
        (1.0, 99, 1.0),
        (1.0, 0, 0.7),
        (1.0, 0, 0.01),
        (0.7, 5, 0.8),
        (2.0, 4, 0.9),
    ],
)
def test_draws_follow_the_naive_distribution(temperature, top_k, top_p):
    n = 20_000
    logits = torch.randn(12, generator=seeded(3)) * 2
    seen = torch.zeros(n, 12, dtype=torch.bool)
    drawn = choose(logits.expand(n, -1), seen, temperature, top_k, top_p, 1.0, seeded(4))
    assert drawn.shape == (n, 1)
    counts = drawn.flatten().bincount(minlength=12).tolist()
    expected = naive_distribution(logits.tolist(), temperature, top_k, top_p)
    assert {i for i, count in enumerate(counts) if count} <= set(expected)
    for i, p in expected.items():
        deviation = math.sqrt(n * p * (1 - p))
        assert abs(counts[i] - n * p) <= 5 * deviation + 1e-6, (i, p, counts[i] / n)


def test_top_p_takes_more_than_the_few_likeliest_tokens_where_they_do_not_reach_it():
    n = 4000
    logits = torch.linspace(0, 0.1, 2000)
    seen = torch.zeros(n, 2000, dtype=torch.bool)
    drawn = choose(logits.expand(n, -1), seen, 1.0, 0, 0.9, 1.0, seeded(4))
    kept = len(naive_distribution(logits.tolist(), 1.0, 0, 0.9))
    assert 2000 - kept <= drawn.min() < 2000 - kept + 20
    assert drawn.max() > 1980


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor
    for seed in range(200):
        random = seeded(seed)
        # the largest is above zero or below it
        logits = torch.randn(4, 10, generator=random) - seed % 2 * 3
        ids = torch.randint(10, (4, 6), generator=random)
        seen = torch.zeros(4, 10, dtype=torch.bool).scatter_(1, ids, True)
        for penalty in (1.3, 0.8):
            theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
            expected = theirs.argmax(-1, keepdim=True)
            assert torch.equal(choose(logits, seen, 0, 0, 1.0, penalty, None), expected)


def test_the_penalty_counts_the_prompt_and_the_answer_of_each_sequence_alone():
    model = tiny(vocab_size=23)
    prompts = [[3], [4, 5, 6]]
    found = answers(model, prompts, 18, repetition_penalty=1e9)
    for prompt, answer in zip(prompts, found):
        text = prompt + answer
        assert len(set(text)) == len(text)  # no token comes twice while an unused one is left


def test_the_same_seed_draws_the_same_and_another_does_not():
    draw = lambda seed: answers(tiny(), PROMPTS, 20, temperature=1.0, generator=seeded(seed))
    assert draw(1) == draw(1) != draw(2)


# ---- optimizers ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 24, 64), (2, 64, 24), (1, 32, 33)])
def test_orthogonalize_keeps_the_directions_and_makes_the_singular_values_about_1(shape):
    g = torch.randn(shape, generator=seeded(5), dtype=torch.float64)
    decomposed = torch.linalg.svd(g, full_matrices=False)
    for one, u, s, vt in zip(orthogonalize(g * 1e-3), *decomposed):
        inside = u.T @ one @ vt.T  # U f(S) V^T: diagonal in the basis of g
        values = inside.diagonal()
        torch.testing.assert_close(inside, values.diag(), rtol=0, atol=1e-6)
        # five steps do not lift the very smallest
        big = values[s > 0.05 * s.norm() / math.sqrt(len(s))]
        assert len(big) >= len(s) - 1
        assert big.min() > 0.6
        assert big.max() < 1.3


def naive_muon(p, gradients, lr, momentum, weight_decay):
    """Jordan's Muon on one matrix, in loops over it; scale and decay as in Liu et al. 2025."""
    buffer = torch.zeros_like(p)
    for g in gradients:
        buffer = momentum * buffer + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * buffer
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            cubed = x @ x.T @ x
            x = 3.4445 * x - 4.7750 * cubed + 2.0315 * cubed @ x.T @ x
        p = p * (1 - lr * weight_decay) - lr * 0.2 * max(p.shape) ** 0.5 * x
    return p


@pytest.mark.parametrize("batches", [1, 2, 8])
def test_muon_is_the_naive_one_on_each_matrix(monkeypatch, batches):
    monkeypatch.setattr(optim, "MUON_BATCHES", batches)
    random = seeded(6)
    shapes = (8, 20), (20, 8), (8, 20), (12, 12), (20, 8)
    start = [torch.randn(shape, generator=random) for shape in shapes]
    gradients = [
        [torch.randn(shape, generator=random) for _ in range(4)]
        for shape in shapes
    ]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = Muon(params, lr=0.1, weight_decay=0.3)  # momentum: the default
    for step in range(4):
        for p, g in zip(params, gradients):
            p.grad = g[step].clone()
        optimizer.step()
    for p, at, g in zip(params, start, gradients):
        expected = naive_muon(at, g, 0.1, 0.9, 0.3)
        torch.testing.assert_close(p.data, expected, rtol=1e-4, atol=1e-4)
        assert (p - at).abs().max() > 0.1


SHARED_MUON = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.distributed as dist
import runtime
from optim import Muon
if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
for dtype in (torch.float32, torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=random))
              for shape in [(16, 48), (48, 16), (24, 24)] * 6 + [(48, 16)]]
    optimizer = Muon(params, lr=0.1, weight_decay=0.1, dtype=dtype)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    if not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1:
        print([p.double().sum().item().hex() for p in params])
if dist.is_initialized():
    dist.destroy_process_group()               # PyTorch 2.14 may abort at the end without
    runtime.end_at_once(0)                     # and 2.6 hang
"""


def test_any_number_of_processes_shares_the_work_of_muon_and_gets_the_same_bits(tmp_path):
    script = tmp_path / "muon.py"
    script.write_text(SHARED_MUON, encoding="utf-8")
    bits = []
    for processes in (0, 2, 3):
        done = run(script, tmp_path, torchrun=processes)
        assert done.rc == 0, done.err
        bits.append([line for line in done.out.splitlines() if line.startswith("['")])
    assert bits[0] == bits[1] == bits[2]
    assert len(bits[0]) == 2


@pytest.mark.parametrize("muon_lr", [0, 0.02])
@pytest.mark.parametrize(
    "options", [dict(qkv_bias=True, qk_norm=True), dict(tie_embeddings=False)]
)
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(options, muon_lr):
    model = tiny(**options)
    optimizers = make_optimizers(model, 0.01, muon_lr, 0.5)
    placed, muon = [], set()
    for optimizer in optimizers:
        is_muon = isinstance(optimizer, Muon)
        for group in optimizer.param_groups:
            ids = [id(p) for p in group["params"]]
            placed += ids
            muon.update(ids if is_muon else [])
            assert group["peak_lr"] == (muon_lr if is_muon else 0.01)
            for p in group["params"]:
                assert group["weight_decay"] == (0.5 if p.ndim == 2 else 0.0)
    assert sorted(placed) == sorted(map(id, model.parameters()))
    inside = {id(p) for p in model.blocks.parameters() if p.ndim == 2}
    assert muon == (inside if muon_lr else set())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():  # with gradients of 0 only the decay moves weights
        p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        lr = muon_lr if id(p) in muon else 0.01
        decay = 1 - lr * 0.5 if p.ndim == 2 else 1
        torch.testing.assert_close(p.data, before[name] * decay, rtol=1e-6, atol=1e-7)
