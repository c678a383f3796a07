"""What both trainings share: one session that can be saved and resumed to the same bytes, augmentation, prediction."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from cbd.config import NEEDS_GPU, Confounder, Deconfounded
from cbd.distributed import agree, by_shares, is_first
from cbd.errors import EnvironmentFault
from cbd.files import replacing

OnEpoch = Callable[[int, int, dict[str, float]], None]
"""Called after every epoch with (epochs done, epochs in all, measurements)."""
PREDICTED_AT_ONCE = {"cpu": 128, "cuda": 512}
"""Images per batch where nothing is learned: on a CPU what its caches hold, a quarter faster there than 512, to the same bits."""


def best_device() -> torch.device:
    """The first GPU, or the CPU; raises EnvironmentFault if there is none and CBD_NEEDS_GPU is set."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get(NEEDS_GPU):
        raise EnvironmentFault(f"{NEEDS_GPU} is set, but no GPU is seen: look at the driver, the device plugin and LD_LIBRARY_PATH")
    return torch.device("cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bf16 autocast where the hardware computes in bf16, else float32.

    With such instructions bf16 is about twice as fast for these networks; emulated on a CPU with AVX2 only it takes 11 times as long.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_bf16(device.type))


@cache
def computes_bf16(device_type: str) -> bool:
    """Whether this machine's `cpu` or `cuda` device has instructions for bf16."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@dataclass
class Session:
    """Everything that a training changes: what is saved after every epoch and restored after a kill."""

    models: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Per-sample tables, such as running losses; their shapes never change."""
    history: list[dict[str, float]] = field(default_factory=list)
    epoch: int = 0

    def save(self, path: Path, *, key: str) -> None:
        """Writes the whole state to `path`, whole or not at all; `key` names the data and parameters it belongs to.

        Of processes that train together, which all have the same state, the first one writes.
        """
        if not is_first():
            return
        tensors = {"generator": self.generator.get_state()} | {f"table/{name}": table for name, table in self.tables.items()}
        for name, model in self.models.items():
            tensors |= {f"model/{name}/{part}": tensor for part, tensor in model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{name}/{index}/{part}": tensor for part, tensor in state.items() if isinstance(tensor, Tensor)}
        contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with replacing(path) as temporary:
            save_file(contiguous, temporary, metadata={"key": key, "epoch": str(self.epoch), "history": json.dumps(self.history)})

    def finish_epoch(self, path: Path, *, key: str, measures: dict[str, float]) -> None:
        """Counts the epoch, keeps its measurements and saves the state."""
        self.epoch += 1
        self.history.append(measures)
        self.save(path, key=key)

    def resume(self, path: Path, *, key: str) -> bool:
        """Whether a saved state of the same `key` stood at `path` and was restored.

        Raises:
            EnvironmentFault: processes that train together found different states.
        """
        restored = self._restore(path, key=key)
        if not agree(self.epoch):
            raise EnvironmentFault(f"{path}: not the same file for all processes; give them one folder of checkpoints that all can read")
        return restored

    def _restore(self, path: Path, *, key: str) -> bool:
        if not path.is_file():
            return False
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata.get("key") != key:
                return False
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        self.generator.set_state(tensors["generator"])
        self.tables = {name: tensors[f"table/{name}"].to(table.device) for name, table in self.tables.items()}
        for name, model in self.models.items():
            model.load_state_dict(_under(tensors, f"model/{name}/"))
        for name, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Any]] = {}
            for part, tensor in _under(tensors, f"optimizer/{name}/").items():
                index, _, leaf = part.partition("/")
                state.setdefault(int(index), {})[leaf] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.history, self.epoch = json.loads(metadata["history"]), int(metadata["epoch"])
        return True


def batches(num_samples: int, batch_size: int, *, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of index batches int64 [B] in random order; the last incomplete batch is left out."""
    order = torch.randperm(num_samples, generator=generator)
    size = min(batch_size, num_samples)
    yield from torch.split(order[: num_samples - num_samples % size], size)


def augment(images: Tensor, *, crop: int, flip: bool, cutout: int, generator: torch.Generator, noise: float = 0.0) -> Tensor:
    """Randomly shifted, mirrored, partly greyed and noisy copies of `images` (uint8 [N, 3, S, S], any device).

    Args:
        images: left unchanged.
        crop: largest shift in pixels; the border is black.
        flip: mirror each image with probability 1/2.
        cutout: side in pixels of one grey square per image; 0 is none.
        generator: a CPU generator, so that every device draws the same numbers.
        noise: each image is mixed with uniform noise by a share drawn from [0, noise].
    """
    num, _, side, _ = images.shape
    device = images.device
    if crop:
        shifts = torch.randint(2 * crop + 1, (2, num, 1), generator=generator).to(device)
        rows, columns = (shifts + torch.arange(side, device=device)).unbind()
        padded = F.pad(images, (crop,) * 4)
        samples, channels = torch.arange(num, device=device), torch.arange(3, device=device)
        images = padded[samples[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]
    if flip:
        mirrored = (torch.rand(num, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    if cutout:
        corners = torch.randint(1 - cutout, side, (2, num, 1), generator=generator).to(device)
        near = torch.arange(side, device=device)
        rows, columns = ((near >= corners) & (near < corners + cutout)).unbind()
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 127)
    if noise:
        share = noise * torch.rand(num, 1, 1, 1, generator=generator).to(device)
        pattern = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8).to(device)
        images = torch.lerp(images.float(), pattern.float(), share).round_().to(torch.uint8)
    return images


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits: float32 [N, K] on the device of `images` (uint8 [N, 3, S, S]), in evaluation mode."""
    return _outputs(model, images)[0]


def embeddings(model: nn.Module, images: Tensor) -> Tensor:
    """The model's embeddings: float32 [N, E] on the device of `images` (uint8 [N, 3, S, S]), in evaluation mode."""
    return _outputs(model, images)[1]


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    was_training = model.training
    model.eval()
    with autocast(images.device):
        logits, embedded = zip(*(model(batch) for batch in torch.split(images, PREDICTED_AT_ONCE[images.device.type])), strict=True)
    model.train(was_training)
    return torch.cat(logits).float(), torch.cat(embedded).float()


def recalibrate(model: nn.Module, images: Tensor, *, generator: torch.Generator, batch_size: int = 512) -> None:
    """Takes batch norm's averages anew: over `images` (uint8 [N, 3, S, S]) in random batches, with the weights as they are.

    In a short training at a constant learning rate the running ones lag behind the weights.
    """
    order = torch.randperm(len(images), generator=generator)
    with autocast(images.device):
        update_bn((images[chosen] for chosen in order.tensor_split(-(-len(images) // batch_size))), model)


def sample_losses(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every sample on its stored view: float32 [N]; processes that train together share the work."""
    return F.cross_entropy(by_shares(partial(predict, model), images), labels, reduction="none")


def make_sgd(model: nn.Module, settings: Confounder | Deconfounded) -> torch.optim.SGD:
    """SGD with Nesterov momentum, as the section says."""
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )


def mean_measures(measured: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Mean loss and accuracy of an epoch from the (loss, accuracy) of its batches, all scalars."""
    losses, accuracies = zip(*measured, strict=True)
    return {"loss": float(torch.stack(losses).mean()), "accuracy": float(torch.stack(accuracies).mean())}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the step size of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
