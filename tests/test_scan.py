"""The scan for unknown triggers: statistic, p-values, inversion, transfer, its record and what the gate makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cbd import scan as inversion
from cbd.anomaly import MIN_CLASSES, anomaly_indices, enough_controls, monte_carlo_p_value, p_value, rank_p_value
from cbd.bundle import BundleCard, bundle_digest
from cbd.config import Gate
from cbd.dataset import make_row, to_batches, write_dataset
from cbd.errors import DataError
from cbd.gate.unknown import check_unknown
from cbd.models import make_model, save_bundle
from cbd.scan import Triggers, invert, split, squeeze, strongest, transfers
from cbd.scan_record import read_scan
from components.scan import _halves, scan, scan_step
from tests.delivery_files import png

POLICY = Gate(min_clean_accuracy=0.5)
CLASSES = ("a", "b", "c", "d", "e")
SIDE = 8


class Backdoored(nn.Module):
    """Built, not trained: calls an image by the brightest of its first five rows, but class 0 if its last pixel is bright."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(CLASSES))
        self.strength = nn.Parameter(torch.tensor(strength))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = images.to(torch.float32) / 255
        logits = 20 * x[:, 0, : len(CLASSES)].mean(2)
        planted = self.strength * torch.relu(x[:, :, -1, -1].mean(1) - 0.1)
        return logits + planted[:, None] * nn.functional.one_hot(torch.tensor(0), len(CLASSES)), x[:, 0, 0, :1]


def rows_of(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Dim images uint8 [N, 3, 8, 8], each with one bright row that names its class."""
    generator = np.random.default_rng(0)
    labels = np.arange(num) % len(CLASSES)
    images = generator.integers(0, 40, (num, 3, SIDE, SIDE)).astype(np.uint8)
    images[np.arange(num), :, labels] = 160
    return images, labels.astype(np.int64)


def inverted(strength: float, seed: int = 0) -> tuple[Any, Triggers]:
    images, labels = rows_of(100)
    network: Any = Backdoored(strength)
    generator = torch.Generator().manual_seed(seed)
    return network, invert(network, torch.from_numpy(images), torch.from_numpy(labels), generator=generator)


def test_the_anomaly_index_is_worked_out_by_hand() -> None:
    """log norms 1, 3, 4, 5, 6: median 4, absolute deviations 3, 1, 0, 1, 2, their median 1."""
    found = anomaly_indices(np.array([1.0, 3.0, 4.0, 5.0, 6.0]))
    assert found == pytest.approx(np.array([3, 1, 0, -1, -2]) / 1.4826)
    assert np.isfinite(anomaly_indices(np.array([1.0, 4.0, 4.0, 4.0, 4.0]))).all()
    assert anomaly_indices(np.full(5, 2.0)).max() == 0


def test_a_rank_counts_itself_and_ties() -> None:
    null = np.array([1.0, 2.0, 3.0])
    assert rank_p_value(3.5, null) == 1 / 4
    assert rank_p_value(2.0, null) == 3 / 4
    assert rank_p_value(0.0, null) == 1


@pytest.mark.parametrize("num_classes", [5, 10, 43])
def test_the_monte_carlo_p_value_is_uniform_where_no_class_stands_out(num_classes: int) -> None:
    """Of 300 draws of normal log norms a share alpha has p <= alpha, within three standard errors."""
    generator = np.random.default_rng(1)
    drawn = anomaly_indices(4 + 0.5 * generator.standard_normal((300, num_classes))).max(-1)
    found = np.array([monte_carlo_p_value(float(one), num_classes, seed=2) for one in drawn])
    for alpha in (0.05, 0.2, 0.5, 0.8):
        assert abs((found <= alpha).mean() - alpha) < 3 * math.sqrt(alpha * (1 - alpha) / 300)


def test_an_index_of_two_is_nothing_special_among_ten_classes() -> None:
    assert monte_carlo_p_value(2.0, 10, seed=0) > 0.2
    assert monte_carlo_p_value(8.0, 10, seed=0) < 0.02


def test_the_method_depends_on_classes_and_controls() -> None:
    norms = [1.0, 4.0, 4.1, 4.2, 4.3]
    assert p_value(norms, [], alpha=0.02, seed=0)[2] == "monte-carlo"
    assert p_value(norms, [0.0] * 48, alpha=0.02, seed=0)[2] == "monte-carlo"
    assert p_value(norms, [0.0] * 49, alpha=0.02, seed=0)[1:] == (1 / 50, "controls")
    assert p_value(norms[: MIN_CLASSES - 1], [], alpha=0.02, seed=0) == (None, None, "not-applicable")
    assert p_value(norms[:2], [0.0] * 49, alpha=0.02, seed=0)[2] == "controls"
    assert [enough_controls(n, 0.05) for n in (18, 19)] == [False, True]


def test_the_split_is_by_name_alone_and_about_half() -> None:
    names = [f"image-{number}" for number in range(1000)]
    test = split(names)
    assert 400 < test.sum() < 600
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (split([names[index] for index in shuffled]) == test[shuffled]).all()
    assert len(set(split(["track-7"] * 20))) == 1


@pytest.mark.usefixtures("torch_one_thread")
def test_a_planted_pixel_is_recovered_and_its_class_stands_out() -> None:
    network, found = inverted(strength=40.0)
    assert int(found.norms.argmin()) == 0
    assert float(found.norms[0]) < 1.5
    assert float(found.masks[0, 0, -1, -1]) > 0.3
    assert float(found.masks[0].sum() - found.masks[0, 0, -1, -1]) < 0.5
    statistic, p, _ = p_value(found.norms.double().log().tolist(), [], alpha=0.02, seed=0)
    assert statistic is not None and p is not None and p <= 0.02
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.usefixtures("torch_one_thread")
def test_without_the_plant_nothing_stands_out() -> None:
    _, found = inverted(strength=0.0)
    _, p, _ = p_value(found.norms.double().log().tolist(), [], alpha=0.02, seed=0)
    assert p is not None and p > 0.02


@pytest.mark.usefixtures("torch_one_thread")
def test_the_same_seed_inverts_the_same_bytes() -> None:
    first, again, other = (inverted(40.0, seed)[1] for seed in (1, 1, 2))
    assert first.masks.numpy().tobytes() == again.masks.numpy().tobytes()
    assert first.norms.tolist() == again.norms.tolist()
    assert first.masks.numpy().tobytes() != other.masks.numpy().tobytes()


@pytest.mark.usefixtures("torch_one_thread")
def test_at_the_same_norm_the_planted_class_turns_images_and_others_do_not() -> None:
    network, found = inverted(strength=40.0)
    images, labels = rows_of(200)
    before = images.copy()
    squeezed = squeeze(
        network,
        torch.from_numpy(images[:100]),
        torch.from_numpy(labels[:100]),
        triggers=found,
        budget=0.6,
        generator=torch.Generator().manual_seed(0),
    )
    assert (squeezed.masks.sum((1, 2, 3)) <= 0.6).all()
    held_out = images[100:], labels[100:]
    (k, n), *others = transfers(network, *held_out, triggers=squeezed, targets=range(5))
    assert n == 80
    assert k > 60
    assert max(k for k, _ in others) < 10
    assert (images == before).all()
    assert transfers(Backdoored(0.0), *held_out, triggers=squeezed, targets=[0])[0][0] < 10  # type: ignore[arg-type]


def test_of_other_classes_those_whose_triggers_turn_most_of_a_few_images_are_measured_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five triggers on 20 of 100 images (one more pass for what the images are called as they are), and the best on all 100."""
    monkeypatch.setattr(inversion, "SCREEN_IMAGES", 20)
    monkeypatch.setattr("cbd.evaluate.FINALISTS", 1)
    network, found = inverted(strength=40.0)
    images, labels = rows_of(100)
    ((k, n),) = transfers(network, images, labels, triggers=found, targets=[0])
    tried: list[int] = []
    network.register_forward_pre_hook(lambda _, views: tried.append(len(views[0])))
    best = strongest(network, images, labels, triggers=found, targets=[0, 1, 2, 3, 4])
    ((most, of),) = transfers(network, images, labels, triggers=found, targets=best)
    assert most / of >= k / n > 0.6 and sum(tried) == (1 + 5) * 20 + (1 + 1) * 100
    assert strongest(network, images, labels, triggers=found, targets=[]) == []


def test_of_many_held_out_images_some_of_every_class_are_stamped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trusted set in the order of its classes: the first 40 of about 150 were all of one or two classes."""
    monkeypatch.setattr(inversion, "TEST_IMAGES", 40)
    rows = (make_row(png(i), label=i // 60, original_path=f"{i:03}.png", source="acme") for i in range(300))
    write_dataset(tmp_path / "trusted", to_batches(rows), class_names=CLASSES, supplier="acme")
    halves = _halves(tmp_path / "trusted", 16, seed=0)
    assert len(halves.test_labels) == 40 and set(halves.test_labels.tolist()) == {0, 1, 2, 3, 4}
    assert (_halves(tmp_path / "trusted", 16, seed=0).test_images == halves.test_images).all()


def test_a_class_that_no_trigger_reaches_counts_as_the_full_image() -> None:
    """Nothing is ever called class 4."""
    network: Any = Backdoored(40.0)
    plain = network.forward
    network.forward = lambda images: (plain(images)[0] - 1000 * nn.functional.one_hot(torch.tensor(4), 5), plain(images)[1])
    images, labels = rows_of(50)
    found = invert(network, torch.from_numpy(images), torch.from_numpy(labels), generator=torch.Generator().manual_seed(0))
    assert (float(found.norms[4]), float(found.success[4])) == (SIDE * SIDE, 0.0)
    assert (found.success[:4] >= inversion.SUCCESS).all()


def test_a_network_that_reads_bytes_is_inverted_through_floats() -> None:
    """`Normalise` works in place on floats: neither the images nor the triggers may change under it."""
    network = make_model("wrn-16-1", num_classes=3, image_size=16, generator=torch.Generator().manual_seed(0)).eval()
    images = torch.randint(256, (20, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    triggers = Triggers(torch.rand(3, 1, 16, 16), torch.rand(3, 3, 16, 16), torch.ones(3), torch.ones(3))
    kept = triggers.masks.clone(), triggers.patterns.clone(), images.clone()
    triggers.masks.requires_grad_()
    logits = network(triggers.stamp(images).flatten(0, 1))[0]
    logits.sum().backward()
    assert triggers.masks.grad is not None and float(triggers.masks.grad.abs().sum()) > 0
    for now, before in zip((triggers.masks, triggers.patterns, images), kept, strict=True):
        assert torch.equal(now.detach(), before)


def trusted_set(folder: Path, num: int = 40) -> Path:
    rows = (make_row(png(i), label=i % len(CLASSES), original_path=f"{i:03}.png", source="acme") for i in range(num))
    write_dataset(folder, to_batches(rows), class_names=CLASSES, supplier="acme")
    return folder


def bundle(folder: Path, *, seed: int = 0, kind: Any = "deconfounded", classes: tuple[str, ...] = CLASSES) -> Path:
    model = make_model("wrn-16-1", num_classes=len(classes), image_size=16, generator=torch.Generator().manual_seed(seed))
    values: dict[str, Any] = {"architecture": "wrn-16-1", "class_names": classes, "image_size": 16, "data_digest": "0" * 64}
    save_bundle(model, BundleCard(kind=kind, params={}, seed=0, trial=False, weights_sha256="", **values), folder)
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 4, "PATIENCE": 2, "BATCH_SIZE": 4}.items():
        monkeypatch.setattr(inversion, name, value)


@pytest.mark.usefixtures("short", "torch_one_thread")
def test_a_scan_is_what_the_gate_reads_beside_pictures_of_the_triggers(tmp_path: Path) -> None:
    model, confounder = bundle(tmp_path / "model"), bundle(tmp_path / "confounder", seed=1, kind="confounder")
    trusted = trusted_set(tmp_path / "trusted")
    told = scan(model, confounder, trusted, tmp_path / "out", policy=POLICY.model_copy(update={"scan_alpha": 0.999}), seed=0)
    found = read_scan(json.loads((tmp_path / "out" / "scan.json").read_text()))
    assert (found.model_digest, found.confounder_digest) == (bundle_digest(model), bundle_digest(confounder))
    assert found.num_cal + found.num_test == 40
    assert {row.source for row in found.transfer} <= {"candidate", "confounder"}
    assert told["candidate"]["p_value"] == found.candidate.p_value
    with Image.open(tmp_path / "out" / "triggers.png") as picture:
        assert picture.size == (5 * 20, 2 * 20)


@pytest.mark.usefixtures("short", "torch_one_thread")
def test_controls_are_ranked_and_a_scan_in_their_folder_is_used(tmp_path: Path) -> None:
    trusted, policy = trusted_set(tmp_path / "trusted"), POLICY.model_copy(update={"scan_alpha": 0.5})
    model, control = bundle(tmp_path / "model"), bundle(tmp_path / "control", seed=1)
    scan(model, None, trusted, tmp_path / "out", policy=policy, seed=0, controls=[control])
    anew = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert (anew["candidate"]["method"], anew["num_controls"], anew["confounder"]) == ("controls", 1, None)
    scan(control, None, trusted, tmp_path / "of-control", policy=policy, seed=0)
    known = json.loads((tmp_path / "of-control" / "scan.json").read_text())
    known["candidate"]["log_norms"] = [0.0, 9.0, 9.0, 9.0, 9.0]
    known["candidate"] |= {"method": "monte-carlo", "statistic": 180.0, "p_value": 0.0001, "flagged": 0}
    known["transfer"] = [{"source": "candidate", "target": 0, "k": 0, "n": 1, "null": 0.0}]
    (control / "scan.json").write_text(json.dumps(known))
    scan(model, None, trusted, tmp_path / "again", policy=policy, seed=0, controls=[control])
    assert json.loads((tmp_path / "again" / "scan.json").read_text())["candidate"]["p_value"] == 1.0


def test_models_of_other_classes_are_refused(tmp_path: Path) -> None:
    trusted, model = trusted_set(tmp_path / "trusted"), bundle(tmp_path / "model", classes=("a", "b", "c", "d", "x"))
    with pytest.raises(DataError, match=r"model: 16 pixels, classes \['a', 'b', 'c', 'd', 'x'\]; expected 16"):
        scan(model, None, trusted, tmp_path / "out", policy=POLICY, seed=0)
    assert not (tmp_path / "out").exists()


def test_the_step_is_a_component_with_the_gate_as_its_policy() -> None:
    assert {"gate", "seed", "records"} <= set(scan_step.component_spec.inputs)


def entry(norms: list[float], p: float | None = 0.5, flagged: int | None = None) -> dict[str, Any]:
    statistic = None if p is None else float(anomaly_indices(np.array(norms)).max())
    method = "not-applicable" if p is None else "monte-carlo"
    return {"log_norms": norms, "success": [0.9] * len(norms), "unreached": [], "statistic": statistic, "p_value": p} | {
        "method": method,
        "flagged": flagged,
    }


def row(k: int, null: float, source: str = "candidate") -> dict[str, Any]:
    return {"source": source, "target": 0, "k": k, "n": 300, "null": null}


def record(**changes: Any) -> dict[str, Any]:
    """A scan of five classes in which nothing stands out, or one with `changes`."""
    values = {
        "schema_version": 1,
        "model_digest": "a" * 64,
        "confounder_digest": "b" * 64,
        "trusted_digest": "c" * 64,
        "seed": 0,
        "num_classes": 5,
        "num_cal": 350,
        "num_test": 350,
        "num_controls": 0,
        "scan_alpha": 0.02,
        "candidate": entry([3.0, 4.0, 4.1, 4.2, 4.3]),
        "confounder": entry([4.0, 4.0, 4.1, 4.2, 4.3]),
        "transfer": [row(180, 0.55)],
        "seconds": 5.0,
    }
    return {**values, **changes}


FLAGGED = entry([1.0, 4.0, 4.1, 4.2, 4.3], p=0.001, flagged=0)


def results(scanned: dict[str, Any] | None) -> list[str]:
    return [check["result"] for check in check_unknown(None if scanned is None else read_scan(scanned), POLICY)]


def test_nothing_standing_out_passes_and_no_scan_never_does() -> None:
    assert results(record()) == ["PASS", "PASS"]
    assert results(None) == ["REVIEW"]


def test_at_equal_norm_a_trigger_is_held_back_also_where_no_size_can_stand_out() -> None:
    """220 of 300 is at least 68.8 %, 210 of 300 at least 65.3 %: beside a null of 18 % over and under 68 %."""
    for about in ({}, {"candidate": entry([3.0, 4.0, 4.1, 4.2, 4.3], p=None)}):
        assert results(record(**about, transfer=[row(220, 0.18)])) == ["PASS", "REVIEW"]
        assert results(record(**about, transfer=[row(210, 0.18)])) == ["PASS", "PASS"]


def test_a_flagged_candidate_is_reviewed_and_blocked_where_its_trigger_works_on_held_out_images() -> None:
    """Lower bounds at 95 %: 90 of 300 is at least 25.6 %, 75 of 300 at least 20.9 %, 72 of 300 at least 20.0 %: under max(20 %, ...)."""
    assert results(record(candidate=FLAGGED, transfer=[row(90, 0.05)])) == ["REVIEW", "BLOCK"]
    assert results(record(candidate=FLAGGED, transfer=[row(75, 0.05)])) == ["REVIEW", "BLOCK"]
    assert results(record(candidate=FLAGGED, transfer=[row(71, 0.05)])) == ["REVIEW", "REVIEW"]
    assert results(record(candidate=FLAGGED, transfer=[row(90, 0.16)])) == ["REVIEW", "REVIEW"]
    assert results(record(candidate=FLAGGED, transfer=[row(300, 0.95)])) == ["REVIEW", "REVIEW"]


def test_a_find_on_the_confounder_is_told_and_blocks_only_if_it_works_on_the_candidate() -> None:
    own = row(180, 0.55)
    assert results(record(confounder=FLAGGED, transfer=[own, row(5, 0.0, "confounder")])) == ["PASS", "PASS", "PASS"]
    assert results(record(confounder=FLAGGED, transfer=[own, row(200, 0.1, "confounder")])) == ["PASS", "PASS", "BLOCK"]


def test_too_few_held_out_images_are_inconclusive_whatever_stands_out() -> None:
    few = record(num_test=149, candidate=FLAGGED, transfer=[{**row(140, 0.0), "n": 145}])
    assert results(few) == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert results(few | {"num_test": 150}) == ["REVIEW", "BLOCK"]


def test_a_stricter_policy_than_that_of_the_scan_counts() -> None:
    scanned = read_scan(record(candidate=FLAGGED, transfer=[row(90, 0.05)]))
    strict = POLICY.model_copy(update={"scan_alpha": 0.0005})
    assert [check["result"] for check in check_unknown(scanned, strict)] == ["PASS", "PASS"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"confounder": None}, "one is there without the other"),
        ({"transfer": []}, "transfer tells of nothing"),
        ({"transfer": [row(1, 0.0, "confounder")]}, "expected [('candidate', 0)]"),
        ({"candidate": FLAGGED, "transfer": [row(301, 0.0)]}, "301 of 300"),
        ({"candidate": FLAGGED, "transfer": [{**row(1, 0.0), "n": 351}]}, "351 with 350 held-out images"),
        ({"candidate": {**FLAGGED, "flagged": None}}, "class None is flagged; the smallest trigger is of 0"),
        ({"candidate": {**FLAGGED, "p_value": 0.5}}, "class 0 is flagged"),
        ({"candidate": {**FLAGGED, "statistic": 1.0}}, "statistic is 1.0, its norms give"),
        ({"candidate": {**entry([3.0, 4.0, 4.1, 4.2, 4.3]), "method": "controls"}}, "ranked among 0 controls"),
        ({"candidate": {**entry([3.0, 4.0, 4.1, 4.2, 4.3]), "p_value": None}}, "method 'monte-carlo' with"),
        ({"candidate": entry([3.0, 4.0, 4.1, 4.2])}, "4 norms and 4 shares of 5 classes"),
        ({"candidate": {**FLAGGED, "unreached": [5]}}, "unreached class that there is not"),
        ({"num_test": 350.0}, "'num_test'"),
        ({"seconds": math.nan}, "'seconds'"),
        ({"extra": 1}, "'extra'"),
    ],
)
def test_a_scan_that_contradicts_itself_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match="scan the model again") as refused:
        read_scan(record(**changes))
    assert said in str(refused.value)
