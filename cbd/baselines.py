"""Other defences to compare with, written from their papers: none of them is used by the pipeline, and none is tuned beyond its paper."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cbd.config import Params
from cbd.deconfounded import Evidence, learning_rate, train_deconfounded
from cbd.models import Network, make_model
from cbd.training import OnEpoch, augment, autocast, batches, make_sgd, predict, sample_losses, set_learning_rate

FLOODED, ISOLATED, UNLEARN_EPOCHS, UNLEARN_RATE = 0.5, 0.01, 5, 5e-4
"""ABL: the loss below which gradients turn, the share isolated, and the unlearning at the end."""
WARM_UP, VICTIM_RATE, VICTIM_SHARE, CREDIBLE_SHARE = 0.2, 0.02, 0.1, 0.7
"""V&B: share of the epochs on all data, step size of the victim, share of the surest samples it goes on with, share the other is given."""


def train_baseline(
    name: str, images: Tensor, labels: Tensor, *, poisoned: Tensor, num_classes: int, params: Params, checkpoint: Path, on_epoch: OnEpoch
) -> Network:
    """The model of another defence, on the schedule of the undefended one.

    Args:
        name: `abl`, `vb`, `random-filter` or `perfect-filter`.
        images: uint8 [N, 3, S, S] on the device to train on.
        labels: int64 [N], as given, on the same device.
        poisoned: bool [N], the ground truth, which the two filters alone look at.
        num_classes: K.
        params: the seed and the sections `model` and `deconfounded`.
        checkpoint: file of the filters' training.
        on_epoch: called after every epoch.
    """
    common: dict[str, Any] = {"num_classes": num_classes, "params": params, "on_epoch": on_epoch}
    if name == "abl":
        return anti_backdoor(images, labels, **common)
    if name == "vb":
        return victim_and_beneficiary(images, labels, **common)
    dropped = poisoned
    if name == "random-filter":
        generator = torch.Generator().manual_seed(params.seed)
        dropped = torch.zeros_like(poisoned)
        dropped[torch.randperm(len(labels), generator=generator)[: int(poisoned.sum())]] = True
    weights = 1 - dropped.to(images.device, torch.float32)
    filtered = params.model_copy(
        update={"deconfounded": params.deconfounded.model_copy(update={"weight": "isolation", "mi_weight": 0.0, "relabel": False})}
    )
    found = Evidence(None, torch.ones_like(weights), weights)
    return train_deconfounded(images, labels, found, checkpoint=checkpoint, **(common | {"params": filtered})).model


def anti_backdoor(images: Tensor, labels: Tensor, *, num_classes: int, params: Params, on_epoch: OnEpoch) -> Network:
    """Anti-backdoor learning (Li et al., NeurIPS 2021): isolate early what is learned fastest, train on, unlearn it at the end.

    For the first fifth of the epochs the sign of a loss below `FLOODED` is turned (local gradient ascent), so that only backdoors get very
    low losses; the `ISOLATED` share with the lowest is set apart. After training on all data the model ascends on those and descends on
    the rest.
    """
    epochs = params.deconfounded.epochs
    isolated = torch.zeros(len(labels), dtype=torch.bool, device=images.device)
    first = max(1, round(WARM_UP * epochs))

    def turned(losses: Tensor, _: Tensor) -> Tensor:
        return losses * torch.sign(losses.detach() - FLOODED) if done < first else losses

    trainer = _Trainer(images, labels, num_classes=num_classes, params=params)
    for done in range(epochs):
        measures = trainer.epoch(done, turned)
        if done + 1 == first:
            lowest = sample_losses(trainer.model, images, labels).topk(max(1, round(ISOLATED * len(labels))), largest=False).indices
            isolated[lowest] = True
        on_epoch(done + 1, epochs, measures)
    for _ in range(UNLEARN_EPOCHS):
        trainer.epoch(0, lambda losses, chosen: torch.where(isolated[chosen], -losses.clamp_max(5), losses), fixed=UNLEARN_RATE)
    return trainer.model.eval()


def victim_and_beneficiary(images: Tensor, labels: Tensor, *, num_classes: int, params: Params, on_epoch: OnEpoch) -> Network:
    """Victim and beneficiary (Zhu et al., ICCV 2023): one model falls for the poison, another learns from what it finds credible.

    The victim is warmed up on all data and then trained on the samples it is surest of, by the entropy of its prediction. The beneficiary
    is trained on the share that the victim is least sure of with their labels, and in its second half also on the others with the classes
    that it is itself sure of, in place of the paper's semi-supervised suppression. Its mixing of attention maps is left out.
    """
    epochs = params.deconfounded.epochs
    first = max(1, round(WARM_UP * epochs))
    victim = _Trainer(images, labels, num_classes=num_classes, params=params)
    for done in range(2 * first):
        sure = (
            torch.ones(len(labels), dtype=torch.bool, device=images.device) if done < first else _surest(victim.model, images, VICTIM_SHARE)
        )
        victim.epoch(0, lambda losses, chosen: losses * sure[chosen], fixed=VICTIM_RATE)  # noqa: B023 (called before the next turn)
    credible = ~_surest(victim.model, images, 1 - CREDIBLE_SHARE)
    seeded = params.model_copy(update={"seed": params.seed + 1})
    beneficiary = _Trainer(images, labels, num_classes=num_classes, params=seeded)
    for done in range(epochs):
        if done >= epochs // 2:
            probabilities = predict(beneficiary.model, images).softmax(1)
            sure = probabilities.amax(1) > 0.95
            beneficiary.labels = torch.where(credible, labels, probabilities.argmax(1))
            used = credible | sure
        else:
            used = credible
        measures = beneficiary.epoch(done, lambda losses, chosen: losses * used[chosen])  # noqa: B023
        on_epoch(done + 1, epochs, measures)
    return beneficiary.model.eval()


class _Trainer:
    """Plain training of a fresh model on the undefended schedule, with the losses changed by a function."""

    def __init__(self, images: Tensor, labels: Tensor, *, num_classes: int, params: Params) -> None:
        self.images, self.labels, self.params = images, labels, params
        self.generator = torch.Generator().manual_seed(params.seed + 2)
        size = params.model.image_size
        made = make_model(params.model.architecture, num_classes=num_classes, image_size=size, generator=self.generator)
        self.model = made.to(images.device).train()
        self.sgd = make_sgd(self.model, params.deconfounded)

    def epoch(self, done: int, change: Callable[[Tensor, Tensor], Tensor], *, fixed: float | None = None) -> dict[str, float]:
        """One epoch, the `done`-th of the schedule or at a fixed step size; `change` gets the losses and indices of a batch."""
        settings, measured = self.params.deconfounded, []
        steps = max(1, len(self.labels) // settings.batch_size)
        for step, chosen in enumerate(batches(len(self.labels), settings.batch_size, generator=self.generator)):
            set_learning_rate(self.sgd, fixed or learning_rate(settings, (done + step / steps) / settings.epochs))
            crop, cutout = self.params.model.scaled(settings.crop), self.params.model.scaled(settings.cutout)
            view = augment(
                self.images[chosen], crop=crop, flip=settings.flip, cutout=cutout, noise=settings.noise, generator=self.generator
            )
            with autocast(self.images.device):
                logits = self.model(view)[0].float()
            chosen = chosen.to(self.images.device)
            loss = change(F.cross_entropy(logits, self.labels[chosen], reduction="none"), chosen).mean()
            self.sgd.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.sgd.step()
            measured.append(loss.detach())
        return {"loss": float(torch.stack(measured).mean())}


def _surest(model: Network, images: Tensor, share: float) -> Tensor:
    """bool [N]: the `share` of the images for which the entropy of the model's prediction is lowest."""
    log = predict(model, images).log_softmax(1)
    entropy = -(log.exp() * log).sum(1)
    sure = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    sure[entropy.topk(max(1, round(share * len(images))), largest=False).indices] = True
    return sure
