"""LoRA: small trainable updates beside frozen matrices. Hu et al. 2021, arXiv:2106.09685.

Fine-tuning needs memory for the gradients and the moments of what is trained only. Here that is
two thin matrices a (rank, in) and b (out, rank) beside each matrix inside the network:

    y = x W^T + scale (x a^T) b^T        with scale = alpha / rank

b starts at zero, so training starts from the model as it is. merge() adds scale b a to W: the
result is a checkpoint like any other.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A linear layer whose own weight and bias are frozen."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        out_dim, in_dim = self.weight.shape
        with self.weight.device:
            self.lora_a = nn.Parameter(torch.empty(rank, in_dim))
            self.lora_b = nn.Parameter(torch.zeros(out_dim, rank))
            # a buffer, so that merge() needs nothing but the weights of a checkpoint
            self.register_buffer("lora_scale", torch.tensor(alpha / rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))        # as in the authors' code

    def forward(self, x):                                            # (..., in) -> (..., out)
        update = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + update * self.lora_scale


def add(model, rank, alpha, seed):
    """Freeze the model and put a LoRALinear in the place of each matrix of its blocks."""
    model.requires_grad_(False)
    torch.manual_seed(seed)                    # the same start in all processes
    for block in model.blocks:
        for layer in (block.attention, block.ffn):
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(layer, name, LoRALinear(child, rank, alpha))


def merge(weights):
    """A state dict with every update added to its matrix; one without updates comes back as it is.

    Raises ValueError if a part of an update is missing or does not fit.
    """
    merged = {name: w for name, w in weights.items() if ".lora_" not in str(name)}
    updates = weights.keys() - merged.keys()
    for layer in {str(name).rpartition(".lora_")[0] for name in updates}:
        try:
            a, b = weights[f"{layer}.lora_a"].float(), weights[f"{layer}.lora_b"].float()
            update = weights[f"{layer}.lora_scale"].float() * (b @ a)
            weight = merged[f"{layer}.weight"]
            # in float32, even if the weights are not
            merged[f"{layer}.weight"] = (weight.float() + update.view_as(weight)).to(weight.dtype)
        except (KeyError, RuntimeError, AttributeError):       # missing, misshapen, no tensor
            raise ValueError(f"the update of the weight {layer} is not whole") from None
    return merged
