"""Llama, Qwen2 and Qwen3 folders of Hugging Face: their names and numbers <-> ours."""

NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "attention_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "attention.q_norm": "self_attn.q_norm",
         "attention.k_norm": "self_attn.k_norm", "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj",
         "ffn.w3": "mlp.up_proj"}


def their_name(name):
    """blocks.3.attention.wq.weight -> model.layers.3.self_attn.q_proj.weight"""
    *layer, module, kind = [*name.split(".", 2)[:2], *name.split(".", 2)[2].rsplit(".", 1)] \
        if name.startswith("blocks.") else name.rsplit(".", 1)
    return ".".join([*(["model.layers", layer[1]] if layer else []), NAMES[module], kind])
