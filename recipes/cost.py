"""What a recipe will cost, by the code's own estimates; nothing of it is measured.

    python recipes/cost.py --dim=384 --n_layers=8 --n_heads=3 --pretrain_tokens=393_000_000
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import config
import torch

from model import Model, ModelConfig

vocab_size      = 16_384  # of the tokenizer
dim             = 512     # the shape: see pretrain.py
n_layers        = 8       # depth
n_heads         = 4       # query heads
max_seq_len     = 512     # tokens of a row
rows            = 16      # rows per forward pass; pretrain.py takes as many as fit
pretrain_tokens = 0       # tokens of all steps
sft_tokens      = 0       # the same for fine-tuning
download        = "none"  # what it downloads, in words
disk            = "1 GB"  # what it needs on the disk, in words
constants = config.override(globals())

CARDS = {"RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12}    # bfloat16 peak, FLOP/s
UTILISATION = 0.35                                                 # assumed share of the peak


def main():
    shape = ModelConfig(vocab_size, dim, n_layers, n_heads, max_seq_len=max_seq_len, qk_norm=True)
    with torch.device("meta"):
        model = Model(shape)
    flops = (pretrain_tokens + sft_tokens) * model.flops_per_token(max_seq_len)
    memory = model.bytes_to_train(rows, max_seq_len, torch.bfloat16) / 2**30
    print(f"download    {download}; no checksums are known")
    print(f"disk        {disk}")
    print(f"model       {model.n_params() / 1e6:.0f} M parameters; training takes about "
          f"{memory:.1f} GiB of the card's memory")
    print(f"training    {pretrain_tokens / 1e6:,.0f} M tokens, "
          f"fine-tuning {sft_tokens / 1e6:,.0f} M")
    for card, peak in CARDS.items():
        hours = flops / (UTILISATION * peak) / 3600
        print(f"{card:<11} about {hours:.1f} hours, computed: {flops:.2g} FLOP at "
              f"{UTILISATION:.0%} of {peak / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
