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
            a = torch.empty(rank, in_dim)
            b = torch.zeros(out_dim, rank)
            scale = torch.tensor(alpha / rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))                  # as in the authors' code
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)
        # a buffer, so that merge() needs nothing but the weights of a checkpoint
        self.register_buffer("lora_scale", scale)

    def forward(self, x):                                            # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        h = F.linear(x, self.lora_a)                                 # (..., rank)
        update = F.linear(h, self.lora_b)
        return y + update * self.lora_scale


def add(model, rank, alpha, seed):
    """Freeze the model and put a LoRALinear in the place of each matrix of its blocks."""
    model.requires_grad_(False)
    torch.manual_seed(seed)                    # the same start in all processes
    for block in model.blocks:
        for layer in block.attention, block.ffn:
            for name, child in list(layer.named_children()):
                if isinstance(child, nn.Linear):
                    replacement = LoRALinear(child, rank, alpha)
                    setattr(layer, name, replacement)


def merge(weights):
    """A state dict with every update added to its matrix; one without updates comes back as it is.

    Raises ValueError if a part of an update is missing or does not fit.
    """
    merged, layers = {}, set()
    for name, weight in weights.items():
        layer, is_update, _ = str(name).rpartition(".lora_")
        if is_update:
            layers.add(layer)
        else:
            merged[name] = weight
    for layer in layers:
        name = f"{layer}.weight"
        try:
            parts = [weights[f"{layer}.lora_{part}"] for part in ("a", "b", "scale")]
            a, b, scale = [part.float() for part in parts]     # even if the weights are not
            weight = merged[name].float() + scale * (b @ a).view_as(merged[name])
            merged[name] = weight.to(merged[name].dtype)
        except (KeyError, RuntimeError, AttributeError):       # missing, misshapen, no tensor
            raise ValueError(f"the update of the weight {layer} is not whole") from None
    return merged
