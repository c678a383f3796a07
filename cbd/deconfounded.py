"""Stage 2: the deconfounded model, trained on the same untrusted data, and plain training for comparison."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbd.config import Deconfounded, Params
from cbd.distributed import by_shares, spread
from cbd.evidence import BELIEVED
from cbd.losses import Critic, derangement, distance_correlation, hsic, sample_weight, wasserstein_dependence
from cbd.models import Network, make_model
from cbd.training import OnEpoch, Session, augment, autocast, batches, embeddings, make_sgd, mean_measures, predict, set_learning_rate

SURE = 0.9
"""Probability above which a model's own class replaces the label of a suspect."""


@dataclass(frozen=True)
class Evidence:
    """What stage 1 found, as stage 2 uses it; all on the device of the images."""

    confounder: Network | None
    """None: it looked and nothing separated, so it holds nothing that the model should be made independent of."""
    losses: Tensor
    """float32 [N]: the confounder's losses."""
    weights: Tensor
    """float32 [N] in [0, 1]: weights for `isolation`; 1 everywhere if nothing separated."""
    doubted: Tensor | None = None
    """bool [N]: samples of crowded classes, whose labels are worth little in either direction; None: there are none."""


@dataclass(frozen=True)
class Trained:
    """A trained model, and how it left every sample; the tables are float32 and int64 [N] on the CPU."""

    model: Network
    final_losses: Tensor
    predicted: Tensor
    sample_weights: Tensor
    history: list[dict[str, float]]


def train_deconfounded(
    images: Tensor, labels: Tensor, evidence: Evidence | None, *, num_classes: int, params: Params, checkpoint: Path, on_epoch: OnEpoch
) -> Trained:
    """The deconfounded model; without evidence plain, undefended training on the same schedule.

    Loss of a batch (Zhang et al., CVPR 2023, section 3): mean(w * l_c) + mi_weight * I(r; z) + bottleneck_weight * mean ||z||^2.

    Args:
        images: uint8 [N, 3, S, S] on the device to train on.
        labels: int64 [N], as given, on the same device.
        evidence: what stage 1 found; None for plain training.
        num_classes: K.
        params: the seed and the sections `model` and `deconfounded`.
        checkpoint: file that is written after every epoch, and from which a killed training goes on to the same weights.
        on_epoch: called after every epoch.
    """
    settings, num = params.deconfounded, len(labels)
    noise = settings.noise_unseparated if evidence is not None and evidence.confounder is None else settings.noise
    generator = torch.Generator().manual_seed(params.seed + 2)
    model = make_model(params.model.architecture, num_classes=num_classes, image_size=params.model.image_size, generator=generator)
    model.to(images.device).train()
    forward = spread(model)
    models: dict[str, nn.Module] = {"model": model}
    optimizers: dict[str, torch.optim.Optimizer] = {"sgd": make_sgd(model, settings)}
    objective = _Objective(settings, evidence, images, generator)
    if evidence is not None and evidence.confounder is not None and settings.mi_weight and settings.dependence == "adversarial":
        models["critic"] = objective.make_critic(model, evidence.confounder)
        optimizers["critic"] = torch.optim.Adam(models["critic"].parameters(), lr=settings.critic_learning_rate)
    weights, doubted = torch.ones(num, device=images.device), None
    if evidence is not None and settings.weight == "isolation":
        weights, doubted = evidence.weights.clone(), evidence.doubted
    session = Session(models, optimizers, generator, {"weight": weights})
    key = f"{'undefended' if evidence is None else 'deconfounded'} {params.model_dump_json(include={'seed', 'model', 'deconfounded'})}"
    session.resume(checkpoint, key=key)
    steps = max(1, num // min(num, settings.batch_size))
    look = max(1, int(settings.second_look * settings.epochs)) if settings.second_look else None
    while session.epoch < settings.epochs:
        if session.epoch == look and doubted is not None:
            second_look(model, images, labels, doubted, session.tables["weight"])
        measured = []
        for step, chosen in enumerate(batches(num, settings.batch_size, generator=generator)):
            done = (session.epoch + step / steps) / settings.epochs
            set_learning_rate(optimizers["sgd"], learning_rate(settings, done))
            crop, cutout = params.model.scaled(settings.crop), params.model.scaled(settings.cutout)
            view = augment(images[chosen], crop=crop, flip=settings.flip, cutout=cutout, noise=noise, generator=generator)
            with autocast(images.device):
                logits, embedding = (output.float() for output in forward(view))
            batch = Batch(chosen, labels[chosen], view, logits, embedding, session.tables["weight"], done)
            loss = objective(batch, critic_step=optimizers.get("critic"))
            optimizers["sgd"].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers["sgd"].step()
            measured.append((loss.detach(), (logits.argmax(1) == labels[chosen]).float().mean()))
        session.finish_epoch(checkpoint, key=key, measures={"epoch": float(session.epoch + 1), **mean_measures(measured)})
        on_epoch(session.epoch, settings.epochs, session.history[-1])
    return _judge_samples(model.eval(), images, labels, evidence, settings, session)


def second_look(model: Network, images: Tensor, labels: Tensor, doubted: Tensor, weights: Tensor) -> None:
    """Sets the weight of every doubted sample: 1 if the model believes its given label more than all others together, else 0.

    Stage 1 splits a crowded class by how hard its samples are, which takes hard honest ones and leaves easy poison. A model that has been
    trained without the taken half, and has not learned the trigger from what was left, knows better.

    Args:
        model: nearly trained.
        images: uint8 [N, 3, S, S].
        labels: int64 [N], as given.
        doubted: bool [N].
        weights: float32 [N], changed in place.
    """
    chosen = doubted.nonzero().squeeze(1)
    if len(chosen):
        losses = F.cross_entropy(predict(model, images[chosen]), labels[chosen], reduction="none")
        weights[chosen] = (losses <= BELIEVED).float()


def learning_rate(settings: Deconfounded, done: float) -> float:
    """Step size after the share `done` of the training, in [0, 1).

    `step`: divided by 10 at 20 % and again at 70 %, as the authors released it. `onecycle`: from a tenth up linearly to the peak at 20 %,
    then down by a cosine to 0 (Smith and Topin, 2019).
    """
    peak = settings.learning_rate
    if settings.schedule == "step":
        return peak * (1.0 if done < 0.2 else 0.1 if done < 0.7 else 0.01)
    if done < 0.2:
        return peak * (0.1 + 0.9 * done / 0.2)
    return peak * 0.5 * (1 + math.cos(math.pi * (done - 0.2) / 0.8))


@dataclass(frozen=True)
class Batch:
    """What the loss of a batch is made of."""

    chosen: Tensor
    """int64 [B]: which samples."""
    given: Tensor
    """int64 [B]: their labels."""
    view: Tensor
    """uint8 [B, 3, S, S]: their augmented views."""
    logits: Tensor
    embedding: Tensor
    running: Tensor
    """float32 [N]: the weights of all samples; `formula` changes them in place."""
    done: float
    """Share of the training that is done, in [0, 1)."""


class _Objective:
    """The loss of a batch, with the critic that belongs to it."""

    def __init__(self, settings: Deconfounded, evidence: Evidence | None, images: Tensor, generator: torch.Generator) -> None:
        self.settings, self.evidence, self.generator = settings, evidence, generator
        self.critic: Critic | None = None
        self.augmented = evidence is not None and settings.confounder_view == "augmented"
        self.stored: Tensor | None = None
        if evidence is not None and evidence.confounder is not None and settings.mi_weight and not self.augmented:
            self.stored = by_shares(partial(embeddings, evidence.confounder), images)  # r once for all epochs: the confounder is frozen

    def make_critic(self, model: Network, confounder: Network) -> Critic:
        """The critic, initialised from the generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=self.generator)))
            self.critic = Critic(confounder.embedding_size, model.embedding_size).to(next(model.parameters()).device)
        return self.critic

    def __call__(self, batch: Batch, *, critic_step: torch.optim.Optimizer | None) -> Tensor:
        """The scalar loss of a batch; the critic takes its own step on the way, on detached embeddings."""
        own = F.cross_entropy(batch.logits, batch.given, reduction="none")
        if self.evidence is None:
            return own.mean()
        theirs, r = self._confounder(self.evidence, batch)
        loss = (self._weight(self.evidence, own, theirs, batch) * own).mean()
        if self.settings.relabel and batch.done >= 0.5:
            loss = loss + self._relabelled(batch)
        if self.settings.mi_weight and r is not None:
            loss = loss + self.settings.mi_weight * self._dependence(r, batch.embedding, critic_step)
        if self.settings.bottleneck_weight:
            loss = loss + self.settings.bottleneck_weight * batch.embedding.square().sum(1).mean()
        return loss

    def _confounder(self, evidence: Evidence, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The confounder's losses l_b [B] and embeddings r [B, R] (None if nothing needs them), on the view that the settings name."""
        if not self.augmented or evidence.confounder is None:
            return evidence.losses[batch.chosen], None if self.stored is None else self.stored[batch.chosen]
        with torch.no_grad(), autocast(batch.view.device):
            logits, r = (output.float() for output in by_shares(evidence.confounder, batch.view))
        return F.cross_entropy(logits, batch.given, reduction="none"), r

    def _weight(self, evidence: Evidence, own: Tensor, theirs: Tensor, batch: Batch) -> Tensor:
        if self.settings.weight == "none":
            return torch.ones_like(own)
        if self.settings.weight == "isolation":
            return batch.running[batch.chosen]
        weight = sample_weight(theirs, own, normalise=self.settings.normalise_weight)
        if self.settings.weight_memory:
            weight = torch.lerp(weight, batch.running[batch.chosen], self.settings.weight_memory)
            batch.running[batch.chosen] = weight
        return weight if self.settings.weight_cap == 1 else weight.clamp_max(self.settings.weight_cap)

    def _relabelled(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch's suspects against the class that the model gives them with a probability over `SURE`, else 0."""
        sure, called = batch.logits.detach().softmax(1).max(1)
        chosen = (batch.running[batch.chosen] < 0.5) & (sure > SURE)
        return (F.cross_entropy(batch.logits, called, reduction="none") * chosen).mean()

    def _dependence(self, r: Tensor, z: Tensor, critic_step: torch.optim.Optimizer | None) -> Tensor:
        if self.critic is None or critic_step is None:
            return distance_correlation(r, z) if self.settings.dependence == "distance_correlation" else hsic(r, z)
        others = derangement(len(z), generator=self.generator).to(z.device)
        critic_step.zero_grad()
        (-wasserstein_dependence(self.critic, r, z.detach(), others)).backward()  # type: ignore[no-untyped-call]
        critic_step.step()
        return wasserstein_dependence(self.critic, r, z, others)


def _judge_samples(
    model: Network, images: Tensor, labels: Tensor, evidence: Evidence | None, settings: Deconfounded, session: Session
) -> Trained:
    """Where training left every sample, on its stored view."""
    logits = by_shares(partial(predict, model), images)
    final = F.cross_entropy(logits, labels, reduction="none")
    weights = torch.ones_like(final)
    if evidence is not None and settings.weight == "isolation":
        weights = session.tables["weight"]
    elif evidence is not None and settings.weight == "formula":
        weights = sample_weight(evidence.losses, final)
    return Trained(model, final.cpu(), logits.argmax(1).cpu(), weights.cpu(), session.history)
