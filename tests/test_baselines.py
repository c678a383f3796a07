"""Other defences, on a toy set: they train, repeat to the same bytes, and do what their papers say."""

from pathlib import Path

import pytest
import torch

from cbd.baselines import train_baseline
from cbd.config import Deconfounded, Gate, Model, Params
from cbd.models import Network
from cbd.training import predict

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("torch_one_thread")]


def toy(num: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dark and bright noise; a fifth of the bright images carry a white corner and are called dark."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    images = (torch.randint(0, 100, (num, 3, 16, 16), generator=generator) + 100 * labels[:, None, None, None]).to(torch.uint8)
    poisoned = torch.zeros(num, dtype=torch.bool)
    poisoned[torch.arange(1, num, 10)] = True
    images[poisoned, :, -4:, -4:], labels[poisoned] = 255, 0
    return images, labels, poisoned


def train(name: str, place: Path, *, epochs: int = 6) -> Network:
    images, labels, poisoned = toy()
    params = Params(
        model=Model(image_size=16),
        deconfounded=Deconfounded(epochs=epochs, batch_size=16, crop=0, noise=0, weight="none", mi_weight=0, learning_rate=0.02),
        gate=Gate(min_clean_accuracy=0.5),
    )
    place.mkdir(exist_ok=True)
    return train_baseline(
        name, images, labels, poisoned=poisoned, num_classes=2, params=params, checkpoint=place / "c", on_epoch=lambda *_: None
    )


@pytest.mark.parametrize("name", ["abl", "vb", "random-filter", "perfect-filter"])
def test_the_same_seed_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    first, again = (train(name, tmp_path / part, epochs=2).state_dict() for part in ("a", "b"))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_perfect_filter_keeps_the_backdoor_out_and_a_random_one_of_the_same_size_does_not(tmp_path: Path) -> None:
    images, _, poisoned = toy()
    success = {
        name: float((predict(train(name, tmp_path / name), images[poisoned]).argmax(1) == 0).float().mean())
        for name in ("random-filter", "perfect-filter")
    }
    assert success["perfect-filter"] < 0.2 < 0.8 < success["random-filter"], success
