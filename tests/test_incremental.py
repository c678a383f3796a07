"""Deliveries that follow each other: the union of what was accepted, what people release and reject, and `nothing new`."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from delivery_files import LIMITS, encode, pixels, places, png, write_classes

from cbd.audit import LOG, append, verify_log
from cbd.bundle import BundleCard, bundle_digest
from cbd.dataset import make_row, read_info, read_manifest, to_batches, write_dataset
from cbd.errors import DataError
from cbd.models import make_model, save_bundle
from cbd.truth import read_truth
from components import quarantine
from components.ingest import IngestOptions, ingest
from components.places import of_delivery
from components.registry import find, store
from components.tracking import registered_name
from pipelines import cli

pytestmark = pytest.mark.slow

COUNTS = {"ant": 4, "bee": 4}
NAME = registered_name("model", ["ant", "bee"])


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_classes(tmp_path / "trusted", COUNTS, seed=50_000)
    return tmp_path / "workspace"


def deliver(workspace: Path, delivery: Path, run_id: str, *, verdict: str | None = "PASS", **options: Any) -> dict[str, Any]:
    """What ingest says; with a verdict the data set is stored and decided on, as a run would do it."""
    out, trusted = workspace / "runs" / run_id, workspace.parent / "trusted"
    given = IngestOptions(**{"supplier": "acme", "workspace": workspace, "run_id": run_id, **options})
    told = ingest(str(delivery), str(trusted), outputs=places(out), params=LIMITS, options=given)
    if verdict:
        info = read_info(out / "dataset")
        store(out / "dataset", info.digest, of_delivery("acme", "2026-11-25"), workspace=workspace)
        digests = {"data": told["digest"], "trusted": told["trusted_digest"], "model": "0" * 64}
        about = {"run_id": run_id, "decision_digest": hashlib.sha256(run_id.encode()).hexdigest()}
        append(workspace, "decision", {**about, "digests": digests, "trial": False, "verdict": verdict})
        alias = {"PASS": "champion", "REVIEW": "candidate"}.get(verdict)
        append(workspace, "register", {**about, "name": NAME, "alias": alias})
    return told


def paths(workspace: Path, run_id: str) -> set[str]:
    return set(read_manifest(workspace / "runs" / run_id / "dataset")["original_path"].to_pylist())


def refused(workspace: Path, run_id: str) -> dict[str, str]:
    rows = pq.read_table(workspace / "runs" / run_id / "quarantine" / "quarantine.parquet").to_pylist()
    return {row["original_path"]: row["reason"] for row in rows}


def test_a_run_trains_on_the_union_of_accepted_deliveries_and_knows_whom_each_image_came_from(tmp_path: Path, workspace: Path) -> None:
    first = deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    second = write_classes(tmp_path / "two", {"ant": 2, "bee": 3}, seed=100)
    (second / "ant" / "again.png").write_bytes(png(0))
    told = deliver(workspace, second, "run-2", supplier="beta")
    assert (first["num_images"], told["num_images"]) == (8, 13)
    assert (told["delivered"], told["accepted"], told["duplicates"], told["known"]) == (6, 5, 1, 1)
    manifest = read_manifest(workspace / "runs" / "run-2" / "dataset").to_pylist()
    assert [row["source"] for row in manifest] == ["acme"] * 8 + ["beta"] * 5
    assert len({row["batch"] for row in manifest[:8]}) == len({row["batch"] for row in manifest[8:]}) == 1
    assert manifest[0]["batch"] != manifest[8]["batch"] and len(manifest[0]["batch"]) == 12
    assert read_info(workspace / "runs" / "run-2" / "dataset").supplier == "acme, beta"
    listed = pq.read_table(workspace / "runs" / "run-2" / "quarantine" / "duplicates.parquet").to_pylist()
    assert [(row["original_path"], row["kept_sample_id"]) for row in listed] == [("ant/again.png", hashlib.sha256(png(0)).hexdigest())]


def test_a_delivery_of_one_class_or_of_nothing_but_known_images_is_fine_once_others_were_accepted(tmp_path: Path, workspace: Path) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    assert deliver(workspace, write_classes(tmp_path / "two", {"ant": 1}, seed=100), "run-2")["num_images"] == 9
    told = deliver(workspace, write_classes(tmp_path / "three", {"ant": 1}), "run-3", verdict=None)
    assert (told["accepted"], told["known"], told["num_images"]) == (0, 1, 9)


@pytest.mark.parametrize(("verdict", "joined"), [("PASS", True), ("REVIEW", True), ("BLOCK", False), ("INCONCLUSIVE", False)])
def test_a_delivery_joins_the_union_if_the_model_that_learned_from_it_passed_or_is_in_review(
    verdict: str, joined: bool, tmp_path: Path, workspace: Path
) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1", verdict=verdict)
    told = deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2", verdict=None)
    assert told["num_images"] == (16 if joined else 8)


@pytest.mark.parametrize("verdict", ["PASS", "BLOCK"])
def test_what_was_decided_on_before_is_nothing_new_whatever_the_verdict_and_the_form(verdict: str, tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    assert deliver(workspace, root, "run-1", verdict=verdict)["nothing_new"] is None
    (root / "ant" / "copy.bmp").write_bytes(encode(pixels(0), "BMP"))
    told = deliver(workspace, root, "run-2", verdict=None)
    assert told["nothing_new"] == {"run_id": "run-1", "verdict": verdict}
    assert deliver(workspace, root, "run-3", verdict=None, again=True)["nothing_new"] is None
    assert deliver(workspace, root, "run-4", verdict=None, name="other")["nothing_new"] is None
    (workspace.parent / "trusted" / "ant" / "more.png").write_bytes(png(60_000))
    assert deliver(workspace, root, "run-5", verdict=None)["nothing_new"] is None, "another trusted set may see more"


def test_an_accepted_image_keeps_its_label(tmp_path: Path, workspace: Path) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    second = write_classes(tmp_path / "two", COUNTS, seed=100)
    (second / "bee" / "flipped.png").write_bytes(png(0))
    told = deliver(workspace, second, "run-2")
    assert refused(workspace, "run-2") == {"bee/flipped.png": "conflicts-with-accepted"}
    assert told["num_images"] == 16


def test_rejected_images_are_left_out_come_in_no_other_form_and_are_not_lost(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    deliver(workspace, root, "run-1")
    wanted = hashlib.sha256(png(0)).hexdigest()
    digests = quarantine.send(workspace / "runs" / "run-1" / "dataset", [wanted], workspace, run_id="run-1", model=NAME)
    quarantine.rule(workspace, "reject", digests, {}, by="ann", reason="a patch in the corner")
    (root / "ant" / "again.bmp").write_bytes(encode(pixels(0), "BMP"))
    (root / "ant" / "new.png").write_bytes(png(300))
    told = deliver(workspace, root, "run-2")
    assert (told["num_images"], told["left_out"]) == (8, 1)
    assert refused(workspace, "run-2") == {"ant/000.png": "rejected", "ant/again.bmp": "rejected"}
    assert "ant/000.png" not in paths(workspace, "run-2")
    (held,) = quarantine.find(workspace, [wanted[:8]])
    assert (held.status, held.reason, held.supplier, held.label_name) == ("rejected", "rejected", "acme", "ant")
    assert dict(quarantine.read_bytes(workspace, [wanted])) == {wanted: png(0)}
    quarantine.rule(workspace, "release", digests, {wanted: "ant"}, by="bob", reason="it was a smudge")
    assert deliver(workspace, root, "run-3", verdict=None)["num_images"] == 9


def test_a_released_file_comes_back_with_the_label_it_was_given_and_counts_against_others(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "bee" / "copy.png").write_bytes(png(0))
    deliver(workspace, root, "run-1")
    assert refused(workspace, "run-1") == dict.fromkeys(["ant/000.png", "bee/copy.png"], "conflicting-labels")
    (held,) = quarantine.listed(workspace)
    assert (held.status, held.run_id, held.supplier) == ("quarantined", "run-1", "acme") and held.first_seen.endswith("Z")
    digests = quarantine.pixel_digests(workspace, [held], LIMITS)
    quarantine.rule(workspace, "release", digests, {held.id: "ant"}, by="ann", reason="it is an ant")
    told = deliver(workspace, write_classes(tmp_path / "two", {"bee": 1}, seed=100), "run-2", supplier="beta")
    assert (told["delivered"], told["released"], told["accepted"], told["num_images"]) == (2, 1, 2, 9)
    manifest = read_manifest(workspace / "runs" / "run-2" / "dataset").to_pylist()
    assert [(row["source"], row["label"]) for row in manifest if row["sample_id"] == held.id] == [("acme", 0)]
    third = deliver(workspace, root, "run-3", verdict=None)
    assert refused(workspace, "run-3") == {"bee/copy.png": "conflicts-with-accepted"}
    assert (third["released"], third["num_images"]) == (0, 9)


def test_a_released_file_that_is_still_no_image_goes_back_to_the_quarantine(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "ant" / "cut.png").write_bytes(png(9)[:300])
    deliver(workspace, root, "run-1")
    (held,) = quarantine.listed(workspace)
    quarantine.rule(workspace, "release", {held.id: None}, {held.id: "ant"}, by="ann", reason="let us see")
    told = deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2")
    assert refused(workspace, "run-2") == {"ant/cut.png": "truncated"} and told["quarantined"] == 1
    assert len(quarantine.listed(workspace)) == 1


def test_a_trial_takes_its_delivery_for_itself(tmp_path: Path, workspace: Path) -> None:
    from cbd.config import Poison

    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    poison = Poison(attack="badnets", poison_rate=0.3)
    told = deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2", verdict=None, poison=poison)
    assert told["trial"] and told["num_images"] == 8 and told["nothing_new"] is None


@pytest.mark.parametrize("damage", ["log", "registry", "remote", "quarantine"])
def test_tampering_with_what_was_accepted_is_refused_by_name(damage: str, tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "ant" / "cut.png").write_bytes(png(9)[:300])
    deliver(workspace, root, "run-1")
    expected = {
        "log": "audit.jsonl",
        "registry": "is not in it",
        "remote": "remote are missing or altered",
        "quarantine": "altered: the bytes of",
    }
    if damage == "log":
        text = (workspace / LOG).read_text()
        (workspace / LOG).write_text(text.replace('"alias":"champion"', '"alias":"candidatX"'))
    elif damage == "registry":
        import shutil

        shutil.rmtree(workspace / "registry")
    elif damage == "remote":
        shard = max((path for path in (workspace / "remote").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        shard.chmod(0o644)
        shard.write_bytes(shard.read_bytes()[:-1] + b"X")
    else:
        (held,) = quarantine.listed(workspace)
        quarantine.rule(workspace, "release", {held.id: None}, {held.id: "ant"}, by="ann", reason="let us see")
        (path,) = (workspace / "quarantine").glob("*.parquet")
        rows = pq.read_table(path).to_pylist()
        rows[0]["image"] = png(500)
        import pyarrow as pa

        pq.write_table(pa.Table.from_pylist(rows, quarantine.COLUMNS), path)
    with pytest.raises(DataError, match=expected[damage]):
        deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2")


def cbd(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--json"])
    told = capsys.readouterr()
    return int(ended.value.code or 0), json.loads(told.out.splitlines()[-1]), told.err


def test_people_list_show_release_and_reject_by_the_command_line_and_every_word_is_signed(
    tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "ant" / "cut.png").write_bytes(png(9)[:300])
    (root / "bee" / "copy.png").write_bytes(png(0))
    (root / "bee" / "huge.png").write_bytes(bytes(1_000_001))
    deliver(workspace, root, "run-1")
    place = ("--workspace", str(workspace))
    _, told, _ = cbd(capsys, "quarantine", "list", *place)
    ids = {row["reason"]: row["id"] for row in told["files"]}
    assert told["total"] == 3 and set(ids) == {"truncated", "conflicting-labels", "too-large"}
    _, shown, _ = cbd(capsys, "quarantine", "show", ids["truncated"][:10], "--out", str(tmp_path / "it.png"), *place)
    assert shown["original_path"] == "ant/cut.png" and (tmp_path / "it.png").read_bytes() == png(9)[:300]
    why = ("--reason", "seen by eye", "--by", "ann", *place)
    for arguments, message in (
        (("release", ids["conflicting-labels"]), "came under several labels; say with --label"),
        (("release", ids["too-large"]), "refused unread (too-large)"),
        (("release", "abc"), "give at least 8 digits"),
        (("reject", "0" * 12), "0 files have an id that begins so"),
        (("reject", "--suspects"), "name it with --run"),
        (("reject",), "name the ids"),
    ):
        code, _, err = cbd(capsys, "quarantine", *arguments, *why)
        assert code == 2 and message in err, arguments
    assert cbd(capsys, "quarantine", "release", ids["conflicting-labels"], "--label", "ant", *why)[1]["num_files"] == 1
    assert cbd(capsys, "quarantine", "reject", ids["truncated"], *why)[1]["action"] == "reject"
    _, told, _ = cbd(capsys, "quarantine", "list", "--status", "released", *place)
    assert [row["label_name"] for row in told["files"]] == ["ant"] and told["counts"] == {"quarantined": 1, "released": 1, "rejected": 1}
    entries = [entry["data"] for entry in verify_log(workspace / LOG) if entry["event"] == "quarantine"]
    assert [(entry["action"], entry["by"], entry["reason"]) for entry in entries] == [
        ("release", "ann", "seen by eye"),
        ("reject", "ann", "seen by eye"),
    ]


def test_versions_are_listed_compared_and_checked_out(tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    deliver(workspace, write_classes(tmp_path / "two", {"ant": 2}, seed=100), "run-2", supplier="beta")
    place = ("--workspace", str(workspace))
    _, told, _ = cbd(capsys, "data", "list", *place)
    assert [(row["num_images"], row["supplier"]) for row in told["versions"]] == [(10, "acme, beta"), (8, "acme")]
    new, old = (row["tag"] for row in told["versions"])
    _, changed, _ = cbd(capsys, "data", "diff", old, new, *place)
    assert changed["added"]["classes"] == {"ant": 2} and changed["added"]["suppliers"] == {"beta": 2}
    assert changed["removed"]["num_images"] == changed["relabelled"]["num_images"] == 0
    code, told, _ = cbd(capsys, "data", "checkout", old, "--out", str(tmp_path / "checked-out"), *place)
    assert code == 0 and read_info(tmp_path / "checked-out").digest == told["digest"]
    code, _, err = cbd(capsys, "data", "checkout", "2026-01-01/x/0", "--out", str(tmp_path / "other"), *place)
    assert code == 2 and "no data set is tagged" in err and not (tmp_path / "other").exists()


def reject_image(workspace: Path, run_id: str, data: bytes) -> None:
    name = hashlib.sha256(data).hexdigest()
    digests = quarantine.send(workspace / "runs" / run_id / "dataset", [name], workspace, run_id=run_id, model=NAME)
    quarantine.rule(workspace, "reject", digests, {}, by="ann", reason="no")


def test_the_last_word_on_the_pixels_counts_whichever_file_it_was_about(tmp_path: Path, workspace: Path) -> None:
    """The image came as another file under another label; that one is released as an ant, then the accepted one is rejected."""
    root = write_classes(tmp_path / "one", COUNTS)
    deliver(workspace, root, "run-1")
    (root / "bee" / "x.bmp").write_bytes(encode(pixels(0), "BMP"))
    deliver(workspace, root, "run-2", verdict=None)
    (held,) = quarantine.listed(workspace)
    digests = quarantine.pixel_digests(workspace, [held], LIMITS)
    quarantine.rule(workspace, "release", digests, {held.id: "ant"}, by="ann", reason="it is an ant")
    assert deliver(workspace, root, "run-3", verdict=None)["released"] == 0, "its pixels are in the data set already"
    reject_image(workspace, "run-1", png(0))
    told = deliver(workspace, root, "run-4", verdict=None)
    assert (told["num_images"], told["left_out"], told["released"]) == (7, 1, 0)


def test_a_file_that_could_not_be_decoded_when_it_was_rejected_stays_out_when_it_can(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "ant" / "large.png").write_bytes(encode(pixels(5, size=(64, 64))))
    narrow = LIMITS.model_copy(update={"max_pixels": 1000})
    options = IngestOptions("acme", workspace=workspace, run_id="run-1")
    ingest(str(root), str(workspace.parent / "trusted"), outputs=places(workspace / "runs" / "run-1"), params=narrow, options=options)
    (held,) = quarantine.listed(workspace)
    assert held.reason == "decompression-bomb"
    quarantine.rule(workspace, "reject", {held.id: None}, {}, by="ann", reason="no")
    deliver(workspace, root, "run-2", verdict=None)
    assert refused(workspace, "run-2") == {"ant/large.png": "rejected"}


def test_a_released_file_comes_back_for_its_own_model_and_under_a_class_that_there_is(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "bee" / "copy.png").write_bytes(png(0))
    deliver(workspace, root, "run-1")
    (held,) = quarantine.listed(workspace)
    assert held.num_labels == 2 and held.model == NAME
    digests = quarantine.pixel_digests(workspace, [held], LIMITS)
    quarantine.rule(workspace, "release", digests, {held.id: "antt"}, by="ann", reason="a slip")
    second = write_classes(tmp_path / "two", COUNTS, seed=100)
    told = deliver(workspace, second, "run-2", verdict=None)
    assert refused(workspace, "run-2") == {held.original_path: "no-class"} and told["accepted"] == 8
    quarantine.rule(workspace, "release", digests, {held.id: "ant"}, by="ann", reason="an ant")
    assert deliver(workspace, second, "run-3", verdict=None, name="other")["released"] == 0
    assert deliver(workspace, second, "run-4", verdict=None)["released"] == 1


def test_an_accepted_image_is_relabelled_by_a_release(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    deliver(workspace, root, "run-1")
    reject_image(workspace, "run-1", png(0))
    name = hashlib.sha256(png(0)).hexdigest()
    digests = quarantine.pixel_digests(workspace, quarantine.find(workspace, [name]), LIMITS)
    quarantine.rule(workspace, "release", digests, {name: "bee"}, by="ann", reason="it is a bee")
    told = deliver(workspace, root, "run-2", verdict=None)
    labels = {row["sample_id"]: row["label"] for row in read_manifest(workspace / "runs" / "run-2" / "dataset").to_pylist()}
    assert (told["num_images"], labels[name]) == (8, 1)
    assert refused(workspace, "run-2") == {"ant/000.png": "conflicts-with-accepted"}


def test_a_released_file_makes_no_delivery_of_an_empty_one_and_no_supplier_of_whom_sent_nothing(tmp_path: Path, workspace: Path) -> None:
    root = write_classes(tmp_path / "one", COUNTS)
    (root / "bee" / "copy.png").write_bytes(png(0))
    deliver(workspace, root, "run-1")
    (held,) = quarantine.listed(workspace)
    digests = quarantine.pixel_digests(workspace, [held], LIMITS)
    quarantine.rule(workspace, "release", digests, {held.id: "ant"}, by="ann", reason="an ant")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is empty"):
        deliver(workspace, tmp_path / "empty", "run-2", verdict=None)
    (tmp_path / "broken" / "ant").mkdir(parents=True)
    (tmp_path / "broken" / "ant" / "x.png").write_bytes(b"x")
    with pytest.raises(DataError, match="none of"):
        deliver(workspace, tmp_path / "broken", "run-3", verdict=None)
    (root / "bee" / "copy.png").unlink()
    deliver(workspace, root, "run-4", verdict=None, supplier="beta")
    assert read_info(workspace / "runs" / "run-4" / "dataset").supplier == "acme"


def test_a_poisoned_copy_is_kept_and_comes_back_with_its_roles_and_no_run_learns_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(png(i), label=i % 2, original_path=f"{i}.png", source="acme") for i in range(20)]
    write_dataset(tmp_path / "clean", to_batches(rows), class_names=["ant", "bee"], supplier="acme")
    copy, place = tmp_path / "copy", ("--workspace", str(tmp_path / "ws"))
    cbd(capsys, "poison", str(tmp_path / "clean"), "--attack", "badnets", "--poison-rate", "0.2", "--out", str(copy))
    code, _, err = cbd(capsys, "data", "add", str(copy / "dataset"), *place)
    assert code == 2 and "give the folder that `cbd poison` wrote with --truth" in err
    _, added, _ = cbd(capsys, "data", "add", str(copy / "dataset"), "--truth", str(copy / "truth"), *place)
    (listed,) = cbd(capsys, "data", "list", *place)[1]["versions"]
    assert (listed["tag"], listed["kind"]) == (added["tag"], "poisoned copy") and added["tag"].startswith("poison@badnets/")
    out = ("--out", str(tmp_path / "out"), "--truth", str(tmp_path / "known"))
    assert cbd(capsys, "data", "checkout", added["tag"], *out, *place)[0] == 0
    assert read_truth(tmp_path / "known") == read_truth(copy / "truth")
    assert find(tmp_path / "ws", added["digest"]) is None
    for out, known in (("same", "same"), ("n", "n/truth"), ("m/d", "m")):
        code, _, err = cbd(capsys, "data", "checkout", added["tag"], "--out", str(tmp_path / out), "--truth", str(tmp_path / known), *place)
        assert code == 2 and "write the truth beside the data set" in err and not (tmp_path / out).exists()


def test_a_trusted_set_is_one_only_if_a_person_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [make_row(png(i), label=i % 2, original_path=f"{i}.png", source="trusted") for i in range(4)]
    write_dataset(tmp_path / "set", to_batches(rows), class_names=["ant", "bee"], supplier="trusted")
    place = ("--workspace", str(tmp_path / "ws"))
    for flag in ((), ("--kind", "trusted")):
        cbd(capsys, "data", "add", str(tmp_path / "set"), *flag, *place)
    assert [row["kind"] for row in cbd(capsys, "data", "list", *place)[1]["versions"]] == ["trusted set", "delivery"]
    code, _, err = cbd(capsys, "data", "add", str(tmp_path / "set"), "--truth", str(tmp_path / "x"), *place)
    assert code == 2 and "is no poisoned copy" in err


def test_a_model_of_honest_data_is_kept_listed_and_brought_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model("wrn-16-1", num_classes=2, image_size=8, generator=torch.Generator().manual_seed(0))
    about = {"kind": "undefended", "architecture": "wrn-16-1", "class_names": ("a", "b"), "image_size": 8, "data_digest": "0" * 64}
    save_bundle(model, BundleCard(**about, params={}, seed=0, trial=False, weights_sha256=""), tmp_path / "model")
    place = ("--workspace", str(tmp_path / "ws"))
    _, added, _ = cbd(capsys, "data", "add", str(tmp_path / "model"), "--kind", "control", *place)
    (listed,) = cbd(capsys, "data", "list", *place)[1]["versions"]
    assert (listed["tag"], listed["kind"], listed["num_images"]) == (added["tag"], "clean control", None)
    _, told, _ = cbd(capsys, "data", "checkout", added["tag"], "--out", str(tmp_path / "out"), *place)
    assert told["digest"] == added["digest"] == bundle_digest(tmp_path / "out")
    code, _, err = cbd(capsys, "data", "add", str(tmp_path / "model"), *place)
    assert code == 2 and "dataset.json" in err


def test_a_delivery_that_was_accepted_meanwhile_is_not_lost(tmp_path: Path, workspace: Path) -> None:
    from components.accepted import last_accepted

    base = deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    assert base["base"] == "" and last_accepted(workspace, NAME) == base["digest"]
    second = deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2", verdict=None)
    assert second["base"] == base["digest"]


def test_a_data_set_of_an_older_version_is_told_as_one(tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    registry = workspace / "registry"
    (card,) = (registry / "datasets").glob("*.json")
    card.write_text(
        card.read_text().replace('"schema_version": 2', '"schema_version": 1').replace('"schema_version":2', '"schema_version":1')
    )
    git = ["git", "-C", str(registry), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "older"], check=True)
    (tag,) = subprocess.run([*git, "tag", "--list"], check=True, capture_output=True, text=True).stdout.split()
    message = subprocess.run(
        [*git, "tag", "--list", "--format=%(contents:subject)"], check=True, capture_output=True, text=True
    ).stdout.strip()
    subprocess.run([*git, "tag", "--force", "--annotate", "--message", message, tag], check=True, capture_output=True)
    with pytest.raises(DataError, match="was written by an older version; start a new --workspace"):
        deliver(workspace, write_classes(tmp_path / "two", COUNTS, seed=100), "run-2")
    assert cbd(capsys, "data", "list", "--workspace", str(workspace))[1]["versions"] == []


def test_nothing_that_is_there_is_overwritten(tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    out = ("--out", str(tmp_path / "precious"), "--workspace", str(workspace))
    for arguments in (("data", "checkout", "tag", *out), ("quarantine", "show", "0" * 12, *out), ("import", "abl", "x", "y", *out[:2])):
        code, _, err = cbd(capsys, *arguments)
        assert code == 2 and "exists already; name a new place" in err
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_ruling_on_a_run_of_another_workspace_is_refused(tmp_path: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deliver(workspace, write_classes(tmp_path / "one", COUNTS), "run-1")
    (workspace / "runs" / "run-1" / "records").mkdir()
    arguments = ("quarantine", "reject", "0" * 12, "--run", str(workspace / "runs" / "run-1"), "--reason", "no")
    code, _, err = cbd(capsys, *arguments, "--workspace", str(tmp_path / "elsewhere"))
    assert code == 2 and f"is a run of {workspace}; give that as --workspace" in err and not (tmp_path / "elsewhere").exists()
