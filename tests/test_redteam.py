"""Rows of the red team: what they hold, that nothing is measured twice, and what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_delivery import REDTEAM_PARAMS, write_small

from cbd.bundle import read_card
from cbd.config import Params
from cbd.errors import ConfigError
from pipelines import cli, redteam, redteam_row, redteam_table
from pipelines.options import load, split


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 90 delivered and 48 trusted scans of three digits, and small parameters."""
    return write_small(tmp_path_factory.mktemp("redteam"), params=REDTEAM_PARAMS)


def run(place: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any, str]:
    arguments = ["redteam", "--data", str(place / "delivery"), "--trusted", str(place / "trusted"), "--params", str(place / "params.yaml")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--out", str(place / "out"), "--json", *more])
    told = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(told.out.splitlines()[-1]), told.err


def test_rates_by_group_count_each_group_once() -> None:
    """Two of three frames of one video and none of the only frame of another: 2 of 4 frames, and (2/3 + 0) / 2 of the videos."""
    hit, groups = np.array([True, True, False, False]), np.array([0, 0, 0, 2])
    assert redteam_row._mean_of_groups(hit, groups) == pytest.approx(1 / 3)
    rows = [dict.fromkeys([*redteam_row.COLUMNS, *redteam_row.DETECTION, "seconds"], 0.5)]
    assert "asr_by_group" not in redteam_table.render(rows)
    assert "asr_by_group" in redteam_table.render([rows[0] | {"num_groups": 2, "asr_by_group": 0.5}])


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_trusted_images_are_grouped_by_their_paths(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--attacks", "badnets", "--presets", "none")
    _, told, _ = run(place, capsys, *more, "--group-by", r"^\d+")
    (row,) = told["rows"]
    assert row["num_groups"] == 3 and row["ca_by_group"] == pytest.approx(row["ca"]) and 0 <= row["asr_by_group"] <= 1
    for pattern, message in (("(", "no regular expression"), ("x", "matches nothing in")):
        code, _, err = run(place, capsys, *more, "--group-by", pattern)
        assert code == 2 and message in err


def test_all_stands_for_the_six_attacks_beside_others_and_a_name_counts_once() -> None:
    assert split("clean, all,clean,b", ("a", "b"), "--attacks", more=("clean",)) == ("clean", "a", "b")
    with pytest.raises(ConfigError, match="--attacks 'c': expected all, or some of a,b"):
        split("all,c", ("a", "b"), "--attacks")


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_rows_hold_all_measures_and_are_not_measured_twice(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(place, capsys, "--attacks", "badnets,sig", "--presets", "none,cbd")
    assert code == 0
    rows = told["rows"]
    assert [(row["attack"], row["preset"]) for row in rows] == [("badnets", "none"), ("badnets", "cbd"), ("sig", "none"), ("sig", "cbd")]
    assert [row["poison_rate"] for row in rows] == pytest.approx([0.1, 0.1, 15 / 90, 15 / 90])
    for row in rows:
        assert 0 <= row["ca"] <= 1 and -1 <= row["excess_asr"] <= row["asr"] <= 1 and row["asr"] + row["robust_accuracy"] <= 1 + 1e-9
        assert (row["auroc"] is None) == (row["preset"] == "none") == (row["separated"] is None)
    assert {row["der"] for row in rows if row["preset"] == "none"} == {0.5}
    assert pq.read_table(told["table"]).to_pylist() == rows
    trained = {path: path.stat().st_mtime_ns for path in (place / "out").rglob("model.safetensors")}
    assert len(trained) == 7  # a clean model; for each attack an undefended one, a confounder and a deconfounded one
    code, again, _ = run(place, capsys, "--attacks", "badnets,sig", "--presets", "none,cbd")
    assert again == told
    assert {path: path.stat().st_mtime_ns for path in (place / "out").rglob("model.safetensors")} == trained
    (taken_in,) = (place / "out").glob("taken-in-*")
    earlier = [row | {"ca": 0.125} for row in rows[:1]]
    params = {"params_path": place / "params.yaml", "poison__attack": "badnets"}
    (row,) = redteam.redteam(
        taken_in, place / "elsewhere", attacks=["badnets"], presets=["none"], seeds=[0], params_of=partial(load, **params), known=earlier
    )
    assert row["ca"] == 0.125 and not list((place / "elsewhere").rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_data_without_attack_have_an_accuracy_and_no_attack_success_rate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(place, capsys, "--attacks", "clean", "--presets", "none,cbd")
    assert code == 0
    plain, defended = told["rows"]
    assert all(0 <= row["ca"] <= 1 and row["poison_rate"] == 0 for row in (plain, defended))
    assert {defended[name] for name in ("asr", "excess_asr", "robust_accuracy", "der", "auroc")} == {None}
    assert plain["suspects"] is None and defended["suspects"] is not None


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_threat_models_and_other_defences_have_rows_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(place, capsys, "--attacks", "all-to-all,source-specific,several", "--presets", "none,perfect-filter")
    assert code == 0
    rows = {(row["attack"], row["preset"]): row for row in told["rows"]}
    assert len(rows) == 6 and all(row["auroc"] is None for row in rows.values())
    assert [rows[name, "none"]["poison_rate"] for name in ("all-to-all", "source-specific", "several")] == pytest.approx(
        [0.1, 15 / 90, 0.2]
    )
    assert all(0 <= row["asr"] <= 1 for row in rows.values())
    copies = {path.parent.name.split("-seed")[0] for path in (place / "out").glob("*/truth")}
    assert {"badnets", "blend"} <= copies
    code, told, _ = run(place, capsys, "--attacks", "badnets", "--presets", "abl,vb,random-filter")
    assert code == 0 and [row["preset"] for row in told["rows"]] == ["abl", "vb", "random-filter"]
    assert {row["der"] for row in told["rows"]} == {None}  # nothing to compare with was asked for


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_a_second_supplier_poisons_beside_the_first(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cbd.config import Poison
    from cbd.truth import read_truth
    from components.poison import poison

    run(place, capsys, "--attacks", "badnets", "--presets", "none")
    (taken,) = (place / "out").glob("taken-in-*")
    poison(taken / "dataset", tmp_path / "a", truth=tmp_path / "ta", params=Poison(attack="badnets"), seed=0)
    second = Poison(attack="blend", target_label=1, poison_rate=0.2)
    poison(tmp_path / "a", tmp_path / "b", truth=tmp_path / "tb", params=second, seed=0, before=[tmp_path / "ta"])
    first, then = read_truth(tmp_path / "ta"), read_truth(tmp_path / "tb")
    assert first is not None and then is not None
    stamped = {sample for sample, role in zip(first.sample_ids, first.roles, strict=True) if role == "poison"}
    again = {sample for sample, role in zip(then.sample_ids, then.roles, strict=True) if role == "poison"}
    assert len(stamped) == 9 and len(again) == 18 and stamped <= set(then.sample_ids) and not stamped & again


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--attacks", "badnet"),
            "expected all, or some of badnets,trojan,blend,sig,dynamic,wanet,adaptive,clean,all-to-all,source-specific,several",
        ),
        (("--presets", ","), "--presets: expected all, or some of none,official,paper,cbd,abl,vb,random-filter,perfect-filter, found none"),
        (("--preset", "cbd"), "use --presets"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    code, _, err = run(place, capsys, *more)
    assert code == 2 and message in err.splitlines()[-1]


def test_the_table_says_percent_and_dashes_what_was_not_measured() -> None:
    row = dict.fromkeys((*redteam_row.COLUMNS, *redteam_row.DETECTION, "seconds")) | {
        "attack": "sig",
        "ca": 0.875,
        "der": 0.5,
        "seconds": 12.34,
    }
    head, _, line = redteam_table.render([row]).splitlines()
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert (cells["ca"], cells["asr"], cells["der"], cells["seconds |"]) == ("87.5 %", "-", "0.5", "12.3 |")


def test_medians_are_over_seeds_and_the_worst_excess_is_named() -> None:
    blank = dict.fromkeys((*redteam_row.COLUMNS, *redteam_row.DETECTION, "seconds"))
    rows = [blank | {"attack": "sig", "preset": "cbd", "seed": seed, "excess_asr": value} for seed, value in enumerate((0.01, 0.05, -0.02))]
    head, _, line = redteam_table.medians([*rows, blank | {"attack": "clean", "preset": "cbd", "ca": 0.5}]).splitlines()[:3]
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert (cells["seeds"], cells["excess_asr"], cells["worst"], cells["ca"]) == ("3", "1.0 %", "5.0 %", "-")


def stage_one(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Params]:
    """The clean data set and the parameters of a confounder that this trains into `tmp_path`."""
    from components.train_confounder import train_confounder

    run(place, capsys, "--attacks", "clean", "--presets", "none")
    (taken_in,) = (place / "out").glob("taken-in-*")
    params = load(params_path=place / "params.yaml", preset=None)
    train_confounder(taken_in / "dataset", tmp_path / "confounder", params=params, checkpoints=tmp_path / "checkpoints")
    return taken_in / "dataset", params


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_stage_two_starts_anew_with_other_evidence_on_the_same_confounder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa

    from components.train_deconfounded import train_deconfounded

    dataset, params = stage_one(place, tmp_path, capsys)
    common: dict[str, Any] = {"params": params, "checkpoints": tmp_path / "checkpoints"}
    made = [
        train_deconfounded(
            dataset, tmp_path / "confounder", model=tmp_path / name / "model", evidence=tmp_path / name / "evidence", **common
        )["model_digest"]
        for name in ("first", "again")
    ]
    losses = pq.read_table(tmp_path / "confounder" / "losses.parquet")
    column = losses.column_names.index("posterior")
    changed = losses.set_column(column, "posterior", pa.array(np.arange(len(losses)) % 2, pa.float64()))
    pq.write_table(changed, tmp_path / "confounder" / "losses.parquet")
    other = train_deconfounded(
        dataset, tmp_path / "confounder", model=tmp_path / "other/model", evidence=tmp_path / "other/evidence", **common
    )
    assert made[0] == made[1] != other["model_digest"]


@pytest.mark.slow
@pytest.mark.usefixtures("torch_one_thread")
def test_where_nothing_separates_stage_two_is_plain_training_and_otherwise_it_is_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from components.train_deconfounded import train_deconfounded

    dataset, params = stage_one(place, tmp_path, capsys)
    told = json.loads((tmp_path / "confounder" / "separation.json").read_text())

    def weights(*, separated: bool, mi_weight: float) -> str:
        (tmp_path / "confounder" / "separation.json").write_text(json.dumps(told | {"separated": separated}))
        changed = params.model_copy(update={"deconfounded": params.deconfounded.model_copy(update={"mi_weight": mi_weight})})
        out = tmp_path / f"{separated} {mi_weight}"
        places = {"model": out / "model", "evidence": out / "evidence", "checkpoints": out / "checkpoints"}
        train_deconfounded(dataset, tmp_path / "confounder", params=changed, **places)
        return read_card(out / "model").weights_sha256

    assert told["suspects"] == 0
    plain = weights(separated=False, mi_weight=0.0)
    assert weights(separated=False, mi_weight=0.5) == plain != weights(separated=True, mi_weight=0.5)
