"""One training in several processes, each with a share of every batch, and the same numbers as in one process but for rounding.

All processes draw the same batches and augmentations from generators of the same seed, and hold the tables of all samples. What is shared
out is the network alone: each process sends its rows of a batch through it, the outputs of all rows are gathered, and the loss, with
everything in it that looks at a whole batch, is computed on them everywhere. Gradients are summed by DistributedDataParallel. Batch norm
takes its statistics over the whole batch: a confounder is read by its losses, and those depend on them.

`torchrun` starts the processes; without it nothing here changes anything. They must be alike: each computes the loss for itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from cbd.errors import ConfigError

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, Tensor])


@contextmanager
def started() -> Iterator[None]:
    """Inside, this process is one of those that `torchrun` started: over NCCL with a GPU each, without any over gloo.

    Raises:
        ConfigError: more processes than GPUs on this machine.
    """
    gpus, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if number >= gpus:
            asked = os.environ["LOCAL_WORLD_SIZE"]
            raise ConfigError(f"training.processes = {asked}: expected at most one for each GPU of a machine, which are {gpus}")
        torch.cuda.set_device(number)
    distributed.init_process_group("nccl" if gpus else "gloo")
    yield
    distributed.destroy_process_group()


def num_processes() -> int:
    """How many processes train together; 1 for one that is alone."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes; one that is alone is."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def agree(number: int) -> bool:
    """Whether all processes say the same number."""
    if num_processes() == 1:
        return True
    said = _gather(torch.tensor([number], device="cuda" if torch.cuda.is_available() else "cpu"))
    return bool((said == number).all())


def spread(model: nn.Module) -> Callable[[Tensor], Any]:
    """The forward pass of `model` in training, of which every process computes an equal share; in one process the model itself.

    It must be called with the same images everywhere, and gives the outputs for all of them everywhere. Their gradients, which must be
    the same everywhere too, become those of the whole batch, for as long as what this returns is kept.

    Raises (when called):
        ConfigError: so many images cannot be shared out evenly.
    """
    if num_processes() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    else:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = GlobalBatchNorm
    shared = DistributedDataParallel(model, forward_sync_buffers=False)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) % num_processes():
            raise ConfigError(
                f"a batch of {len(images)} images cannot be shared out evenly among {num_processes()} processes; "
                "choose another number of them, or another batch_size"
            )
        outputs: tuple[Tensor, Tensor] = by_shares(shared, images)
        return outputs

    return forward


def by_shares(compute: Callable[[Tensor], Outputs], images: Tensor) -> Outputs:
    """`compute(images)`, float32 if there are several processes, of which each computes an equal share of the rows."""
    num = num_processes()
    if num == 1:
        return compute(images)
    rows = torch.arange(-(-len(images) // num) * num) % len(images)  # the first rows once more where they do not divide
    own = compute(images[rows.chunk(num)[distributed.get_rank()].to(images.device)])
    if isinstance(own, Tensor):
        return _Gathered.apply(own)[: len(images)]  # type: ignore[no-any-return, no-untyped-call]
    return tuple(_Gathered.apply(part)[: len(images)] for part in own)  # type: ignore[no-untyped-call]


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm over the equal shares of all processes, which `nn.SyncBatchNorm` does on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """float [B, C, H, W], as `x`."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        num, shift = num_processes(), self.running_mean.clone()  # about the mean, so that the squares are small
        shifted = x.float() - shift[:, None, None]
        sums = torch.stack((shifted.mean((0, 2, 3)), shifted.square().mean((0, 2, 3))))
        mean, square = (_Summed.apply(sums) / num).unbind()  # type: ignore[no-untyped-call]
        variance = square - mean.square()
        with torch.no_grad():
            count = num * x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean + shift, share)
            self.running_var.lerp_(variance * (count / (count - 1)), share)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normal: Tensor = (shifted - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normal.to(x.dtype)


class _Gathered(Function):
    """The rows of all processes in their order; of the gradient, which all have, a process keeps its rows.

    DistributedDataParallel will divide by the number of processes, so that is made up for here.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.dtype = own.dtype
        return _gather(own.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        num = num_processes()
        return (gradients[0].chunk(num)[distributed.get_rank()] * num).to(ctx.dtype)


class _Summed(Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return _sum(own)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _sum(gradients[0])


def _gather(own: Tensor) -> Tensor:
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(num_processes())]
    distributed.all_gather(parts, own.contiguous())
    return torch.cat(parts)


def _sum(own: Tensor) -> Tensor:
    total = own.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total
