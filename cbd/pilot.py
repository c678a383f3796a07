"""Stage 1b: the pilot, a short training that learns the classes but not the trigger: the second view of every sample.

Until a trigger is learned, a poisoned sample with a changed label is simply a mislabelled one. The pilot is kept in that state: what it
contradicts while the confounder finds it easy loses its weight before the trigger is learned. Its logits carry the log prior of the
given labels (Menon et al., ICLR 2021, logit adjustment), so that a target class swollen by poison gets no head start. It sees coarse
views alone: a median over a window wipes out patches, lines and noise that are smaller than half of it, and leaves the shape of things.

Where it learns the trigger all the same (one that shows in coarse views, among classes that take longer), it contradicts some of the
poison at first and less and less of it. Then it flies once more, without everything that might carry the trigger.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from cbd.config import Params
from cbd.distributed import by_shares, spread
from cbd.evidence import reversal
from cbd.models import make_model
from cbd.training import OnEpoch, Session, augment, autocast, batches, make_sgd, mean_measures, predict, recalibrate

RISE, FALL = 0.5, 0.1
"""How far the running preference follows a new look upwards and downwards: what was suspect once is let back in slowly."""


SIDE, REACH = 32, 2
"""The median's window reaches this far from its middle on views of `SIDE` pixels: 5x5 in all."""


@dataclass(frozen=True)
class Pilot:
    """What the pilot leaves behind."""

    preferences: Tensor
    """float32 [N] in [0, 1]: running mean of how far the pilot prefers another class than the given label."""
    logits: Tensor
    """float32 [N, K]: its last look, without the log prior of the labels that it was trained with."""
    counts: Tensor
    """int64 [K]: how many labels of each class it was trained with."""
    history: list[dict[str, float]]


def coarse_views(images: Tensor) -> Tensor:
    """The median over 5x5 pixels around every pixel of every channel, at 32 pixels image side: uint8 [N, 3, S, S], as `images`.

    Larger images are shrunk to that side first and enlarged again after, on smaller ones the window is smaller. At the border the
    outermost pixels are repeated.
    """
    size, views = images.shape[-1], torch.empty_like(images)
    reach = max(1, round(REACH * min(size, SIDE) / SIDE))
    for start in range(0, len(images), 256):
        part = images[start : start + 256]
        small = part if size <= SIDE else F.interpolate(part.float(), (SIDE, SIDE), mode="area").round().to(torch.uint8)
        padded = F.pad(small.float(), (reach,) * 4, mode="replicate").to(torch.uint8)
        windows = padded.unfold(2, 2 * reach + 1, 1).unfold(3, 2 * reach + 1, 1).flatten(4)
        median = windows.median(-1).values
        views[start : start + 256] = median if size <= SIDE else F.interpolate(median, (size, size), mode="nearest")
    return views


def preference(logits: Tensor, labels: Tensor) -> Tensor:
    """max_k p(k) - p(label), float [N] in [0, 1]: how far a model prefers another class than the given label.

    Args:
        logits: float [N, K].
        labels: int64 [N], as given.
    """
    probabilities = logits.softmax(1)
    return probabilities.amax(1) - probabilities.gather(1, labels[:, None]).squeeze(1)


def remember(running: Tensor, seen: Tensor) -> Tensor:
    """The running preference after another look: it rises by half of the way and falls by a tenth of it; all float [N]."""
    return torch.where(seen > running, running + RISE * (seen - running), running + FALL * (seen - running))


def suspicion(losses: Tensor, preferences: Tensor) -> Tensor:
    """p_b(label) * preference, float [N] in [0, 1]: the two-sided evidence that a sample is poisoned.

    High only where the confounder finds the given label easy (p_b = exp(-loss)) and the pilot prefers another class. An easy clean sample
    is easy for both, a hard or mislabelled one is hard for both.
    """
    return torch.exp(-losses) * preferences


def train_pilot(
    images: Tensor,
    labels: Tensor,
    losses: Tensor,
    *,
    steps: int,
    num_classes: int,
    params: Params,
    checkpoint: Path,
    on_epoch: OnEpoch,
    without: Tensor | None = None,
) -> Pilot:
    """Runs the pilot; what it makes suspect is let go of as it goes on.

    A sample is looked at whenever its turn to be trained on comes, before that step, and once at the end.

    Args:
        images: uint8 [N, 3, S, S] on the device to train on.
        labels: int64 [N], as given, on the same device.
        losses: float32 [N], the confounder's.
        steps: how many; as many as the confounder took.
        num_classes: K.
        params: the seed and the sections `model` and `confounder`.
        checkpoint: file that is written after every epoch.
        on_epoch: called after every epoch.
        without: bool [N], samples that it looks at and does not learn from; None for none.
    """
    settings, num, device = params.confounder, len(labels), images.device
    generator = torch.Generator().manual_seed(params.seed + 1)
    model = make_model(params.model.architecture, num_classes=num_classes, image_size=params.model.image_size, generator=generator)
    model.to(device).train()
    optimizer = make_sgd(model, settings.model_copy(update={"learning_rate": settings.pilot_learning_rate, "weight_decay": 5e-4}))
    forward = spread(model)
    steps_per_epoch = max(1, num // settings.batch_size)
    epochs = -(-steps // steps_per_epoch)
    images = coarse_views(images)
    learned = torch.ones(num, device=device) if without is None else (~without).float().to(device)
    counts = labels[learned > 0].bincount(minlength=num_classes)
    losses, log_prior = losses.to(device), (counts.clamp_min(1) / num).log()
    session = Session({"model": model}, {"sgd": optimizer}, generator, {"preference": torch.zeros(num, device=device)})
    told = hashlib.sha256(learned.bool().cpu().numpy().tobytes()).hexdigest()[:16]
    key = f"pilot {steps} {told} {params.model_dump_json(include={'seed', 'model', 'confounder'})}"
    session.resume(checkpoint, key=key)
    while session.epoch < epochs:
        measured, first = [], session.epoch * steps_per_epoch
        for step, chosen in enumerate(batches(num, settings.batch_size, generator=generator), first + 1):
            if step > steps:
                break
            running = session.tables["preference"][chosen]
            weight = learned[chosen] * (1 - suspicion(losses[chosen], running)) ** 4
            view = augment(images[chosen], crop=params.model.scaled(4), flip=False, cutout=0, generator=generator)
            with autocast(device):
                logits = forward(view)[0].float()
            session.tables["preference"][chosen] = remember(running, preference(logits.detach(), labels[chosen]))
            adjusted = logits + log_prior
            loss = (weight * F.cross_entropy(adjusted, labels[chosen], reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            measured.append((loss.detach(), (adjusted.argmax(1) == labels[chosen]).float().mean()))
        reached = {"step": float(min(steps, first + steps_per_epoch)), "evidence": evidence_so_far(losses, session.tables["preference"])}
        session.finish_epoch(checkpoint, key=key, measures={**reached, **mean_measures(measured)})
        on_epoch(session.epoch, epochs, session.history[-1])
    recalibrate(model, images, generator=generator)
    logits = by_shares(partial(predict, model), images)
    seen = preference(logits, labels)
    return Pilot(remember(session.tables["preference"], seen).cpu(), logits.cpu(), counts.cpu(), session.history)


def evidence_so_far(losses: Tensor, preferences: Tensor) -> float:
    """-log10 of the p-value of the reversal with the preferences as they stand: 0 is none; when it rises no more, the pilot is ready."""
    return -reversal(losses.cpu().double().numpy(), preferences.cpu().double().numpy()).log10_p_value
