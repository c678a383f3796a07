"""Stage 1c: a detector that learns what a group of poisoned samples carries, and looks for it in the rest of their class.

The confounder and the pilot contradict each other about a part of the poison; about the rest, learned by both or by none, they agree. But
the part that they found is of images of all other classes with one trigger on them. A network that tells it from the other classes' images
as they are has nothing to go by but the trigger; honest images of the group's class it never sees while it learns. What it takes for
poison there joins the group, and the next one learns from all of them (self-training, as with positive and unlabelled samples).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cbd.config import Params
from cbd.models import make_model
from cbd.training import augment, autocast, make_sgd, predict, set_learning_rate

STEPS, BATCH_SIZE, LEARNING_RATE, CROP = 240, 128, 0.05, 2
MAX_ROUNDS, GROWTH = 3, 1.1
"""Another detector is trained while the last one let the group grow by this."""


def detect(images: Tensor, labels: Tensor, group: Tensor, *, params: Params, told: Callable[[int, int], None]) -> Tensor:
    """float32 [N] in [0, 1], on the CPU: how far the last detector takes each sample of the group's class for poison; elsewhere 0.

    Args:
        images: uint8 [N, 3, S, S] on the device to train on.
        labels: int64 [N], as given, on the same device.
        group: bool [N], of one class for the most part; what is not of that class is left out.
        params: the seed and the sections `model` and `confounder`.
        told: called with (detectors trained, detectors at most).
    """
    group = group.to(labels.device)
    own_class = labels == labels[group].mode().values
    members, scores = group & own_class, torch.zeros(len(labels))
    for number in range(MAX_ROUNDS):
        told(number, MAX_ROUNDS)
        scores = _train(images, members, ~own_class, params=params, seed=params.seed + 3 + number)
        grown = members | (own_class & (scores > 0.5))
        slow = int(grown.sum()) < GROWTH * int(members.sum())
        members = grown
        if slow:
            break
    told(MAX_ROUNDS, MAX_ROUNDS)
    return (scores * own_class).cpu()


def _train(images: Tensor, members: Tensor, others: Tensor, *, params: Params, seed: int) -> Tensor:
    """float32 [N]: the probability of being like a member that a network gives, which saw as many members as others."""
    generator = torch.Generator().manual_seed(seed)
    size = params.model.image_size
    model = make_model(params.model.architecture, num_classes=2, image_size=size, generator=generator).to(images.device).train()
    optimizer = make_sgd(model, params.confounder.model_copy(update={"learning_rate": LEARNING_RATE, "weight_decay": 5e-4}))
    half = BATCH_SIZE // 2
    wanted = torch.cat((torch.ones(half), torch.zeros(half))).long().to(images.device)
    pools = [mask.nonzero().squeeze(1) for mask in (members, others)]
    for step in range(STEPS):
        set_learning_rate(optimizer, LEARNING_RATE * (1 - step / STEPS))
        chosen = torch.cat([pool[torch.randint(len(pool), (half,), generator=generator).to(pool.device)] for pool in pools])
        view = augment(images[chosen], crop=params.model.scaled(CROP), flip=False, cutout=0, generator=generator)
        with autocast(images.device):
            logits = model(view)[0].float()
        loss = F.cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return predict(model, images).softmax(1)[:, 1]
