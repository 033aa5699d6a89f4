"""Import a model of baby-llama2-chinese: its .pth -> a checkpoint that every stage here takes.

    python import_baby_llama2.py --pth=epoch_4.pth --tokenizer=chatglm_tokenizer/tokenizer.model
    python sample.py --checkpoint=out/baby_llama2/best.pt --prompt=你好

Such a file holds weights only. Width, depth, vocabulary and key/value heads are read from them, the constants say the
rest. Source of the format: DLLXW/baby-llama2-chinese, model.py.
"""
import pickle
import re

import torch

import checkpoints
import config
import tokenizer as tokenizers
from model import Model, ModelConfig

pth         = "epoch_0.pth"              # the weights: torch.save(model.state_dict(), ...)
tokenizer   = "data/chatglm2.model"      # the sentencepiece file that they were trained with, ChatGLM2's
n_heads     = 8                          # query heads; the sizes of the weights do not tell it
max_seq_len = 512                        # tokens of the longest context it learnt
norm_eps    = 1e-5                       # of the RMSNorms
stage       = "sft"                      # sft: the model answers; pretrain: it continues a text
out         = "out/baby_llama2/best.pt"  # where the checkpoint goes
config.override(globals())

PARTS = {"tok_embeddings": "embedding", "output": "head", "layers": "blocks", "feed_forward": "ffn"}     # theirs: ours


def read_weights():
    """The tensors of the file under our names, float32; SystemExit if it does not hold tensors only."""
    try:
        weights = torch.load(pth, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"{pth}: cannot be read as weights ({str(error).splitlines()[0]})") from None
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise SystemExit(f"{pth}: holds more or other things than named tensors; save the model's state_dict() alone")
    named = {}
    for name, w in weights.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)               # what torch.compile and DDP put in front
        if name not in ("freqs_cos", "freqs_sin"):                         # tables that the positions give
            named[".".join(PARTS.get(part, part) for part in name.split("."))] = w.float()
    return named


def halves(w, head_dim):
    """Rows of a query or key projection (H D, C), so that (i, i + D/2) are turned together instead of (2i, 2i + 1)."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def main():
    if stage not in ("pretrain", "sft"):
        raise SystemExit(f"--stage={stage}: choose pretrain or sft")
    config.check_output("out", out)
    config.check_range(1, n_heads=n_heads)
    tok, weights = tokenizers.load(tokenizer), read_weights()
    needed = ["embedding.weight", "head.weight", "blocks.0.attention.wk.weight", "blocks.0.ffn.w1.weight"]
    if not set(needed) <= weights.keys():
        raise SystemExit(f"{pth}: no weights of baby-llama2-chinese: {min(set(needed) - weights.keys())} missing")
    (vocab_size, dim), k_rows, hidden_dim = weights["embedding.weight"].shape, *(len(weights[n]) for n in needed[2:])
    n_layers = sum(name.endswith("attention.wq.weight") for name in weights)
    if tok.vocab_size != vocab_size:
        raise SystemExit(f"{pth}: has {vocab_size:,} tokens, but {tokenizer} {tok.vocab_size:,}; name the tokenizer "
                         "that it was trained with")
    if dim % n_heads or k_rows % (dim // n_heads):
        raise SystemExit(f"--n_heads={n_heads}: does not go with a width of {dim} and keys of {k_rows}")
    head_dim = dim // n_heads
    for name in weights:
        if name.endswith(("wq.weight", "wk.weight")):
            weights[name] = halves(weights[name], head_dim)
    try:
        shape = ModelConfig(vocab_size, dim, n_layers, n_heads, k_rows // head_dim, hidden_dim=hidden_dim,
                            max_seq_len=max_seq_len, norm_eps=norm_eps,
                            tie_embeddings=weights["head.weight"].equal(weights["embedding.weight"]))
        model = Model.from_state(vars(shape), weights)
    except (ValueError, RuntimeError) as error:                            # strict: each name, each size
        raise SystemExit(f"{pth}: {' '.join(str(error).split())}") from None
    checkpoints.save(out, {"stage": stage, "model": model.state_dict(), "shape": vars(shape),
                                  "tokenizer": tok.name, "tokenizer_sha256": tok.sha256})
    print(f"{out}: {model.n_params():,} parameters, {n_layers} layers of {dim}, {n_heads} heads of {head_dim} on "
          f"{shape.n_kv_heads} for keys and values, {vocab_size:,} tokens")


if __name__ == "__main__":
    main()
