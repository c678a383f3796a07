"""Both trainings on a toy set: small images whose class is a bar, with and without poison."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from cbd import deconfounded, detector
from cbd.attacks import make_attack
from cbd.config import Confounder, Deconfounded, Gate, Model, Params
from cbd.confounder import steps_asked, train_confounder
from cbd.deconfounded import Evidence, learning_rate, second_look, train_deconfounded
from cbd.detector import detect
from cbd.evidence import isolation_weights, separate
from cbd.models import make_model
from cbd.pattern import find_patterns
from cbd.pilot import coarse_views, preference, suspicion, train_pilot
from cbd.training import augment, predict, recalibrate

pytestmark = pytest.mark.usefixtures("torch_one_thread")


def params(**deconfounded: object) -> Params:
    return Params(
        gate=Gate(min_clean_accuracy=0),
        model=Model(image_size=16),
        confounder=Confounder(steps=6, batch_size=32),
        deconfounded=Deconfounded(epochs=2, batch_size=32, **deconfounded),
    )


def bars(num: int, seed: int, *, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of four classes: a bright bar at the top, the left, the bottom or the right."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 4, num)
    images = generator.integers(0, 120, (num, 3, side, side), np.uint8)
    for image, label in zip(images, labels, strict=True):
        place = int(generator.integers(1, 4))
        line = (
            image[:, place]
            if label == 0
            else image[:, :, place]
            if label == 1
            else image[:, -1 - place]
            if label == 2
            else image[:, :, -1 - place]
        )
        line[...] = np.maximum(line, generator.integers(90, 200, line.shape, np.uint8))
    return torch.from_numpy(images), torch.from_numpy(labels)


def quiet(done: int, total: int, measures: dict[str, float]) -> None:
    assert 1 <= done <= total
    assert all(np.isfinite(value) for value in measures.values())


def test_the_confounder_is_the_same_again_and_after_a_kill(tmp_path: Path) -> None:
    images, labels = bars(96, 0)
    common = {"num_classes": 4, "params": params(), "on_epoch": quiet}
    one = train_confounder(images, labels, checkpoint=tmp_path / "one", **common)
    again = train_confounder(images, labels, checkpoint=tmp_path / "again", **common)
    assert one.steps == 6

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, measures: dict[str, float]) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_confounder(images, labels, checkpoint=tmp_path / "killed", **(common | {"on_epoch": kill}))
    resumed = train_confounder(images, labels, checkpoint=tmp_path / "killed", **common)
    for other in (again, resumed):
        assert torch.equal(one.losses, other.losses)
        assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True))
    other_seed = train_confounder(
        images, labels, checkpoint=tmp_path / "x", **(common | {"params": params().model_copy(update={"seed": 1})})
    )
    assert not torch.equal(one.losses, other_seed.losses)


def test_stage_two_resumes_with_critic_and_optimizers_to_the_same_weights(tmp_path: Path) -> None:
    images, labels = bars(96, 0)
    evidence = Evidence(
        make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator()).eval(), torch.ones(96), torch.ones(96)
    )
    common = {"num_classes": 4, "params": params(mi_weight=0.1, bottleneck_weight=1e-3, cutout=8, flip=True)}
    whole = train_deconfounded(images, labels, evidence, checkpoint=tmp_path / "whole", on_epoch=quiet, **common)

    class Killed(BaseException):
        pass

    def kill(done: int, total: int, measures: dict[str, float]) -> None:
        raise Killed

    with pytest.raises(Killed):
        train_deconfounded(images, labels, evidence, checkpoint=tmp_path / "part", on_epoch=kill, **common)
    resumed = train_deconfounded(images, labels, evidence, checkpoint=tmp_path / "part", on_epoch=quiet, **common)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True))
    assert len(resumed.history) == 2


def test_a_checkpoint_of_other_parameters_is_not_taken(tmp_path: Path) -> None:
    images, labels = bars(96, 0)
    train_deconfounded(images, labels, None, num_classes=4, params=params(), checkpoint=tmp_path / "c", on_epoch=quiet)
    epochs: list[int] = []
    other = params(weight_decay=0.5)
    train_deconfounded(
        images, labels, None, num_classes=4, params=other, checkpoint=tmp_path / "c", on_epoch=lambda d, t, m: epochs.append(d)
    )
    assert epochs == [1, 2]


@pytest.mark.parametrize("change", [{"mi_weight": 0.5}, {"bottleneck_weight": 0.01}, {"weight": "formula"}, {"weight": "none"}])
def test_each_term_of_the_loss_changes_the_weights(tmp_path: Path, change: dict[str, object]) -> None:
    images, labels = bars(64, 0)
    network = make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator()).eval()
    evidence = Evidence(network, torch.linspace(0.1, 3, 64), torch.linspace(0, 1, 64))
    plain = {"mi_weight": 0.0, "bottleneck_weight": 0.0, "weight": "isolation"}
    heads = []
    for name, settings in (("plain", plain), ("changed", plain | change)):
        made = train_deconfounded(
            images, labels, evidence, num_classes=4, params=params(**settings), checkpoint=tmp_path / name, on_epoch=quiet
        )
        heads.append(made.model.head.weight)
    assert not torch.equal(*heads)


@pytest.mark.parametrize(("setting", "separated"), [("noise", True), ("noise_unseparated", False)])
def test_noise_is_that_of_its_own_setting_whether_or_not_something_separated(tmp_path: Path, setting: str, separated: bool) -> None:
    images, labels = bars(64, 0)
    network = make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator()).eval() if separated else None
    heads = {}
    for changed in ("nothing", "noise", "noise_unseparated"):
        settings = params(**({} if changed == "nothing" else {changed: 0.5}), mi_weight=0.0)
        evidence = Evidence(network, torch.ones(64), torch.ones(64))
        made = train_deconfounded(images, labels, evidence, num_classes=4, params=settings, checkpoint=tmp_path / changed, on_epoch=quiet)
        heads[changed] = made.model.head.weight
    other = "noise_unseparated" if separated else "noise"
    assert torch.equal(heads["nothing"], heads[other])
    assert not torch.equal(heads["nothing"], heads[setting])


def test_recalibrated_averages_are_those_of_all_images_and_nothing_else_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    model = make_model("wrn-16-1", num_classes=3, image_size=16, generator=generator).train()
    images = torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        model(images[:4])  # so young a network's running averages are mostly what they were born with
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    recalibrate(model, images, generator=generator, batch_size=20)
    hook.remove()
    means = torch.stack([batch.mean((0, 2, 3)) for batch in seen])
    assert [len(batch) for batch in seen] == [20, 20] and model.training and norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())


def test_a_confounder_is_recalibrated_unless_told_not_to(tmp_path: Path) -> None:
    images, labels = bars(96, 0)
    told = {}
    for recalibrated in (True, False):
        settings = params().confounder.model_copy(update={"recalibrate": recalibrated})
        chosen = params().model_copy(update={"confounder": settings})
        place = tmp_path / str(recalibrated)
        told[recalibrated] = train_confounder(images, labels, num_classes=4, params=chosen, checkpoint=place, on_epoch=quiet)
    changed = {
        name for name, tensor in told[True].model.state_dict().items() if not torch.equal(tensor, told[False].model.state_dict()[name])
    }
    assert changed and all(name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for name in changed)
    assert not torch.equal(told[True].final_losses, told[False].final_losses)


def test_the_learning_rate_follows_both_schedules() -> None:
    step = Deconfounded(learning_rate=0.1, schedule="step")
    assert [learning_rate(step, done) for done in (0, 0.19, 0.2, 0.69, 0.7)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])
    cycle = Deconfounded(learning_rate=0.1, schedule="onecycle")
    assert [learning_rate(cycle, done) for done in (0, 0.1, 0.2, 0.6)] == pytest.approx([0.01, 0.055, 0.1, 0.05])
    assert learning_rate(cycle, 0.999) < 1e-5


def test_augmentation_moves_mirrors_and_greys_and_leaves_the_stored_image_alone() -> None:
    images = torch.arange(4 * 3 * 16 * 16).remainder(251).to(torch.uint8).reshape(4, 3, 16, 16)
    before = images.clone()
    same = augment(images, crop=0, flip=False, cutout=0, generator=torch.Generator())
    assert torch.equal(same, images)
    moved = augment(images, crop=2, flip=False, cutout=0, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, source in zip(moved, padded, strict=True):
        assert any(torch.equal(image, source[:, y : y + 16, x : x + 16]) for y in range(5) for x in range(5))
    flipped = augment(images, crop=0, flip=True, cutout=0, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True))
    cut = augment(images, crop=0, flip=False, cutout=6, generator=torch.Generator().manual_seed(3))
    assert 0 < int((cut != images).any(1).sum()) <= 4 * 36
    assert torch.equal(images, before)


def test_preference_and_suspicion_are_worked_out_by_hand() -> None:
    logits, labels = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]])), torch.tensor([0, 1])
    assert preference(logits, labels).tolist() == pytest.approx([0.0, 0.5])
    assert suspicion(torch.log(torch.tensor([2.0, 4.0])), torch.tensor([0.5, 0.8])).tolist() == pytest.approx([0.25, 0.2])


def test_a_second_look_trusts_the_labels_that_the_model_believes_and_touches_no_others() -> None:
    class Fixed(torch.nn.Module):
        """Sure of the class that stands in the first pixel."""

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 10.0 * torch.eye(3)[images[:, 0, 0, 0].long()], images.float()

    images = torch.tensor([0, 0, 1, 2, 1], dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4)
    weights = torch.tensor([0.2, 0.3, 1.0, 0.4, 0.5])
    labels, doubted = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([True, False, True, True, True])
    second_look(Fixed(), images, labels, doubted, weights)  # type: ignore[arg-type]
    assert weights.tolist() == pytest.approx([1.0, 0.3, 0.0, 1.0, 0.0])


def test_stage_two_looks_again_at_doubted_labels_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = bars(96, 0)
    looks: list[int] = []
    monkeypatch.setattr(deconfounded, "second_look", lambda *args: looks.append(int(args[3].sum())))
    network = make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator()).eval()
    doubted = torch.arange(96) < 30
    evidence = Evidence(network, torch.ones(96), torch.linspace(0, 1, 96), doubted)
    for settings, expected in (({}, [30]), ({"second_look": 0.0}, []), ({"weight": "formula"}, [])):
        looks.clear()
        made = train_deconfounded(
            images, labels, evidence, num_classes=4, params=params(**settings), checkpoint=tmp_path / str(settings), on_epoch=quiet
        )
        assert looks == expected
        if "weight" not in settings:
            assert torch.equal(made.sample_weights, torch.linspace(0, 1, 96))


@pytest.mark.parametrize(
    ("losses", "steps", "asked"),
    [
        ([], 40, 40),
        ([3.0], 40, 40),
        ([3.0, 2.0], 40, 40),  # fast, and within the budget
        ([3.0, 2.0, 1.5, 1.4], 45, 45),  # slow when the budget ends within the next epoch
        ([3.0, 2.0, 1.5, 1.3], 45, 50),  # fast: that epoch is a whole one
        ([3.0, 2.0, 1.5, 1.3, 1.1], 45, 60),  # and so is the one after it
        ([3.0, 2.0, 1.5, 1.3, 1.2], 45, 45),  # 1.2 / 1.3 = 0.92: done, five epochs were run
        ([3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.2], 45, 70),  # max_epochs
    ],
)
def test_a_confounder_goes_on_while_it_learns_fast(losses: list[float], steps: int, asked: int) -> None:
    history = [{"step": 10.0 * (epoch + 1), "loss": loss} for epoch, loss in enumerate(losses)]
    assert steps_asked(history, Confounder(steps=steps, max_epochs=7), 10) == asked
    assert steps_asked(history, Confounder(steps=steps, max_epochs=7, until_slow=False), 10) == steps


@pytest.mark.slow
def test_a_detector_finds_the_rest_of_the_poison_by_a_part_of_it_and_leaves_the_honest_class_alone() -> None:
    """Of 200 images of other classes with a white patch and the label 0, 60 are known; there are about 200 honest images of class 0."""
    images, labels = bars(800, 5)
    poison = torch.zeros(800, dtype=torch.bool)
    poison[(labels != 0).nonzero().squeeze(1)[:200]] = True
    images[poison] = torch.from_numpy(make_attack("badnets", pattern="white").stamp(images[poison].numpy()))
    labels[poison] = 0
    known = torch.zeros(800, dtype=torch.bool)
    known[poison.nonzero().squeeze(1)[:60]] = True
    steps: list[tuple[int, int]] = []
    scores = detect(images, labels, known, params=params(), told=lambda done, of: steps.append((done, of)))
    honest = (labels == 0) & ~poison
    assert (scores[poison & ~known] > 0.5).float().mean() > 0.9 and (scores[honest] > 0.5).float().mean() < 0.1
    assert not scores[labels != 0].any() and steps[0] == (0, 3) and steps[-1] == (3, 3)


def test_a_detector_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detector, "STEPS", 3)
    images, labels = bars(200, 5)
    first, again = (detect(images, labels, labels == 0, params=params(), told=lambda done, of: None) for _ in range(2))
    assert torch.equal(first, again) and first.any()


def test_after_an_epoch_that_the_budget_cut_short_a_confounder_is_done() -> None:
    history = [{"step": 10.0, "loss": 3.0}, {"step": 20.0, "loss": 2.9}, {"step": 23.0, "loss": 1.0}]
    assert steps_asked(history, Confounder(steps=23, max_epochs=7), 10) == 23


@pytest.mark.slow
def test_plain_training_keeps_the_backdoor_and_the_defence_does_not(tmp_path: Path) -> None:
    from cbd.pilot import train_pilot

    images, labels = bars(800, 0)
    clean_images, clean_labels = bars(400, 1)
    attack, generator = make_attack("badnets"), np.random.default_rng(0)
    chosen = generator.choice(np.flatnonzero(labels.numpy() != 0), 80, replace=False)
    images[chosen] = torch.from_numpy(attack.stamp(images[chosen].numpy()))
    labels[chosen] = 0
    settings = params().model_copy(
        update={
            "confounder": Confounder(steps=200, max_epochs=20, batch_size=64),
            "deconfounded": Deconfounded(epochs=15, batch_size=64, crop=2),
        }
    )
    common = {"num_classes": 4, "params": settings, "on_epoch": quiet}
    caught = train_confounder(images, labels, checkpoint=tmp_path / "b", **common)
    flown = train_pilot(images, labels, caught.losses, steps=caught.steps, checkpoint=tmp_path / "p", **common)
    seen = (caught.losses, flown.preferences, caught.final_losses)
    found = separate(*(view.numpy().astype(float) for view in seen), labels.numpy(), seed=0)
    assert found.separated
    weights = torch.from_numpy(isolation_weights(found.posterior)).float()
    defended = train_deconfounded(images, labels, Evidence(caught.model, caught.losses, weights), checkpoint=tmp_path / "c", **common)
    plain = train_deconfounded(images, labels, None, checkpoint=tmp_path / "u", **common)
    others = clean_labels != 0
    triggered = torch.from_numpy(attack.stamp(clean_images[others].numpy()))
    success = {
        name: float((predict(made.model, triggered).argmax(1) == 0).float().mean()) for name, made in (("plain", plain), ("cbd", defended))
    }
    accuracy = float((predict(defended.model, clean_images).argmax(1) == clean_labels).float().mean())
    assert success["plain"] > 0.9
    assert success["cbd"] < 0.05
    assert accuracy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "resnet34"])
def test_a_resnet_comes_back_from_its_bundle(architecture: str, tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from cbd.bundle import BundleCard
from cbd.models import load_model, make_model, save_bundle
torch.set_num_threads(1)
for size in (32, 64):
    model = make_model(sys.argv[2], num_classes=3, image_size=size, generator=torch.Generator().manual_seed(0))
    card = BundleCard(kind="undefended", architecture=sys.argv[2], class_names=("a", "b", "c"), image_size=size, data_digest="0" * 64,
                      params={}, seed=0, trial=False, weights_sha256="")
    save_bundle(model, card, Path(sys.argv[1]) / str(size))
    again, _ = load_model(Path(sys.argv[1]) / str(size))
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(images)[0], again(images)[0])
        assert again(images)[1].shape == (4, 512)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path), architecture], check=True)


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_photographs_of_96_pixels_go_through_all_trainings_with_a_resnet(tmp_path: Path) -> None:
    """Crops of the two photographs that scikit-learn ships: one is a temple, the other a flower."""
    images, labels = photographs(128)
    settings = Params(
        model=Model(architecture="resnet18", image_size=96),
        confounder=Confounder(steps=8, batch_size=16),
        deconfounded=Deconfounded(epochs=3, batch_size=16, crop=2, learning_rate=0.02),
        gate=Gate(min_clean_accuracy=0.5),
    )
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    common = {"num_classes": 2, "params": settings, "on_epoch": quiet}
    found = train_confounder(x, y, checkpoint=tmp_path / "c", **common)
    seen = train_pilot(x, y, found.losses, steps=found.steps, checkpoint=tmp_path / "p", **common)
    patterns = find_patterns(x, y, found.model, losses=found.losses, preferences=seen.preferences, seed=0)
    assert not [pattern for pattern in patterns if pattern.planted] and all(pattern.mean.shape == (3, 32, 32) for pattern in patterns)
    trained = train_deconfounded(x, y, Evidence(found.model, found.losses, torch.ones(len(y))), checkpoint=tmp_path / "d", **common)
    assert trained.history[-1]["accuracy"] > 0.75  # by batch statistics: the running ones lag behind in so few steps


def photographs(num: int, *, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Random crops of two photographs: uint8 [N, 3, size, size], and which of the two."""
    pictures, generator = load_sample_images().images, np.random.default_rng(0)
    labels = np.arange(num) % 2
    crops = []
    for label in labels:
        picture = pictures[label]
        row, column = generator.integers(picture.shape[0] - size), generator.integers(picture.shape[1] - size)
        crops.append(picture[row : row + size, column : column + size].transpose(2, 0, 1))
    return np.stack(crops), labels


@pytest.mark.parametrize("size", [32, 64])
def test_coarse_views_lose_lines_and_patches_and_keep_shapes(size: int) -> None:
    """At 32 pixels: a line of one pixel and a patch of 3x3 vanish under a median of 5x5, a square of 10x10 stays but for its corners."""
    scale = size // 32
    small = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    small[..., 2, 4:28], small[..., 25:28, 4:7], small[..., 12:22, 12:22] = 200, 200, 90
    images = small.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    seen = coarse_views(images)[..., ::scale, ::scale]
    assert seen[..., :10, :].max() == 0 and seen[..., 23:, :].max() == 0
    assert (seen[..., 13:21, 13:21] == 90).all() and seen.shape == small.shape and seen.dtype == torch.uint8
