"""Stage 1a: the confounder, trained just long enough to hold a backdoor, and its loss on every sample."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cbd.config import Confounder as Settings
from cbd.config import Params
from cbd.distributed import spread
from cbd.models import Network, make_model
from cbd.training import OnEpoch, Session, augment, autocast, batches, make_sgd, mean_measures, recalibrate, sample_losses

LEARNING = 0.88
"""Ratio of the mean losses of two epochs below which the training goes on."""


@dataclass(frozen=True)
class Confounder:
    """A trained confounder f_B."""

    model: Network
    losses: Tensor
    """float32 [N]: each sample's cross-entropy; with `average` the geometric mean over the training's own passes and a last one."""
    final_losses: Tensor
    """float32 [N]: each sample's cross-entropy at the end."""
    steps: int
    history: list[dict[str, float]]


def train_confounder(
    images: Tensor, labels: Tensor, *, num_classes: int, params: Params, checkpoint: Path, on_epoch: OnEpoch
) -> Confounder:
    """The confounder of this data: plain cross-entropy for a budget of steps, and how hard each sample was for it.

    With `until_slow` it goes on past the budget, up to `max_epochs`, while it learns fast: no trigger is learned much before the classes.

    With `recalibrate` batch norm's averages are those of the last weights; the running ones hide much of what has been learned.

    A loss at one moment jumps with every step; the mean over moments ranks poisoned samples far better. The moments
    are those at which a sample is trained on anyway, so they cost nothing; one last pass gives every sample its say.

    Args:
        images: uint8 [N, 3, S, S] on the device to train on.
        labels: int64 [N], as given, on the same device.
        num_classes: K.
        params: the seed and the sections `model` and `confounder`.
        checkpoint: file that is written after every epoch, and from which a killed training goes on to the same weights.
        on_epoch: called after every epoch.
    """
    settings, num = params.confounder, len(labels)
    generator = torch.Generator().manual_seed(params.seed)
    model = make_model(params.model.architecture, num_classes=num_classes, image_size=params.model.image_size, generator=generator)
    model.to(images.device).train()
    optimizer, forward = make_sgd(model, settings), spread(model)
    steps_per_epoch = max(1, num // settings.batch_size)
    tables = {name: torch.zeros(num, device=images.device) for name in ("log_losses", "passes")}
    session = Session({"model": model}, {"sgd": optimizer}, generator, tables)
    key = f"confounder {params.model_dump_json(include={'seed', 'model', 'confounder'})}"
    session.resume(checkpoint, key=key)
    while (steps := steps_asked(session.history, settings, steps_per_epoch)) > session.epoch * steps_per_epoch:
        measured, first = [], session.epoch * steps_per_epoch
        for step, chosen in enumerate(batches(num, settings.batch_size, generator=generator), first + 1):
            if step > steps:
                break
            losses, accuracy = _step(forward, optimizer, images[chosen], labels[chosen], params=params, generator=generator)
            session.tables["log_losses"][chosen] += _log(losses)
            session.tables["passes"][chosen] += 1
            measured.append((losses.mean(), accuracy))
        session.finish_epoch(checkpoint, key=key, measures={"step": float(min(steps, first + steps_per_epoch)), **mean_measures(measured)})
        on_epoch(session.epoch, max(session.epoch, -(-steps // steps_per_epoch)), session.history[-1])
    if settings.recalibrate:
        recalibrate(model, images, generator=generator)
    final = _log(sample_losses(model, images, labels))
    mean = (session.tables["log_losses"] + final) / (session.tables["passes"] + 1) if settings.average else final
    return Confounder(model.eval(), mean.exp().cpu(), final.exp().cpu(), int(session.history[-1]["step"]), session.history)


def steps_asked(history: list[dict[str, float]], settings: Settings, steps_per_epoch: int) -> int:
    """How many steps the training shall have by what is known so far: the budget, or another whole epoch while it learns fast.

    It learns fast if its last epoch lowered the mean loss below `LEARNING` times that of the one before. On CIFAR-10 (10,000 images) the
    ratio is 0.92 when the budget is spent; on GTSRB, where 43 classes take longer, 0.85 and falling.

    Args:
        history: `step` and `loss` of the epochs so far.
        settings: budget and largest number of epochs.
        steps_per_epoch: of a whole epoch.
    """
    limit, whole = settings.max_epochs * steps_per_epoch, (len(history) + 1) * steps_per_epoch
    if not settings.until_slow or len(history) < 2 or whole <= settings.steps:
        return min(settings.steps, limit)
    fast = history[-1]["loss"] < LEARNING * history[-2]["loss"] and history[-1]["step"] == whole - steps_per_epoch
    return min(whole if fast else settings.steps, limit)


def _log(losses: Tensor) -> Tensor:
    """Log of losses; a loss of zero has none."""
    return losses.clamp_min(1e-6).log()


def _step(
    forward: Callable[[Tensor], Any], optimizer: torch.optim.SGD, view: Tensor, given: Tensor, *, params: Params, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One optimizer step; the losses [B] of the batch before it, and its accuracy, a scalar."""
    if params.confounder.augment:
        view = augment(view, crop=params.model.scaled(4), flip=False, cutout=0, generator=generator)
    with autocast(view.device):
        logits = forward(view)[0].float()
    losses = F.cross_entropy(logits, given, reduction="none")
    optimizer.zero_grad()
    losses.mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return losses.detach(), (logits.argmax(1) == given).float().mean()
