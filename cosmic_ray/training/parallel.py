"""The parallel strategies: DDP, FSDP2, or one process alone. Gradients are summed over ranks, never averaged."""

# No postponed annotations here: DDP compares those of its hook with the classes themselves.

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cosmic_ray.training.collective import Collective

Strategy = Literal["ddp", "fsdp2"]


def wrap(network: nn.Module, blocks: Sequence[nn.Module], strategy: Strategy, collective: Collective) -> nn.Module:
    """`network` ready for several ranks: call the result, train the parameters of `network` itself.

    FSDP2 shards `blocks` and then the rest in place, so it has to come before optimiser and EMA are made. DDP starts
    from rank 0's weights.
    """
    if not any(parameter.requires_grad for parameter in network.parameters()):
        return network
    if strategy == "fsdp2" and dist.is_initialized():
        return _sharded(network, blocks)
    if collective.world == 1:
        return network
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Gradients of another memory layout than their parameters are copied; that is all that this warning says.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    wrapped.register_comm_hook(None, _summed)
    return wrapped


@contextmanager
def syncing(wrapped: nn.Module, sync: bool) -> Iterator[None]:
    """Within, a backward pass sums gradients over ranks (`sync`), or adds them up here for a later one that does."""
    if isinstance(wrapped, DistributedDataParallel) and not sync:
        with wrapped.no_sync():
            yield
        return
    if hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(sync)
    yield


def forget_gathered(network: nn.Module) -> None:
    """Have FSDP2 gather the weights anew: after a forward pass without a backward one it would keep those it has."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of `tensor` that this rank holds: its memory, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of `tensor` on the CPU, detached. With FSDP2 all ranks must ask together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


@torch.no_grad()
def fill(tensor: torch.Tensor, values: torch.Tensor | None, collective: Collective) -> None:
    """Copy rank 0's `values` (the whole tensor; other ranks pass None) into `tensor` or this rank's part of it."""
    here = local(tensor)
    if values is None or collective.rank != 0:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=here.device)
    else:
        values = values.to(dtype=tensor.dtype, device=here.device)
    collective.broadcast(values)
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    here.copy_(values)


def norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients as one vector, over all ranks' parts: a scalar."""
    total = torch.nn.utils.get_total_norm(gradients)
    return total.full_tensor() if isinstance(total, DTensor) else total


def _sharded(network: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    for block in blocks:
        fully_shard(block)
    fully_shard(network)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return network


def _summed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's reduction as a sum.

    On the CPU each gradient is reduced by itself: DDP regroups its buckets after the first step, and in a bucket an
    element's place decides the order of its summation, so that a resumed run would differ in the last bit.
    """
    buffer = bucket.buffer()
    if buffer.device.type != "cpu":
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda done: done.value()[0])
    futures = [dist.all_reduce(gradient, async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(futures).then(lambda _: buffer)
