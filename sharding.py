"""Sharding: each process holds a share of the weights, gradients and moments, for models that are
too large for one card.

Rajbhandari et al. 2020 (ZeRO), arXiv:1910.02054, by PyTorch's fully_shard (FSDP2): a parameter is a
DTensor, of which each process holds some rows. The weights of a block are gathered when it is used.
With --shard=full they are dropped right after, with --shard=optimizer after the backward pass,
which saves a third of the communication and takes the memory of all weights.

Checkpoints are the same with and without: whole() gathers to save, share() cuts what is loaded.
"""
from contextlib import nullcontext

import torch
import torch.distributed as dist

MODES = "", "optimizer", "full"
OLDEST = "2.9"                 # the oldest PyTorch that this was run with; 2.6 cannot share()


def shard(model, process, mode, dtype):
    """Cut the parameters of the model into shares and move this process's to its device.

    dtype: of the matrix products; the weights are gathered in it.
    """
    from torch.distributed.device_mesh import init_device_mesh         # slow to import, so here
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision,
                    reshard_after_forward=mode == "full")
    model.to(process.device)                   # the buffers
    model.shares, model.keeps_weights = process.world_size, mode == "optimizer"
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
    from torch.distributed.tensor import distribute_tensor
    tensor = tensor.to(like.device)
    # src_data_rank: every process has the whole, so that nothing is sent
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


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
