"""Do the two views tell a group apart, who is in it, and which classes are crowded: worked out by hand and on made-up planes."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cbd.crowds import crowded_classes
from cbd.evidence import (
    Separation,
    detection,
    isolation_weights,
    rank_samples,
    reversal,
    separate,
    swallowed,
    teaches,
    with_groups,
)


def plane(poisoned: int) -> tuple[np.ndarray, np.ndarray]:
    """900 clean samples from easy for both to hard for both, and `poisoned` that only the confounder finds easy."""
    generator = np.random.default_rng(0)
    hard = generator.beta(1, 4, 900)
    losses = np.exp(
        np.concatenate((-3 + 3 * hard + 0.3 * generator.standard_normal(900), -3.5 + 0.3 * generator.standard_normal(poisoned)))
    )
    preferences = np.concatenate((0.5 * hard * generator.random(900), generator.beta(8, 2, poisoned)))
    return losses, preferences


def given(num: int, *, poisoned: int = 0) -> np.ndarray:
    """Labels of ten classes, the last `poisoned` of them 0."""
    labels = np.random.default_rng(1).integers(10, size=num)
    labels[num - poisoned :] = 0
    return labels


def test_a_reversal_is_worked_out_by_hand() -> None:
    """The example of docs/method.md: of 1,000 samples 200 are easy and 100 contradicted; 40 are both, where chance would put 20."""
    losses, preferences = np.full(1000, 2.0), np.full(1000, 0.1)
    losses[:200], preferences[160:260] = 1.0, 0.9
    found = reversal(losses, preferences)
    tail = sum(math.comb(100, k) * math.comb(900, 200 - k) for k in range(40, 101)) / math.comb(1000, 200)
    assert tail == pytest.approx(8.85e-7, rel=0.01)
    assert found.p_value == pytest.approx(80 * tail) and found.log10_p_value == pytest.approx(math.log10(80 * tail))
    assert np.flatnonzero(found.inside).tolist() == list(range(160, 200))


def test_views_that_agree_or_know_nothing_of_each_other_show_no_reversal() -> None:
    generator = np.random.default_rng(0)
    losses = np.exp(generator.standard_normal(2000))
    assert reversal(losses, 1 - np.exp(-losses)).p_value == 1
    assert reversal(losses, generator.random(2000)).p_value > 0.01
    assert reversal(losses, np.exp(-losses)).log10_p_value < -100


def preferred(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How far these logits prefer another class than the given label."""
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return probabilities.max(1) - probabilities[np.arange(len(labels)), labels]


def crowd(contradicted: list[int], *, size: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes of `size` samples, so many of each contradicted and hard."""
    labels = np.repeat(np.arange(len(contradicted)), size)
    against = np.concatenate([np.arange(size) < num for num in contradicted])
    generator = np.random.default_rng(0)
    losses = np.exp(generator.normal(np.where(against, 1.0, -1.0), 0.2))
    called = np.where(against, (labels + 1) % len(contradicted), labels)
    return losses, 3.0 * np.eye(len(contradicted))[called], labels


def test_a_class_with_far_more_contradicted_labels_than_any_other_is_crowded_by_its_harder_samples() -> None:
    """60 of 200 against at most 10 of 200: the limit is 20 of 200, and P(X >= 60) for 200 at 0.1 is tiny."""
    losses, logits, labels = crowd([60, 10, 6, 10])
    (found,) = crowded_classes(losses, preferred(logits, labels), logits, labels, known=np.zeros(800, bool), counts=np.bincount(labels))
    assert found.label == 0 and found.members.tolist() == list(range(60)) and found.share == 0.3
    assert found.p_value == pytest.approx(4 * sum(math.comb(200, k) * 0.1**k * 0.9 ** (200 - k) for k in range(60, 201)), rel=1e-6)


def test_a_hard_class_that_is_confused_with_another_is_not_crowded_and_neither_is_what_is_known_already() -> None:
    losses, logits, labels = crowd([60, 40, 6, 10])
    assert crowded_classes(losses, preferred(logits, labels), logits, labels, known=np.zeros(800, bool), counts=np.bincount(labels)) == []
    losses, logits, labels = crowd([60, 10, 6, 10])
    assert crowded_classes(losses, preferred(logits, labels), logits, labels, known=np.arange(800) < 50, counts=np.bincount(labels)) == []


def test_a_last_look_that_jumps_in_a_small_class_hides_no_crowded_one() -> None:
    """The running preferences contradict 60 of 200 labels against 10; the last look also 30 of another 40."""
    losses, logits, labels = crowd([60, 10, 6, 0])
    running, jumped = preferred(logits, labels), logits.copy()
    labels = np.where((labels == 3) & (np.arange(800) >= 640), 2, labels)
    jumped[600:630] = 3.0 * np.eye(4)[0]
    (found,) = crowded_classes(losses, running, jumped, labels, known=np.zeros(800, bool), counts=np.bincount(labels))
    assert found.label == 0


def test_the_rest_of_a_class_that_was_swollen_by_known_poison_is_not_crowded() -> None:
    """Of 400 labels 300 are known: the pilot was held back by log 4 in that class, so that the other 100 look contradicted, and are not."""
    losses, logits, labels = crowd([0, 10, 10, 10], size=400)
    known = np.arange(1600) < 300
    logits[labels == 0, 0] = 1.0
    logits[labels == 0, 1] = 1.0 + math.log(4)
    probabilities = np.exp(logits[399]) / np.exp(logits[399]).sum()
    assert probabilities.max() - probabilities[0] == pytest.approx(0.523, abs=0.001)
    assert crowded_classes(losses, preferred(logits, labels), logits, labels, known=known, counts=np.bincount(labels)) == []
    (found,) = crowded_classes(losses, preferred(logits, labels), logits, labels, known=np.zeros(1600, bool), counts=np.bincount(labels))
    assert found.label == 0 and found.share == 1.0


def test_a_class_judged_by_the_last_look_is_compared_with_the_last_looks_at_others() -> None:
    """100 of 200 labels are known, 60 of the rest contradicted. Of another class the mean contradicts 10 of 200, the last look 70."""
    losses, logits, labels = crowd([60, 10, 6, 10])
    last, known = crowd([60, 70, 6, 10])[1], (np.arange(800) >= 100) & (np.arange(800) < 200)
    about: dict[str, Any] = {"known": known, "counts": np.bincount(labels)}
    (found,) = crowded_classes(losses, preferred(logits, labels), logits, labels, **about)
    assert found.label == 0 and found.share == 0.6
    assert crowded_classes(losses, preferred(logits, labels), last, labels, **about) == []


def test_groups_of_other_views_are_added_to_a_separation() -> None:
    nothing = Separation(False, 1.0, None, 0.0, np.zeros(10))
    assert with_groups(nothing, []) is nothing
    found = with_groups(nothing, [(np.array([1, 2]), 1.0), (np.array([2, 7]), np.array([0.6, 0.7]))])
    assert found.separated and found.share == 0.3 and found.posterior[[0, 1, 2, 7]].tolist() == [0, 1, 1, 0.7]
    assert not nothing.posterior.any()


def test_a_poisoned_group_is_told_apart_without_its_rate() -> None:
    for poisoned in (30, 100, 300):
        losses, preferences = plane(poisoned)
        labels = given(len(losses), poisoned=poisoned)
        found = separate(losses, preferences, losses, labels, seed=0)
        truth = np.arange(900 + poisoned) >= 900
        assert found.separated
        assert ((found.posterior > 0.5) == truth).mean() > 0.98
        scores = -rank_samples(found.posterior, losses, preferences, np.full(len(losses), 2.0), labels).astype(float)
        measured = detection(scores, truth)
        assert measured is not None
        assert measured["auroc"] > 0.99


def test_poison_that_the_pilot_no_longer_contradicts_is_of_the_group_if_it_is_as_easy_and_all_of_one_class() -> None:
    losses, preferences = plane(300)
    losses[1000:], preferences[1000:] = losses[1000:] ** 2, 0.02 * np.random.default_rng(2).random(200)
    one_class, mixed = given(1200, poisoned=300), given(1200, poisoned=100)
    mixed[900:1000], mixed[1000:] = 0, given(200)
    found, apart = (separate(losses, preferences, losses, labels, seed=0) for labels in (one_class, mixed))
    group, other = found.posterior > 0.5, apart.posterior > 0.5
    assert group[900:].mean() > 0.95 and group[:900].mean() < 0.02
    assert found.joined == pytest.approx(2 / 3, abs=0.03)
    assert other[900:1000].mean() > 0.9 and other[1000:].mean() < 0.1
    assert apart.joined == 0


def test_a_pilot_that_no_longer_contradicts_most_of_the_group_must_do_without_what_is_as_easy_in_its_class() -> None:
    """A group of 20 of class 1 with losses of 0.2: 90 samples of that class are as easy, and 30 of another class count for nothing."""
    labels, losses, posterior = np.repeat([0, 1, 2], 100), np.full(300, 1.0), np.zeros(300)
    losses[110:200], losses[:30] = 0.1, 0.01
    posterior[110:130], losses[110:130] = 1.0, 0.2
    found = Separation(True, 1e-9, 3.0, 20 / 300, posterior, joined=0.6)
    without = swallowed(found, losses, labels)
    assert without is not None and np.flatnonzero(without).tolist() == list(range(110, 200))
    assert swallowed(replace(found, joined=0.5), losses, labels) is None
    assert swallowed(Separation(False, 1.0, None, 0.0, np.zeros(300)), losses, labels) is None


def test_a_group_teaches_a_detector_if_it_is_large_of_one_class_and_no_pattern_explains_it() -> None:
    posterior, labels = np.zeros(300), np.repeat([0, 1, 2], 100)
    posterior[:60] = 1.0
    found = Separation(True, 1e-9, 3.0, 0.2, posterior)
    assert teaches(found, labels, [])
    assert teaches(found, labels, [np.arange(29)]) and not teaches(found, labels, [np.arange(20), np.arange(30)])
    assert not teaches(replace(found, separated=False), labels, [])
    assert not teaches(replace(found, posterior=np.where(np.arange(300) < 49, 1.0, 0.0)), labels, [])
    assert not teaches(found, np.arange(300) % 3, [])


def test_a_suspect_weighs_nothing() -> None:
    assert isolation_weights(np.array([0.0, 0.2, 0.5, 0.8, 1.0])) == pytest.approx([1.0, 0.6, 0.0, 0.0, 0.0])


def test_suspects_whose_label_the_final_model_believes_rank_behind_the_others() -> None:
    """Odds of posterior and of 1 - p_c: 9 * 1/9 = 1, 4 * 9 = 36, 1/999 twice (ties by preference), 1 * 9 = 9, and a posterior of 1."""
    posterior, final = np.array([0.9, 0.8, 0.0, 0.0, 0.5, 1.0]), -np.log([0.9, 0.1, 0.5, 0.5, 0.1, 0.99])
    preferences = np.array([0.1, 0.1, 0.2, 0.3, 0.1, 0.1])
    assert rank_samples(posterior, np.ones(6), preferences, final, np.zeros(6, int)).tolist() == [3, 1, 5, 4, 2, 0]


def test_of_samples_equally_doubted_those_of_a_class_with_suspects_rank_first() -> None:
    """Mean posteriors 0.5 and 0.2, odds 1 and 1/4: with odds of the samples of 1/4, 4, 1/4 and 1/4, sums of 1/4, 4, 1/16 and 1/16."""
    posterior, even = np.array([0.2, 0.8, 0.2, 0.2]), np.full(4, -np.log(0.5))
    preferences = np.array([0.0, 0.0, 0.1, 0.2])
    assert rank_samples(posterior, np.ones(4), preferences, even, np.array([0, 0, 1, 1])).tolist() == [1, 0, 3, 2]
    assert rank_samples(posterior, np.ones(4), preferences, even, np.zeros(4, int)).tolist() == [3, 0, 2, 1]


def test_a_trigger_that_was_learned_late_separates_by_the_last_losses() -> None:
    losses, preferences = plane(100)
    on_average = np.exp(np.random.default_rng(1).normal(0, 0.3, len(losses)))
    found = separate(on_average, preferences, losses, given(1000, poisoned=100), seed=0)
    assert found.separated and ((found.posterior > 0.5) == (np.arange(1000) >= 900)).mean() > 0.98
    assert found.p_value == pytest.approx(2 * reversal(losses, preferences).p_value)


def test_a_confounder_that_learned_nothing_separates_nothing() -> None:
    losses, preferences = plane(100)
    assert separate(losses, preferences, np.full(1000, 0.6), given(1000, poisoned=100), seed=0).separated
    assert separate(losses, preferences, np.full(1000, 2.3), given(1000, poisoned=100), seed=0).separated is False


def test_nothing_separates_on_clean_samples_and_every_weight_stays_one() -> None:
    losses, preferences = plane(0)
    found = separate(losses, preferences, losses, given(900), seed=0)
    assert found.separated is False
    assert not found.posterior.any()


def test_mislabelled_samples_alone_do_not_separate() -> None:
    losses, preferences = plane(100)
    losses[900:] = np.exp(1 + 0.2 * np.random.default_rng(1).standard_normal(100))
    assert separate(losses, preferences, losses, given(1000, poisoned=100), seed=0).separated is False


def test_too_few_or_constant_samples_do_not_separate() -> None:
    assert separate(np.ones(20), np.zeros(20), np.ones(20), given(20), seed=0).separated is False
    assert separate(np.ones(200), np.linspace(0, 1, 200), np.ones(200), given(200), seed=0).separated is False


def test_detection_is_unknown_without_both_kinds() -> None:
    assert detection(np.arange(4.0), np.zeros(4, bool)) is None
