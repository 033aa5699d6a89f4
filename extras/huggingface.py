"""Llama, Qwen2 and Qwen3 folders of Hugging Face: their names and numbers <-> ours.

What a folder asks for and model.py does not compute exactly is refused by name, never loaded approximately.
"""
import os

import torch

import tokenizer as tokenizers
from model import Model, ModelConfig

NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "attention.q_norm": "self_attn.q_norm",
         "attention.k_norm": "self_attn.k_norm", "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj",
         "ffn.w3": "mlp.up_proj"}
KINDS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}    # by model_type
# What these classes can also do, and the values with which they do not; whatever else config.json says, they ignore.
PLAIN = {"hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False], "pretraining_tp": [1],
         "use_sliding_window": [False], "quantization_config": [], "auto_map": [], "partial_rotary_factor": [1]}


def their_name(name):
    """blocks.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    *layer, module, kind = [*name.split(".", 2)[:2], *name.split(".", 2)[2].rsplit(".", 1)] \
        if name.startswith("blocks.") else name.rsplit(".", 1)
    return ".".join([*(["model.layers", layer[1]] if layer else []), NAMES[module], kind])


def read_folder(path, tokenizer=""):
    """A Hugging Face folder as (ModelConfig, float32 weights by our names, Tokenizer, whether it is a chat model).

    A chat model ends generation with the token that ends a turn. tokenizer: another one than the folder's.
    Raises SystemExit with one sentence for what is missing, broken, or not computed here.
    """
    config = tokenizers.read_json(f"{path}/config.json")
    if not config:
        raise SystemExit(f"{path}: a folder without config.json; name a Hugging Face folder")
    shape = read_shape(f"{path}/config.json", config)
    tok = tokenizers.load(tokenizer or path)
    known = max(tok.bos_id, *tok.stop_ids, *(id for id, piece in enumerate(tok.pieces) if piece))
    if known >= shape.vocab_size:
        raise SystemExit(f"{path}: its tokenizer has token {known}, but the model embeds {shape.vocab_size:,}")
    ends = [tokenizers.read_json(f"{path}/generation_config.json").get("eos_token_id"), config.get("eos_token_id")]
    ends = [id for end in ends for id in (end if isinstance(end, list) else [end])]
    return shape, read_weights(path, shape), tok, tok.end_id is not None and tok.end_id in ends


def read_shape(path, config):
    """config.json -> ModelConfig; SystemExit names what is missing in it or not computed here."""
    kind = config.get("model_type")
    if kind not in KINDS or (config.get("architectures") or [KINDS[kind]]) != [KINDS[kind]]:
        raise SystemExit(f"{path}: model_type {kind}, architectures {config.get('architectures')}: only "
                         f"{', '.join(KINDS.values())} are read")
    for name, values in PLAIN.items():
        if config.get(name) is not None and config[name] not in values:
            raise SystemExit(f"{path}: {name} is {config[name]}, which is not computed here")
    if other := set(config.get("layer_types") or ()) - {"full_attention"}:
        raise SystemExit(f"{path}: layer_types has {', '.join(other)}, which is not computed here")
    names = dict(vocab_size="vocab_size", dim="hidden_size", n_layers="num_hidden_layers",
                 n_heads="num_attention_heads", hidden_dim="intermediate_size", max_seq_len="max_position_embeddings",
                 norm_eps="rms_norm_eps")
    missing = [theirs for theirs in names.values() if config.get(theirs) is None]
    if missing:
        raise SystemExit(f"{path}: {', '.join(missing)} missing")
    rope_theta, rope_scaling = read_rope(path, config)
    try:
        return ModelConfig(**{ours: config[theirs] for ours, theirs in names.items()}, rope_theta=rope_theta,
                           n_kv_heads=config.get("num_key_value_heads") or 0, head_dim=config.get("head_dim") or 0,
                           tie_embeddings=bool(config.get("tie_word_embeddings")), qk_norm=kind == "qwen3",
                           qkv_bias=kind == "qwen2", rope_scaling=rope_scaling)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None


def read_rope(path, config):
    """(rope_theta, rope_scaling) of a config.json: rope_parameters since transformers 5, before that two entries."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1 or \
            any(isinstance(value, (dict, list)) for value in rope.values()):
        raise SystemExit(f"{path}: rotary positions {rope}, which are not computed here; only default and llama3 are")
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if kind == "default":
        return theta, None
    original = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return theta, {**{name: rope.get(name, 0) for name in ("factor", "low_freq_factor", "high_freq_factor")},
                   "original_max_position_embeddings": original or config["max_position_embeddings"]}


def read_weights(path, shape):
    """The safetensors of a folder as the state_dict of Model(shape), float32; SystemExit unless they are just those."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise SystemExit(f"{path}: pip install safetensors to read its weights") from None
    index = tokenizers.read_json(f"{path}/model.safetensors.index.json")
    files = sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]
    theirs = {}
    for file in files:
        if not os.path.exists(f"{path}/{file}"):
            raise SystemExit(f"{path}/{file}: not there; only safetensors are read, all of them must be in the folder")
        try:
            with safe_open(f"{path}/{file}", framework="pt") as f:
                for name in f.keys():
                    if not name.endswith("rotary_emb.inv_freq"):           # old folders: a table that rope_theta gives
                        theirs[name] = f.get_tensor(name)
        except SafetensorError as error:
            raise SystemExit(f"{path}/{file}: not whole ({error}); download it again") from None
    if "lm_head.weight" not in theirs and shape.tie_embeddings:
        theirs["lm_head.weight"] = theirs.get("model.embed_tokens.weight")
    with torch.device("meta"):                                             # names and sizes, no memory
        expected = {their_name(name): (name, w.shape) for name, w in Model(shape).state_dict().items()}
    wrong = [f"{name} missing" for name in expected if theirs.get(name) is None]
    wrong += [f"{name} not expected" for name in theirs.keys() - expected.keys()]
    wrong += [f"{name} {list(w.shape)} instead of {list(expected[name][1])}"
              for name, w in theirs.items() if name in expected and w is not None and w.shape != expected[name][1]]
    wrong += [f"{name} in {w.dtype}" for name, w in theirs.items()
              if w is not None and w.dtype not in (torch.float32, torch.bfloat16, torch.float16)]
    if not wrong and shape.tie_embeddings and not theirs["lm_head.weight"].equal(theirs["model.embed_tokens.weight"]):
        wrong = ["lm_head.weight unlike model.embed_tokens.weight, which config.json ties"]
    if wrong:
        raise SystemExit(f"{path}: weights that config.json does not describe: {', '.join(sorted(wrong)[:3])}"
                         + f" and {len(wrong) - 3} more" * (len(wrong) > 3))
    if shape.tie_embeddings:
        del expected["lm_head.weight"]
    weights = {ours: theirs.pop(name).float() for name, (ours, _) in expected.items()}     # two copies of one at a time
    return {**weights, "head.weight": weights["embedding.weight"]} if shape.tie_embeddings else weights
