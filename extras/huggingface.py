"""Llama, Mistral, Qwen2 and Qwen3 folders of Hugging Face: their names and numbers <-> ours.

What a folder wants and model.py does not compute exactly is refused by name, never approximated.
"""
import os

import torch

import checkpoints
import tokenizer as tokenizers
from model import Model, ModelConfig

NAMES = {
    "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj"}
KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",      # by model_type
         "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# What these classes can also do, and the values with which they do not. They ignore the rest.
PLAIN = {
    "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False], "pretraining_tp": [1],
    "use_sliding_window": [False], "quantization_config": [], "auto_map": [],
    "partial_rotary_factor": [1]}
SHAPE = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
# The types of what is read, where it is there.
TYPES = {
    **dict.fromkeys(SHAPE.values(), int), "rms_norm_eps": float, "model_type": str,
    "architectures": list, "layer_types": list, "num_key_value_heads": int, "head_dim": int,
    "rope_theta": float, "rope_scaling": dict, "rope_parameters": dict,
    "original_max_position_embeddings": int}
IN_WORDS = {int: "a whole number", float: "a number", str: "a text", list: "a list",
            dict: "an object"}
ROPE = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor"), float),
    "original_max_position_embeddings": int}


def their_name(name):
    """blocks.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    if name.startswith("blocks."):
        _, layer, name = name.split(".", 2)
        module, kind = name.rsplit(".", 1)
        return f"model.layers.{layer}.{NAMES[module]}.{kind}"
    module, kind = name.rsplit(".", 1)
    return f"{NAMES[module]}.{kind}"


def read_folder(path, tokenizer=""):
    """A Hugging Face folder as (ModelConfig, float32 weights by our names, Tokenizer, is_chat).

    tokenizer: another one than the folder's. Raises SystemExit with one sentence for what is
    missing, broken, or not computed here.
    """
    config = tokenizers.read_json(f"{path}/config.json")
    if not config:
        raise SystemExit(f"{path}: a folder without config.json; name a Hugging Face folder")
    shape = read_shape(f"{path}/config.json", config)
    tok = tokenizers.load(tokenizer or path)
    used = [id for id, piece in enumerate(tok.pieces) if piece]
    turns = [{"role": role, "content": ""} for role in ("system", "user")]
    marks = tok.prompt(turns) if tok.template else []
    largest = max(tok.bos_id, *tok.stop_ids, *used, *marks)
    if largest >= shape.vocab_size:
        raise SystemExit(f"{path}: its tokenizer has token {largest}, but the model embeds "
                         f"{shape.vocab_size:,}")
    return shape, read_weights(path, shape), tok, is_chat(path, config, tok)


def is_chat(path, config, tok):
    """Whether it is a chat model: one that ends generation with the token that ends a turn.

    Where this token also ends documents, a chat model is one that has a chat template.
    """
    if tok.template is None:
        print(f"{path}: its chat template is not known here, so it is imported as a model that "
              "continues texts")
        return False
    generation = tokenizers.read_json(f"{path}/generation_config.json")
    ends = []
    for end in generation.get("eos_token_id"), config.get("eos_token_id"):
        ends += end if isinstance(end, list) else [end]
    has_template = bool(tokenizers.chat_template(tok.name))
    return tok.end_id in ends and (tok.end_id != tok.eos_id or has_template)


def read_shape(path, config):
    """config.json -> ModelConfig; SystemExit names what is missing in it or not computed here."""
    check_types(path, config, TYPES)
    kind = config.get("model_type")
    if kind not in KINDS or (config.get("architectures") or [KINDS[kind]]) != [KINDS[kind]]:
        raise SystemExit(f"{path}: model_type {kind}, architectures {config.get('architectures')}: "
                         f"only {', '.join(KINDS.values())} are read")
    for name, values in PLAIN.items():
        if config.get(name) is not None and config[name] not in values:
            raise SystemExit(f"{path}: {name} is {config[name]}, which is not computed here")
    for layer_type in config.get("layer_types") or []:
        if layer_type != "full_attention":
            raise SystemExit(f"{path}: layer_types has {layer_type}, which is not computed here")
    if kind == "mistral" and config.get("sliding_window", 4096) is not None:    # its default
        raise SystemExit(f"{path}: sliding_window is not null, and that is not computed here")
    missing = [theirs for theirs in SHAPE.values() if config.get(theirs) is None]
    if missing:
        raise SystemExit(f"{path}: {', '.join(missing)} missing")
    if config["max_position_embeddings"] > 1 << 24:
        raise SystemExit(f"{path}: max_position_embeddings is {config['max_position_embeddings']}, "
                         "more than 16,777,216")
    rope_theta, rope_scaling = read_rope(path, config)
    try:
        return ModelConfig(
            **{ours: config[theirs] for ours, theirs in SHAPE.items()},
            n_kv_heads=config.get("num_key_value_heads") or 0,
            head_dim=config.get("head_dim") or 0, rope_theta=rope_theta, rope_scaling=rope_scaling,
            tie_embeddings=bool(config.get("tie_word_embeddings")), qk_norm=kind == "qwen3",
            qkv_bias=kind == "qwen2")
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None


def check_types(path, table, kinds):
    """SystemExit for the first value that is of another type than `kinds` says; None is absent."""
    present = {name: kind for name, kind in kinds.items() if table.get(name) is not None}
    if wrong := checkpoints.has(table, present):
        raise SystemExit(f"{path}: {wrong} is {table[wrong]!r}, not {IN_WORDS[kinds[wrong]]}")


def read_rope(path, config):
    """(rope_theta, rope_scaling): from rope_parameters since transformers 5, or two entries."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    is_partial = rope.get("partial_rotary_factor", 1) != 1
    is_nested = any(isinstance(value, (dict, list)) for value in rope.values())
    if not isinstance(kind, str) or kind not in ("default", "llama3") or is_partial or is_nested:
        raise SystemExit(f"{path}: rotary positions {rope}, which are not computed here; only "
                         "default and llama3 are")
    check_types(path, rope, ROPE)
    thetas = rope.get("rope_theta"), config.get("rope_theta"), 10_000.0
    theta = next(theta for theta in thetas if theta is not None)
    if kind == "default":
        return theta, None
    name = "original_max_position_embeddings"
    original = config.get(name, rope.get(name)) or config["max_position_embeddings"]
    factors = "factor", "low_freq_factor", "high_freq_factor"
    return theta, {**{factor: rope.get(factor) or 0 for factor in factors}, name: original}


def read_weights(path, shape):
    """The safetensors of a folder as the state_dict of Model(shape), float32.

    Raises SystemExit unless they are just those.
    """
    theirs = read_tensors(path)
    if shape.n_layers > len(theirs):
        raise SystemExit(f"{path}: config.json describes {shape.n_layers} layers, but there are "
                         f"only {len(theirs)} weights")
    if shape.tie_embeddings and "model.embed_tokens.weight" in theirs:
        theirs.setdefault("lm_head.weight", theirs["model.embed_tokens.weight"])
    with torch.device("meta"):                                # names and sizes, no memory
        state = Model(shape).state_dict()
    expected = {their_name(name): (name, list(w.shape)) for name, w in state.items()}
    wrong = [f"{name} missing" for name in expected.keys() - theirs.keys()]
    for name, w in theirs.items():
        _, size = expected.get(name, ("", None))
        if size is None:
            wrong.append(f"{name} not expected")
        elif list(w.shape) != size:
            wrong.append(f"{name} {list(w.shape)} instead of {size}")
        if w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            wrong.append(f"{name} in {w.dtype}")
    if shape.tie_embeddings and not wrong:
        head = theirs.pop("lm_head.weight")
        if not head.equal(theirs["model.embed_tokens.weight"]):
            wrong.append("lm_head.weight unlike model.embed_tokens.weight, which config.json ties")
    if wrong:
        more = f" and {len(wrong) - 3} more" * (len(wrong) > 3)
        raise SystemExit(f"{path}: weights that config.json does not describe: "
                         f"{', '.join(sorted(wrong)[:3])}{more}")
    weights = {}
    for name, (ours, _) in expected.items():
        if name in theirs:
            weights[ours] = theirs.pop(name).float()          # two copies of one at a time
    if shape.tie_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    return weights


def read_tensors(path):
    """{name: tensor} of all safetensors of a folder; SystemExit if one is missing or broken."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise SystemExit(f"{path}: pip install safetensors to read its weights") from None
    index = tokenizers.read_json(f"{path}/model.safetensors.index.json")
    files = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    tensors = {}
    for file in files:
        if not os.path.exists(f"{path}/{file}"):
            raise SystemExit(f"{path}/{file}: not there; only safetensors are read, all of them "
                             "must be in the folder")
        try:
            with safe_open(f"{path}/{file}", framework="pt") as f:
                tensors |= {name: f.get_tensor(name) for name in f.keys()}
        except SafetensorError as error:
            raise SystemExit(f"{path}/{file}: not whole ({error}); download it again") from None
    # old folders hold a table that follows from rope_theta
    return {name: w for name, w in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
