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
        self.lora_a = nn.Parameter(torch.empty(rank, in_dim))
        self.lora_b = nn.Parameter(torch.zeros(out_dim, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))        # as in the authors' code
        # a buffer, so that merge() needs nothing but the weights of a checkpoint
        self.register_buffer("lora_scale", torch.tensor(alpha / rank))

    def forward(self, x):                                            # (..., in) -> (..., out)
        y = F.linear(x, self.weight, self.bias)
        h = F.linear(x, self.lora_a)                                 # (..., rank)
        update = F.linear(h, self.lora_b)
        return y + update * self.lora_scale


def add(model, rank, alpha, seed):
    """Freeze the model and put a LoRALinear in the place of each matrix of its blocks.

    The updates are made on the CPU: the model moves to its device afterwards.
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)                    # the same start in all processes
    for name, module in list(model.blocks.named_modules()):
        if isinstance(module, nn.Linear):
            replacement = LoRALinear(module, rank, alpha)
            model.blocks.set_submodule(name, replacement)


def merge(weights):
    """The weights of a state dict, as a new dict, with every update added to its matrix.

    Raises ValueError if an update, known by its scale, has not all its parts or does not fit.
    """
    merged = dict(weights)
    for name in weights:
        layer, is_update, _ = str(name).rpartition(".lora_scale")
        if not is_update:
            continue
        try:
            parts = [merged.pop(f"{layer}.lora_{part}") for part in ("a", "b", "scale")]
            a, b, scale = [part.float() for part in parts]     # even if the weights are not
            weight = merged[f"{layer}.weight"]
            total = weight.float() + scale * (b @ a).view_as(weight)
            merged[f"{layer}.weight"] = total.to(weight.dtype)
        except (KeyError, RuntimeError, AttributeError):       # missing, misshapen, no tensor
            raise ValueError(f"the update of the weight {layer} is not whole") from None
    return merged
