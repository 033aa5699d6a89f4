"""Sharding: each process holds a share of the weights, gradients and moments, for models that are
too large for one card.

Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, by PyTorch's fully_shard (FSDP2): a parameter is a
DTensor, of which each process holds some rows. The weights of a block are gathered when it is used.
With --shard=full they are dropped right after, with --shard=optimizer after the backward pass,
which saves a third of the communication and takes the memory of all weights.

With --offload the shares of weights, gradients and moments lie in the host's memory: a card holds
what it computes with, and the optimizers run on the processor (Ren et al. 2021, ZeRO-Offload,
arXiv:2101.06840). One process is enough for that.

Checkpoints are the same with and without: whole() gathers to save, share() cuts what is loaded.
"""
from contextlib import nullcontext

import torch
import torch.distributed as dist

MODES = "", "optimizer", "full"
CARD_AND_HOST = "cuda:nccl,cpu:gloo"           # tensors of both are exchanged, with --offload
OLDEST = "2.9"                 # the oldest PyTorch that this was run with


def shard(model, process, mode, dtype, offload):
    """Cut the parameters of the model into shares and move this process's to its device.

    dtype: of the matrix products; the weights are gathered in it. offload: the shares stay in the
    host's memory.
    """
    from torch.distributed.device_mesh import init_device_mesh         # slow to import, so here
    from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy,
                                        fully_shard)
    if not dist.is_initialized():              # one process, which offloads
        backend = CARD_AND_HOST if process.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    device = process.device
    mesh = init_device_mesh(device.type, (process.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    policy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for module in (*model.blocks, model):      # which moves the buffers to the device
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=policy,
                    reshard_after_forward=mode == "full")
    model.shares, model.keeps_weights = process.world_size, mode == "optimizer"
    model.offloads = offload
    # gradients are exchanged in every round, so that no process ever holds all of them
    model.no_sync = nullcontext
    return model


def is_cut(tensor):
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor):
    """The rows of a tensor that this process holds; they share its memory."""
    return tensor.to_local() if is_cut(tensor) else tensor


def gathered(rows, like):
    """The whole of a tensor of which this process has the rows that it holds of a parameter."""
    if not is_cut(like):
        return rows
    tensor = type(like).from_local(rows, like.device_mesh, like.placements, run_check=False,
                                   shape=like.shape, stride=like.stride())
    return tensor.full_tensor()


def share(tensor, like):
    """A whole tensor cut as a parameter is; one of another shape as it is."""
    if not is_cut(like) or tensor.shape != like.shape:
        return tensor
    result = torch.empty_like(like, requires_grad=False)       # on its device: the host's, perhaps
    rows = local(result)
    if len(rows):                              # the last processes may have none
        pieces = tensor.chunk(dist.get_world_size())           # every process has the whole
        rows.copy_(pieces[dist.get_rank()])
    return result


def whole(value):
    """A value with all of its DTensors gathered, in dicts and lists as well.

    Every process calls it, rank 0 gets the tensors, in the host's memory, one after the other.
    """
    if is_cut(value):
        tensor = value.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {name: whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item) for item in value]
    return value
