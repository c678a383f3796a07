"""The gate's checks on the canary, the samples and repeated attempts: worked examples, and that blindness never passes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harmless_scan import SCAN
from hypothesis import given
from hypothesis import strategies as st

from cbd.canary import plan_canary
from cbd.config import Canary, Gate
from cbd.errors import DataError
from cbd.gate import VERDICTS, Judgement, decide, spent
from cbd.gate.statistics import poison_fraction
from cbd.rates import rate

Make = Callable[..., dict[str, Any]]
POLICY = Gate(min_clean_accuracy=0.9, confidence=0.9)
VALID = {"passed": True, "critical": [], "warnings": []}
NOTHING = {"steps": 400, "separated": False, "gap": None, "asr": None}


def judge(evaluation: dict[str, Any], canary: dict[str, Any] | None = None, *, policy: Gate = POLICY, attempt: int = 1) -> Judgement:
    return decide(evaluation, VALID, policy=policy, trial=False, canary=canary, scan=SCAN, attempt=attempt)


def of(judgement: Judgement, name: str) -> dict[str, Any]:
    return dict(next(check for check in judgement["checks"] if check["name"] == name))


def nobody_suspected() -> dict[str, Any]:
    parts = [{"name": name, "k": 0, "n": 1000} for name in ("ant", "bee", "cat", "dog")]
    about = {"data_digest": "b" * 64, "num_images": 4000, "suspects": 0, "followed": rate(0, 0), "kept": rate(0, 0)}
    return about | {"per_class": parts, "per_source": [{"name": "acme", "k": 0, "n": 4000}]}


def samples(suspects: int, followed: tuple[int, int], **sources: tuple[int, int]) -> dict[str, Any]:
    parts = [{"name": name, "k": suspects if name == "ant" else 0, "n": 1000} for name in ("ant", "bee", "cat", "dog")]
    told = sources or {"acme": (suspects, 4000)}
    about = {"data_digest": "b" * 64, "num_images": 4000, "suspects": suspects, "followed": rate(*followed), "kept": rate(0, suspects)}
    return about | {"per_class": parts, "per_source": [{"name": name, "k": k, "n": n} for name, (k, n) in told.items()]}


def test_nothing_separated_passes_only_beside_a_canary_that_was_seen(make_evaluation: Make, make_canary: Make) -> None:
    evaluation = make_evaluation(confounder=NOTHING, samples=nobody_suspected())
    assert judge(evaluation)["verdict"] == "REVIEW"
    judgement = judge(evaluation, make_canary())
    assert judgement["verdict"] == "PASS"
    assert "covers patch, blend, warp" in judgement["sentence"]
    assert "Not covered: sinusoid (followed on 300 of 900)" in judge(evaluation, make_canary(sinusoid={"left": (300, 900)}))["sentence"]
    assert judge(make_evaluation(confounder={**NOTHING, "separated": None}), make_canary())["verdict"] == "REVIEW"


@pytest.mark.parametrize("family", ["patch", "blend"])
def test_blindness_to_a_required_family_is_invalid_and_hides_no_backdoor(make_evaluation: Make, make_canary: Make, family: str) -> None:
    blind = make_canary(**{family: {"found": (0, 50), "learned": (30, 900)}})
    judgement = judge(make_evaluation(), blind)
    assert judgement["verdict"] == "INVALID" and of(judgement, f"canary: {family}")["result"] == "INVALID"
    assert "stage 1 is blind to this family, which is required" in judgement["sentence"]
    assert judge(make_evaluation(turned={"white-centre": (3, 600)}), blind)["verdict"] == "BLOCK"
    unasked = Gate(min_clean_accuracy=0.9, confidence=0.9, required_canaries=())
    assert judge(make_evaluation(), blind, policy=unasked)["verdict"] == "PASS"


def test_a_required_family_that_the_canary_does_not_hold_is_invalid(make_evaluation: Make, make_canary: Make) -> None:
    canary = make_canary()
    canary["families"] = canary["families"][1:]
    assert judge(make_evaluation(), canary)["verdict"] == "INVALID"
    assert "did not hold patch" in judge(make_evaluation(), canary)["sentence"]


def test_a_family_is_seen_by_its_lower_bound_and_by_either_measure(make_evaluation: Make, make_canary: Make) -> None:
    """44 of 50 found has the lower bound 77.8 %, 46 of 50 82.6 %; 738 of 900 learned has 79.8 %, 745 of 900 80.6 %."""
    for counts, seen in (
        ({"found": (44, 50), "learned": (0, 900)}, False),
        ({"found": (46, 50), "learned": (0, 900)}, True),
        ({"found": (0, 50), "learned": (738, 900)}, False),
        ({"found": (0, 50), "learned": (745, 900)}, True),
    ):
        judgement = judge(make_evaluation(), make_canary(patch=counts))
        assert (judgement["verdict"] == "PASS") is seen, counts


def test_a_required_family_that_stage_two_kept_is_for_review_and_another_one_is_named(make_evaluation: Make, make_canary: Make) -> None:
    """75 of 900 has the upper bound 10.0 %: over; 74 has 9.9 %."""
    last = max(k for k in range(200) if (rate(k, 900)["high"] or 1) <= 0.10)
    assert judge(make_evaluation(), make_canary(patch={"left": (last, 900)}))["verdict"] == "PASS"
    judgement = judge(make_evaluation(), make_canary(patch={"left": (last + 1, 900)}))
    assert judgement["verdict"] == "REVIEW" and of(judgement, "canary: patch")["result"] == "REVIEW"
    other = judge(make_evaluation(), make_canary(warp={"left": (last + 1, 900)}))
    assert (
        other["verdict"] == "PASS"
        and f"Not covered: sinusoid (followed on 4 of 900), warp (followed on {last + 1} of 900)" in other["sentence"]
    )


def test_too_few_trusted_images_make_a_kept_family_inconclusive_and_blindness_stays_invalid(
    make_evaluation: Make, make_canary: Make
) -> None:
    few = make_evaluation(num_images=200)
    assert judge(few, make_canary(patch={"left": (60, 150)}))["verdict"] == "INCONCLUSIVE"
    assert judge(few, make_canary(patch={"found": (0, 50), "learned": (0, 150)}))["verdict"] == "INVALID"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("families", 0, "found", "k"), 51),
        (("families", 0, "found", "n"), 49),
        (("families", 0, "left", "rate"), float("nan")),
        (("families", 1, "family"), "patch"),
        (("false_suspects", "k"), -1),
        (("schema_version",), 2),
        (("surprise",), 1),
    ],
)
def test_a_broken_canary_is_refused_in_one_line(make_evaluation: Make, make_canary: Make, path: tuple[Any, ...], value: Any) -> None:
    canary: Any = make_canary()
    place = canary
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(DataError, match=r"^canary\.json: .*run the pipeline again$"):
        judge(make_evaluation(), canary)


def test_a_model_that_follows_its_suspects_is_for_review(make_evaluation: Make) -> None:
    """29 of 400 has the upper bound 9.8 %, 30 of 400 10.0 %."""
    last = max(k for k in range(100) if (rate(k, 400)["high"] or 1) <= 0.10)
    assert judge(make_evaluation(samples=samples(400, (last, 400))))["verdict"] == "PASS"
    judgement = judge(make_evaluation(samples=samples(400, (last + 1, 400))))
    assert judgement["verdict"] == "REVIEW" and "it may have learned them" in judgement["sentence"]


def test_a_model_that_was_trained_on_its_suspects_is_for_review(make_evaluation: Make) -> None:
    """Their labels may be true, or the pilot may have learned the trigger: then nobody follows a doubtful label. 40 of 400 are 10 %."""
    for kept, verdict in ((rate(40, 400), "PASS"), (rate(41, 400), "REVIEW"), (rate(400, 400), "REVIEW"), (None, "REVIEW")):
        judgement = judge(make_evaluation(samples=samples(400, (0, 0)) | {"kept": kept}))
        assert (judgement["verdict"], of(judgement, "suspects kept")["result"]) == (verdict, verdict)
    assert "not measured: evaluate it again" in judgement["sentence"]
    assert of(judge(make_evaluation(samples=nobody_suspected() | {"kept": None})), "suspects kept")["result"] == "PASS", "there are none"


def test_few_suspects_pass_only_if_none_is_followed(make_evaluation: Make) -> None:
    """0 of 20 has the upper bound 13.9 %: none followed is all that can be shown; 5 of 20 is at least 10.4 %."""
    for followed, verdict in ((0, "PASS"), (1, "INCONCLUSIVE"), (5, "REVIEW")):
        assert judge(make_evaluation(samples=samples(20, (followed, 20))))["verdict"] == verdict


def test_without_evidence_on_the_samples_nothing_passes(make_evaluation: Make) -> None:
    assert judge(make_evaluation(samples=None))["verdict"] == "REVIEW"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("suspects", 399),
        ("num_images", 3999),
        ("data_digest", "0" * 64),
        ("followed", rate(1, 500)),
        ("kept", rate(0, 399)),
        ("per_source", []),
    ],
)
def test_samples_that_do_not_add_up_are_refused(make_evaluation: Make, key: str, value: Any) -> None:
    evaluation = make_evaluation()
    evaluation["samples"] = {**evaluation["samples"], key: value}
    with pytest.raises(DataError, match=r"^evaluation\.json: samples"):
        judge(evaluation)


def test_poison_fraction_by_hand() -> None:
    """(0.1 - 0) / (0.8 - 0): an eighth; the bounds take each rate at its own worse bound."""
    flagged, found, false = rate(400, 4000), rate(160, 200), rate(0, 3000)
    told = poison_fraction(flagged, (160, 200), (0, 3000), confidence=0.95, min_gap=0.1)
    assert told is not None
    low, value, high = told
    assert value == pytest.approx(0.125)
    assert low == pytest.approx((flagged["low"] - false["high"]) / (found["high"] - false["high"]))  # type: ignore[operator]
    assert high == pytest.approx(flagged["high"] / found["low"])  # type: ignore[operator]
    assert poison_fraction(flagged, (20, 200), (200, 3000), confidence=0.95, min_gap=0.1) is None
    assert poison_fraction(rate(0, 0), (160, 200), (0, 3000), confidence=0.95, min_gap=0.1) is None


@given(st.integers(0, 2000), st.integers(0, 100), st.integers(0, 500))
def test_the_poison_fraction_lies_within_its_bounds_and_these_within_0_and_1(flagged: int, found: int, false: int) -> None:
    told = poison_fraction(rate(flagged, 2000), (found, 100), (false, 500), confidence=0.95, min_gap=0.1)
    assert told is None or 0 <= told[0] <= told[1] <= told[2] <= 1


def test_the_fraction_leaves_out_what_the_canary_found_of_this_datas_own_suspects(make_evaluation: Make, make_canary: Make) -> None:
    """400 suspects in the data and 400 of 3,800 others in the canary on it: none of these is false. 147 of 200 planted were found."""
    check = of(judge(make_evaluation(), make_canary()), "poison fraction")
    assert check["value"] == pytest.approx(0.1 / (147 / 200))
    elsewhere = {**make_canary(), "data_digest": "0" * 64}
    assert of(judge(make_evaluation(), elsewhere), "poison fraction")["value"] == pytest.approx(0, abs=0.01)


def test_a_supplier_and_a_class_with_more_suspects_than_the_others_are_named(make_evaluation: Make) -> None:
    judgement = judge(make_evaluation(samples=samples(400, (4, 390), acme=(390, 1000), zeta=(10, 3000))))
    assert "acme" in of(judgement, "suspects by supplier")["sentence"] and "zeta" not in of(judgement, "suspects by supplier")["sentence"]
    assert "'ant' (400 of 1000)" in of(judgement, "suspects by class")["sentence"]
    assert "0 of 1" in of(judge(make_evaluation()), "suspects by supplier")["sentence"]


def test_attempts_together_spend_no_more_than_alpha(make_evaluation: Make) -> None:
    """5 % is halved by every attempt: 97.5 %, 98.75 %, ...; 34 of 900 passes the first and not the fourth."""
    policy = Gate(min_clean_accuracy=0.9)
    assert [spent(policy, i).confidence for i in (1, 2, 3)] == pytest.approx([0.975, 0.9875, 0.99375])
    assert sum(1 - spent(policy, i).confidence for i in range(1, 50)) <= 0.05
    last = max(k for k in range(46) if (rate(k, 900, confidence=0.975)["high"] or 1) < 0.05)
    evaluation = make_evaluation(turned={"blend-0.2": (1, last)})
    assert judge(evaluation, policy=policy)["verdict"] == "PASS"
    judgement = judge(evaluation, policy=policy, attempt=4)
    assert judgement["verdict"] == "REVIEW" and of(judgement, "attempt")["value"] == 4


@given(st.integers(1, 12), st.integers(0, 900))
def test_a_later_attempt_never_gets_a_better_verdict_than_review(make_evaluation: Make, attempt: int, k: int) -> None:
    evaluation = make_evaluation(turned={"blend-0.1": (2, k)})
    first, later = (judge(evaluation, attempt=i)["verdict"] for i in (1, attempt))
    assert later == first or "REVIEW" in (first, later)
    assert not (first != "PASS" and later == "PASS"), VERDICTS


def test_a_plan_is_the_same_again_differs_by_data_and_gives_every_family_a_target_of_its_own() -> None:
    labels = np.repeat(np.arange(10), [120] + [100] * 9)
    about = {"num_classes": 10, "seed": 0}
    plan = plan_canary(labels, Canary(), data_digest="a" * 64, **about)
    assert plan == plan_canary(labels, Canary(), data_digest="a" * 64, **about)
    assert plan != plan_canary(labels, Canary(), data_digest="b" * 64, **about)
    assert [plant.family for plant in plan] == ["sinusoid", "patch", "blend", "warp"]
    assert len({plant.target_label for plant in plan}) == 4
    small = plan_canary(np.repeat(np.arange(3), [20, 30, 25]), Canary(), data_digest="a" * 64, num_classes=3, seed=0)
    assert (small[0].target_label, small[0].num_images) == (1, 15)
    assert [plant.num_images for plant in plan] == [50, 50, 50, 50]
    many = plan_canary(np.repeat(np.arange(10), 1000), Canary(), data_digest="a" * 64, **about)
    assert {plant.num_images for plant in many} == {100}


def test_a_plan_never_takes_more_than_there_is() -> None:
    for labels in (np.array([0] * 30 + [1] * 8), np.repeat(np.arange(3), 20), np.zeros(5, np.int64)):
        for plant in plan_canary(labels, Canary(), num_classes=3, data_digest="c" * 64, seed=1):
            allowed = (labels == plant.target_label) if plant.family == "sinusoid" else labels != plant.target_label
            assert 0 < plant.num_images <= allowed.sum() // 2


def test_without_a_scan_nothing_passes_and_too_few_held_out_images_are_inconclusive(make_evaluation: Make) -> None:
    judgement = decide(make_evaluation(), VALID, policy=POLICY, trial=False)
    assert judgement["verdict"] == "REVIEW" and "not scanned for unknown triggers" in judgement["sentence"]
    few = {**SCAN, "num_test": 149, "transfer": [{**SCAN["transfer"][0], "k": 100, "n": 140}]}
    assert decide(make_evaluation(), VALID, policy=POLICY, trial=False, scan=few)["verdict"] == "INCONCLUSIVE"
