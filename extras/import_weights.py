"""Import a model from elsewhere: its weights -> a checkpoint that every stage here takes.

    python -m extras.import_weights --source=Qwen3-0.6B --out=out/qwen3/best.pt
    python -m extras.import_weights --source=epoch_4.pth --tokenizer=chatglm/tokenizer.model
    python sample.py --checkpoint=out/imported/best.pt --prompt=你好

The source is a Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3 model, or a .pth file of
baby-llama2-chinese. Such a file holds weights only: width, depth, vocabulary and key/value heads
are read from them, the constants give the rest. Source: DLLXW/baby-llama2-chinese, model.py.
"""
import config                                  # before torch: sets how its threads wait
import os
import pickle
import re

import torch

import checkpoints
import tokenizer as tokenizers
from extras import huggingface
from model import Model, ModelConfig

source      = "Qwen3-0.6B"            # a Hugging Face folder, or a .pth: a saved state_dict()
out         = "out/imported/best.pt"  # the checkpoint to write
tokenizer   = ""                      # of the weights; empty: the folder's, a .pth needs a name
stage       = ""                      # sft: answers | pretrain: continues texts; empty: its own
# of a .pth only, whose weights do not tell
n_heads     = 8                       # query heads
max_seq_len = 512                     # tokens of the longest context it was trained on
norm_eps    = 1e-5                    # epsilon of the RMSNorms
config.override(globals())

PARTS = {"tok_embeddings": "embedding", "output": "head", "layers": "blocks",
         "feed_forward": "ffn"}       # baby-llama2's names: ours


def read_pth():
    """The tensors of a .pth under our names, float32; SystemExit if it holds anything else."""
    try:
        weights = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{source}: cannot be read as weights ({reason})") from None
    if not isinstance(weights, dict) or \
            not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise SystemExit(f"{source}: does not hold named tensors alone; "
                         "save the model's state_dict()")
    named = {}
    for name, w in weights.items():
        name = re.sub(r"^(_orig_mod\.|module\.)+", "", name)     # of torch.compile and DDP
        if name not in ("freqs_cos", "freqs_sin"):               # tables of the positions
            named[".".join(PARTS.get(part, part) for part in name.split("."))] = w.float()
    return named


def halves(w, head_dim):
    """Reorder the rows of a query or key projection (H D, C).

    baby-llama2 rotates the neighbours (2i, 2i + 1), model.py the pairs (i, i + D/2).
    """
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def baby_llama2(tok):
    """(shape, weights) of a .pth; SystemExit if constants or tokenizer do not fit them."""
    weights = read_pth()
    needed = ["embedding.weight", "head.weight", "blocks.0.attention.wk.weight",
              "blocks.0.ffn.w1.weight"]
    if not set(needed) <= weights.keys():
        missing = min(set(needed) - weights.keys())
        raise SystemExit(f"{source}: no weights of baby-llama2-chinese: {missing} missing")
    embedding, head, wk, w1 = (weights[name] for name in needed)
    if any(weights[name].ndim != 2 for name in needed):
        raise SystemExit(f"{source}: no weights of baby-llama2-chinese: not all are matrices")
    vocab_size, dim = embedding.shape
    if tok.vocab_size != vocab_size:
        raise SystemExit(f"{source}: has {vocab_size:,} tokens, but {tok.name} {tok.vocab_size:,}; "
                         "name the tokenizer that it was trained with")
    if dim % n_heads or len(wk) % (dim // n_heads):
        raise SystemExit(f"--n_heads={n_heads}: does not go with a width of {dim} and keys of "
                         f"{len(wk)}")
    head_dim, is_tied = dim // n_heads, head.equal(embedding)
    if not is_tied:
        print(f"{source}: output.weight differs from tok_embeddings.weight, while "
              "baby-llama2-chinese has one for both: damaged, or untied by its owner")
    n_layers = sum(name.endswith("attention.wq.weight") for name in weights)
    try:
        shape = ModelConfig(vocab_size, dim, n_layers, n_heads, len(wk) // head_dim,
                            hidden_dim=len(w1), max_seq_len=max_seq_len, norm_eps=norm_eps,
                            tie_embeddings=is_tied)
    except ValueError as error:
        raise SystemExit(f"{source}: {error}") from None
    for name, w in weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            if w.ndim != 2 or len(w) % head_dim:
                raise SystemExit(f"{source}: {name} has the shape {list(w.shape)}, which is not of "
                                 f"heads of {head_dim}")
            weights[name] = halves(w, head_dim)
    return shape, weights


def main():
    if stage not in ("", "pretrain", "sft"):
        raise SystemExit(f"--stage={stage}: choose pretrain or sft")
    config.check_output("out", out)
    if os.path.isdir(source):
        shape, weights, tok, is_chat = huggingface.read_folder(source, tokenizer)
    elif not tokenizer:
        raise SystemExit(f"{source}: not a folder; with a .pth file, --tokenizer= names the "
                         "sentencepiece file that it was trained with")
    else:
        tok, is_chat = tokenizers.load(tokenizer), True
        shape, weights = baby_llama2(tok)
    try:
        model = Model.from_state(vars(shape), weights)
    except RuntimeError as error:         # a name or a size that does not fit
        raise SystemExit(f"{source}: {' '.join(str(error).split())}") from None
    its_stage = stage or ("sft" if is_chat else "pretrain")
    checkpoints.save(out, {
        "stage": its_stage, "model": model.state_dict(), "shape": vars(shape),
        "tokenizer": tok.name, "tokenizer_sha256": tok.sha256})
    print(f"{out}: {model.n_params():,} parameters, {shape.n_layers} layers of {shape.dim}, "
          f"{shape.n_heads} heads of {shape.head_dim} on {shape.n_kv_heads} for keys and values, "
          f"{shape.vocab_size:,} tokens; stage {its_stage}")


if __name__ == "__main__":
    main()
