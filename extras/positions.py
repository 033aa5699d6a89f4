"""How well a model uses a long context: its loss by the number of tokens that it has seen before.

    python -m extras.positions --checkpoint=out/long/best.pt     a table, on data/pretrain/val.bin
    python -m extras.positions --max_seq_len=512                 the same text in shorter rows

Where a longer context helps, the loss of later tokens goes on falling. Compare two models on the
same tokens: rows of the same max_seq_len cut the text in the same places.
"""
import config                                  # before torch: sets how its threads wait
import math

import numpy as np
import torch

import checkpoints
import pretrain
import runtime

checkpoint  = "out/pretrain/best.pt"  # of pretrain.py
tokenizer   = ""                      # empty: the one that the checkpoint names
data_dir    = "data/pretrain"         # its val.bin is read
max_seq_len = 0                       # tokens of a row; 0: as many as the model reads
n_rows      = 200                     # rows at most
batch_size  = 4                       # rows at a time
device      = "auto"                  # auto | cuda | mps | cpu
dtype       = "auto"                  # auto (bfloat16 if fast) | bfloat16 | float16 | float32
config.override(globals())


@torch.inference_mode()
def by_position(model, tok, data):
    """For 1, 2 to 3, 4 to 7, ... tokens seen before: (nats, tokens, bytes) summed, (buckets, 3)."""
    sums = np.zeros((32, 3))
    token_bytes = np.array([len(piece) for piece in tok.pieces])
    rows = np.arange(min(n_rows, math.ceil((len(data) - 1) / pretrain.max_seq_len)))
    for at in range(0, len(rows), batch_size):
        x, y, cu_seqlens = pretrain.read_batch(data, rows[at:at + batch_size], tok,
                                               model.norm.weight.device)
        nats = model(x, y, cu_seqlens, per_token=True).flatten().cpu().double().numpy()
        starts, targets = cu_seqlens.cpu().numpy(), y.flatten().cpu().numpy()
        seen = 1 + np.arange(len(targets)) - np.repeat(starts[:-1], np.diff(starts))
        counted = targets >= 0
        bucket = np.log2(seen[counted]).astype(int)
        values = nats[counted], np.ones(counted.sum()), token_bytes[targets[counted]]
        for column, value in enumerate(values):
            sums[:, column] += np.bincount(bucket, value, len(sums))
    return sums


def main():
    config.check_range(1, n_rows=n_rows, batch_size=batch_size)
    model, tok, _ = runtime.load_model(checkpoint, tokenizer, device, dtype)
    context = model.config.max_seq_len
    if max_seq_len > context:
        raise SystemExit(f"--max_seq_len={max_seq_len}: {checkpoint} reads {context} at most")
    pretrain.max_seq_len, pretrain.mask_documents = max_seq_len or context, True
    meta = checkpoints.read_meta(f"{data_dir}/meta.json", tok, "prepare_pretrain.py")
    data = checkpoints.open_tokens(f"{data_dir}/val.bin", meta["val"]["tokens"], meta,
                                   "prepare_pretrain.py", tok.vocab_size)
    print("| tokens seen before | targets | nats per token | bits per byte |\n|---|---:|---:|---:|")
    for i, (nats, n, n_bytes) in enumerate(by_position(model, tok, data)):
        if n:
            last = min(2 ** (i + 1) - 1, pretrain.max_seq_len)
            print(f"| {2 ** i} to {last} | {n:,.0f} | {nats / n:.4f} | "
                  f"{nats / math.log(2) / max(1, n_bytes):.4f} |")


if __name__ == "__main__":
    main()
