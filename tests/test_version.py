"""The data registry: real git, real DVC, and what an attacker of the remote or the supplier's name would try."""

import os
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from delivery_files import png

from cbd.audit import append
from cbd.bundle import BundleCard, bundle_digest
from cbd.config import Poison
from cbd.dataset import make_row, read_info, to_batches, write_dataset
from cbd.errors import DataError, EnvironmentFault
from cbd.models import make_model, save_bundle
from cbd.truth import read_truth, write_truth
from components import registry as registry_module
from components.logged import Unverified
from components.places import kind_of, of_delivery, slug
from components.poison import poison
from components.registry import fetch, find, store, versions
from components.suspect_list import read_suspects
from components.verification import verify_all
from components.version import version, version_canary, version_control, version_suspects, version_trusted_set

pytestmark = pytest.mark.slow


def make(folder: Path, first: int = 0) -> Path:
    rows = [make_row(png(first + i), label=i % 2, original_path=f"{i}.png", source="acme") for i in range(6)]
    write_dataset(folder, to_batches(rows), class_names=["a", "b"], supplier="acme", shard_images=4)
    return folder


def git(registry: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(registry), *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A workspace with one stored data set; not to be changed."""
    folder = tmp_path_factory.mktemp("stored")
    return folder, version(make(folder / "data"), workspace=str(folder / "ws"), supplier="acme", date="2026-01-31")


@pytest.fixture
def workspace(stored: tuple[Path, dict[str, str]], tmp_path: Path) -> Path:
    """A copy of the stored workspace: it may be moved."""
    shutil.copytree(stored[0] / "ws", tmp_path / "ws")
    return tmp_path / "ws"


def test_a_data_set_is_committed_and_tagged(stored: tuple[Path, dict[str, str]]) -> None:
    folder, result = stored
    registry = folder / "ws" / "registry"
    digest = read_info(folder / "data").digest
    assert result["digest"] == digest and result["tag"] == f"2026-01-31/acme/{digest[:12]}"
    assert git(registry, "rev-parse", f"{result['tag']}^{{commit}}") == result["revision"]
    assert git(registry, "show", f"{result['tag']}:datasets/acme.json") == (folder / "data" / "dataset.json").read_text().strip()
    assert git(registry, "status", "--porcelain") == ""
    assert "verify = true" in git(registry, "show", "HEAD:.dvc/config") and "analytics = false" in git(registry, "show", "HEAD:.dvc/config")
    kept = [path for path in (folder / "ws" / "remote").rglob("*") if path.is_file()]
    assert len(kept) == 4 and not list((folder / "ws").rglob("*.tmp"))


def test_the_same_digest_is_stored_once(workspace: Path, tmp_path: Path) -> None:
    before = git(workspace / "registry", "rev-list", "--count", "HEAD")
    again = version(make(tmp_path / "data"), workspace=str(workspace), supplier="acme", date="2027-12-24")
    assert again["tag"].startswith("2026-01-31/") and git(workspace / "registry", "rev-list", "--count", "HEAD") == before


def test_another_data_set_gets_another_version_and_both_can_be_fetched(workspace: Path, tmp_path: Path) -> None:
    first = find(workspace, read_info(make(tmp_path / "one")).digest)
    second = version(make(tmp_path / "two", 100), workspace=str(workspace), supplier="acme", date="2026-02-01")
    assert first is not None and second["revision"] != first.revision
    assert fetch(first.tag, tmp_path / "a", workspace=workspace) == read_info(tmp_path / "one")
    assert fetch(second["tag"], tmp_path / "b", workspace=workspace) == read_info(tmp_path / "two")


def test_a_run_killed_between_commit_and_tag_is_finished(workspace: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "data")
    tag = git(workspace / "registry", "tag")
    git(workspace / "registry", "tag", "--delete", tag)
    assert version(data, workspace=str(workspace), supplier="acme", date="2026-01-31")["tag"] == tag
    assert fetch(tag, tmp_path / "out", workspace=workspace) == read_info(data)


def test_a_tampered_object_is_refused(workspace: Path, tmp_path: Path) -> None:
    tag = git(workspace / "registry", "tag")
    victim = max((path for path in (workspace / "remote").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.chmod(0o644)
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="in the remote are missing or altered.*restore the remote") as caught:
        fetch(tag, tmp_path / "out", workspace=workspace)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    pulled = subprocess.run([sys.executable, "-m", "dvc", "pull"], check=False, cwd=workspace / "registry", capture_output=True, text=True)
    assert pulled.returncode != 0


def test_a_lost_object_is_refused(workspace: Path, tmp_path: Path) -> None:
    shutil.rmtree(workspace / "remote" / "files")
    with pytest.raises(DataError, match="missing or altered"):
        fetch(git(workspace / "registry", "tag"), tmp_path / "out", workspace=workspace)


def test_a_lock_of_a_git_that_was_killed_does_not_stop_the_next_version(workspace: Path, tmp_path: Path) -> None:
    (workspace / "registry" / ".git" / "index.lock").touch()
    assert version(make(tmp_path / "data", 600), workspace=str(workspace), supplier="acme")["revision"]


def test_what_a_killed_push_left_is_no_object_and_goes_with_the_next_one(workspace: Path, tmp_path: Path) -> None:
    append(workspace, "event", {})
    place = next(path for path in (workspace / "remote" / "files" / "md5").iterdir() if path.is_dir())
    (place / ".Zx_4-half.tmp").write_bytes(b"half")
    assert "remote: 4 objects of the data registry are what their names say" in list(verify_all(workspace))
    version(make(tmp_path / "data", 500), workspace=str(workspace), supplier="acme")
    assert not list((workspace / "remote").rglob("*.tmp"))
    assert "remote: 8 objects of the data registry are what their names say" in list(verify_all(workspace))


def test_objects_of_any_version_that_are_missing_in_the_remote_are_told(workspace: Path, tmp_path: Path) -> None:
    append(workspace, "event", {})
    objects = [path for path in (workspace / "remote").rglob("*") if path.is_file()]
    version(make(tmp_path / "data", 500), workspace=str(workspace), supplier="acme")
    assert not any(isinstance(told, Unverified) for told in verify_all(workspace))
    lost = next(path for path in objects if path.suffix != ".dir")
    lost.unlink()
    told = f"remote: NOT VERIFIED: 1 objects of versions of the data registry are missing, such as {lost}; restore them"
    assert [told] == [sentence for sentence in verify_all(workspace) if isinstance(sentence, Unverified)]
    shutil.rmtree(workspace / "remote")
    assert any("NOT VERIFIED: 2 objects" in told for told in verify_all(workspace)), "without a folder's list its files are not known"


def test_an_unknown_tag_is_named(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set is tagged '--help'"):
        fetch("--help", tmp_path / "out", workspace=workspace)


def test_an_altered_data_set_is_not_stored(workspace: Path, tmp_path: Path) -> None:
    data = make(tmp_path / "data", 200)
    (data / "shard-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="altered"):
        version(data, workspace=str(workspace), supplier="acme")
    assert len(git(workspace / "registry", "tag").splitlines()) == 1


def poisoned(tmp_path: Path) -> tuple[Path, Path]:
    """A trial and its truth."""
    section = Poison(attack="badnets", poison_rate=0.34)
    poison(make(tmp_path / "clean"), tmp_path / "trial", truth=tmp_path / "truth", params=section, seed=0)
    return tmp_path / "trial", tmp_path / "truth"


def test_a_trusted_set_is_a_version_of_its_own_and_stored_first(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    trusted = version_trusted_set(make(tmp_path / "b", 50), workspace=str(workspace), date="2026-01-31")
    told = version(make(tmp_path / "a"), workspace=str(workspace), supplier="acme", date="2026-01-31")
    digest = read_info(tmp_path / "b").digest
    assert trusted["tag"] == f"trusted/2026-01-31/{digest[:12]}"
    assert [tag for tag, _ in versions(workspace)] == [trusted["tag"], told["tag"]]
    assert git(workspace / "registry", "show", f"{told['revision']}:trusted/set.json")
    assert fetch(trusted["tag"], tmp_path / "out", workspace=workspace).digest == digest
    assert find(workspace, digest) is None  # no run may learn from it


def test_a_poisoned_copy_is_stored_with_its_roles_and_parameters(tmp_path: Path) -> None:
    (trial, truth), workspace = poisoned(tmp_path), tmp_path / "ws"
    told = version(trial, workspace=str(workspace), supplier="acme", truths=[truth], date="2026-01-31")
    assert told["tag"] == f"poison@badnets/2026-01-31/{told['digest'][:12]}"
    fetch(told["tag"], tmp_path / "out", workspace=workspace, truth=tmp_path / "known")
    assert read_truth(tmp_path / "known") == read_truth(truth) and read_info(tmp_path / "out") == read_info(trial)
    with pytest.raises(DataError, match="stored with its roles and parameters"):
        version(trial, workspace=str(workspace), supplier="acme")
    known = read_truth(truth)
    assert known is not None
    write_truth(tmp_path / "other", replace(known, target_label=1))
    with pytest.raises(DataError, match="lies there with another truth"):
        version(trial, workspace=str(workspace), supplier="acme", truths=[tmp_path / "other"])
    write_truth(tmp_path / "alien", replace(known, sample_ids=["0" * 64] * len(known.sample_ids)))
    with pytest.raises(DataError, match="is about other samples than"):
        version(trial, workspace=str(workspace), supplier="acme", truths=[tmp_path / "alien"])


def test_a_trial_that_lies_in_the_registry_as_a_delivery_as_well_keeps_its_truth(tmp_path: Path) -> None:
    (trial, truth), workspace = poisoned(tmp_path), tmp_path / "ws"
    store(trial, read_info(trial).digest, of_delivery("acme", "2026-01-01"), workspace=workspace)
    tag = version(trial, workspace=str(workspace), truths=[truth])["tag"]
    fetch(tag, tmp_path / "out", workspace=workspace, truth=tmp_path / "known")
    assert read_truth(tmp_path / "known") == read_truth(truth)


def test_a_canary_of_two_attacks_is_stored_with_both_truths(tmp_path: Path) -> None:
    (first, truth), workspace = poisoned(tmp_path), tmp_path / "ws"
    section = Poison(attack="blend", poison_rate=0.17, target_label=1)
    poison(first, tmp_path / "both", truth=tmp_path / "second", params=section, seed=0, before=[truth])
    truths = [truth, tmp_path / "second"]
    told = version_canary(tmp_path / "both", workspace=str(workspace), truths=truths, date="2026-01-31")
    assert told["tag"] == f"canary/2026-01-31/{told['digest'][:12]}"
    fetch(told["tag"], tmp_path / "out", workspace=workspace, truth=tmp_path / "known")
    assert [read_truth(tmp_path / "known" / number) for number in "12"] == [read_truth(one) for one in truths]
    copy = version(tmp_path / "both", workspace=str(workspace), truths=truths, date="2026-01-31")
    assert copy["tag"].startswith("poison@badnets-blend/2026-01-31/") and len(versions(workspace)) == 2
    with pytest.raises(DataError, match="is no canary, for no attack was put in"):
        version_canary(tmp_path / "clean", workspace=str(workspace), truths=[])


def bundle(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model that was trained on nothing."""
    model = make_model("wrn-16-1", num_classes=2, image_size=8, generator=torch.Generator().manual_seed(seed))
    about = {"kind": "undefended", "architecture": "wrn-16-1", "class_names": ("a", "b"), "image_size": 8, "data_digest": "0" * 64}
    save_bundle(model, BundleCard(**{**about, "params": {}, "seed": seed, "trial": False, "weights_sha256": "", **changes}), folder)
    return folder


def test_clean_controls_lie_beside_each_other_and_come_back_verified(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    tags = [version_control(bundle(tmp_path / f"m{i}", i), workspace=str(workspace), date="2026-01-31")["tag"] for i in range(2)]
    assert [tag for tag, _ in versions(workspace)] == tags and all(kind_of(tag) == "clean control" for tag in tags)
    assert git(workspace / "registry", "ls-files", "controls/*.dvc").count("\n") == 1
    fetch(tags[0], tmp_path / "out", workspace=workspace)
    assert bundle_digest(tmp_path / "out") == bundle_digest(tmp_path / "m0")
    weights = (tmp_path / "m1" / "model.safetensors").read_bytes()
    stored = next(path for path in (workspace / "remote").rglob("*") if path.is_file() and path.read_bytes() == weights)
    stored.chmod(0o644)
    stored.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(DataError, match="altered"):
        fetch(tags[1], tmp_path / "other", workspace=workspace)


def suspects(folder: Path, *flags: bool) -> Path:
    """An evidence table of as many images as there are flags."""
    ids, ranks = [f"s{number}" for number in range(len(flags))], list(range(len(flags)))[::-1]
    pq.write_table(pa.table({"sample_id": ids, "rank": ranks, "suspect": list(flags)}), folder / "evidence.parquet")
    return folder / "evidence.parquet"


def test_a_list_of_suspects_is_a_version_the_most_suspicious_first(tmp_path: Path) -> None:
    workspace, about = tmp_path / "ws", {"run_id": "r", "data_digest": "1" * 64, "model_digest": "2" * 64, "date": "2026-01-31"}
    table = suspects(tmp_path, True, False, True)
    told = version_suspects(table, workspace=str(workspace), **about)
    again = version_suspects(table, workspace=str(workspace), **about)
    assert again == told and told["tag"] == f"suspects/2026-01-31/{told['digest'][:12]}"
    assert [(tag, listed.num_suspects) for tag, listed in versions(workspace)] == [(told["tag"], 2)]
    fetch(told["tag"], tmp_path / "out", workspace=workspace)
    assert pq.read_table(tmp_path / "out" / "suspects.parquet")["sample_id"].to_pylist() == ["s2", "s0"]
    nothing = version_suspects(suspects(tmp_path, False), workspace=str(workspace), **about)
    assert nothing == {"revision": None, "tag": None, "digest": None} and len(versions(workspace)) == 1


def test_an_altered_list_of_suspects_is_refused(tmp_path: Path) -> None:
    workspace = tmp_path / "ws"
    told = version_suspects(suspects(tmp_path, True), workspace=str(workspace), run_id="r", data_digest="1" * 64, model_digest="2" * 64)
    fetch(told["tag"], tmp_path / "out", workspace=workspace)
    rows = (tmp_path / "out" / "suspects.parquet").read_bytes()
    stored = next(path for path in (workspace / "remote").rglob("*") if path.is_file() and path.read_bytes() == rows)
    stored.chmod(0o644)
    stored.write_bytes(rows[:-1] + bytes([rows[-1] ^ 1]))
    with pytest.raises(DataError, match="altered"):
        fetch(told["tag"], tmp_path / "other", workspace=workspace)
    (tmp_path / "out" / "suspects.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"suspects.parquet: altered"):
        read_suspects(tmp_path / "out")
    (tmp_path / "out" / "suspects.json").write_text("{}")
    with pytest.raises(DataError, match="is no list of suspects"):
        read_suspects(tmp_path / "out")


@pytest.mark.parametrize("changes", [{"trial": True}, {"kind": "confounder"}])
def test_a_model_of_poisoned_data_or_a_confounder_is_no_control(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clean control"):
        version_control(bundle(tmp_path / "m", **changes), workspace=str(tmp_path / "ws"))
    assert not (tmp_path / "ws").exists()


def test_a_malformed_sum_of_a_truth_is_told(tmp_path: Path) -> None:
    (trial, truth), workspace = poisoned(tmp_path), tmp_path / "ws"
    tag = version(trial, workspace=str(workspace), truths=[truth])["tag"]
    registry = workspace / "registry"
    (registry / "poisoned" / "badnets.truth.json").write_text("{")
    git(registry, "-c", "user.name=x", "-c", "user.email=x", "commit", "--quiet", "-am", "x")
    git(registry, "-c", "user.name=x", "-c", "user.email=x", "tag", "-f", "-a", "-m", f"digest: {read_info(trial).digest}", tag)
    with pytest.raises(DataError, match=r"badnets\.truth\.json under .* is malformed; restore the registry"):
        fetch(tag, tmp_path / "out", workspace=workspace, truth=tmp_path / "known")


@pytest.mark.parametrize("name", ["truth.json", "roles.parquet"])
def test_a_truth_that_was_altered_in_the_remote_is_refused(name: str, tmp_path: Path) -> None:
    (trial, truth), workspace = poisoned(tmp_path), tmp_path / "ws"
    tag = version(trial, workspace=str(workspace), truths=[truth])["tag"]
    stored = next(path for path in (workspace / "remote").rglob("*") if path.is_file() and path.read_bytes() == (truth / name).read_bytes())
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes().replace(b"badnets", b"blended") if name == "truth.json" else b"PAR1")
    with pytest.raises(DataError, match="altered"):
        fetch(tag, tmp_path / "out", workspace=workspace, truth=tmp_path / "known")
    assert not (tmp_path / "out").exists() and not (tmp_path / "known").exists()


def test_a_delivery_has_no_truth(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no truth is stored with it"):
        fetch(git(workspace / "registry", "tag"), tmp_path / "out", workspace=workspace, truth=tmp_path / "known")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("supplier", ["trusted", "poison@badnets", "trusted/2026-01-31"])
def test_no_supplier_s_name_makes_a_delivery_another_kind(supplier: str, tmp_path: Path) -> None:
    tag = version(make(tmp_path / "data"), workspace=str(tmp_path / "ws"), supplier=supplier, date="2026-01-31")["tag"]
    assert kind_of(tag) == "delivery" and find(tmp_path / "ws", read_info(tmp_path / "data").digest) is not None


HOSTILE = [
    "../../etc",
    "",
    "..",
    "a b",
    "A B",
    "a/b",
    "x.lock",
    "--force",
    "$(id)\n;rm -rf /",
    "名前",
    "a" * 500,
    "\udcff",
    "acme@{0}",
    "-",
]


def test_slugs_are_safe_and_never_shared() -> None:
    slugs = [slug(name) for name in HOSTILE]
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]{0,60}", found) for found in slugs), slugs
    assert len(set(slugs)) == len(slugs)
    assert slug("acme-2") == "acme-2"


def test_a_hostile_supplier_stays_inside_the_registry(workspace: Path, tmp_path: Path) -> None:
    supplier = "../../x; touch $(pwd)/pwned\n--force"
    tag = version(make(tmp_path / "data", 300), workspace=str(workspace), supplier=supplier, date="2026-01-31")["tag"]
    assert re.fullmatch(r"2026-01-31/x-touch-pwd-pwned-force-[0-9a-f]{8}/[0-9a-f]{12}", tag)
    assert sorted(path.name for path in workspace.iterdir()) == ["registry", "registry.lock", "remote"]
    assert fetch(tag, tmp_path / "out", workspace=workspace).num_images == 6


def test_the_users_git_settings_and_hooks_do_not_matter(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = workspace / "registry" / ".git" / "hooks" / "pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_AUTHOR_DATE", "nonsense")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".gitconfig").write_text("[commit]\n\tgpgsign = true\n")
    assert version(make(tmp_path / "data", 400), workspace=str(workspace), supplier="acme")["revision"]


@pytest.mark.parametrize("name", ["config", "config.local"])
def test_no_pickle_is_read_from_where_the_registrys_own_settings_say(workspace: Path, tmp_path: Path, name: str) -> None:
    settings = workspace / "registry" / ".dvc" / name
    text = settings.read_text() if settings.exists() else "[core]\n"
    settings.write_text(text.replace("[core]\n", f"[core]\n    site_cache_dir = {tmp_path / 'planted'}\n"))
    stored = version(make(tmp_path / "data", 700), workspace=str(workspace), supplier="acme")
    fetch(stored["tag"], tmp_path / "out", workspace=workspace)
    assert not (tmp_path / "planted").exists()


def test_an_unwritable_workspace_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("a file")
    with pytest.raises(EnvironmentFault, match="cannot write .*registry"):
        version(make(tmp_path / "data"), workspace=str(tmp_path / "ws"), supplier="acme")


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare git repository and a folder for the shards that workspaces share."""
    subprocess.run(["git", "init", "--quiet", "--bare", "--initial-branch=main", str(tmp_path / "origin.git")], check=True)
    (tmp_path / "shards").mkdir()
    monkeypatch.setenv("CBD_REGISTRY_GIT", str(tmp_path / "origin.git"))
    monkeypatch.setenv("CBD_REGISTRY_REMOTE", str(tmp_path / "shards"))
    return tmp_path / "origin.git"


def test_workspaces_share_a_registry_by_its_origin(origin: Path, tmp_path: Path) -> None:
    first = version(make(tmp_path / "one"), workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-01-31")
    assert git(origin, "tag", "--list") == first["tag"] and git(origin, "rev-parse", "main") == first["revision"]
    second = version(make(tmp_path / "two", 100), workspace=str(tmp_path / "ws2"), supplier="beta", date="2026-02-01")
    assert git(origin, "rev-parse", "main~1") == first["revision"]
    assert [tag for tag, _ in versions(tmp_path / "ws1")] == [first["tag"], second["tag"]]
    assert fetch(second["tag"], tmp_path / "out", workspace=tmp_path / "ws1") == read_info(tmp_path / "two")
    assert fetch(first["tag"], tmp_path / "fresh", workspace=tmp_path / "ws3") == read_info(tmp_path / "one")
    assert not (tmp_path / "ws1" / "remote").exists()


def test_a_version_that_was_overtaken_is_made_again_on_top(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = version(make(tmp_path / "one"), workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-01-31")
    overtaken: list[str] = []

    def commit(*arguments: Any, **named: Any) -> Any:
        stored = registry_commit(*arguments, **named)
        if not overtaken:
            overtaken.append("now")
            with monkeypatch.context() as patch:
                patch.setattr(registry_module, "_commit", registry_commit)
                overtaken[0] = version(make(tmp_path / "two", 100), workspace=str(tmp_path / "ws2"), supplier="acme", date="2026-02-01")[
                    "tag"
                ]
        return stored

    registry_commit = registry_module._commit
    monkeypatch.setattr(registry_module, "_commit", commit)
    third = version(make(tmp_path / "three", 200), workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-02-02")
    assert [tag for tag, _ in versions(tmp_path / "ws3")] == [first["tag"], overtaken[0], third["tag"]]
    assert fetch(overtaken[0], tmp_path / "a", workspace=tmp_path / "ws1") == read_info(tmp_path / "two")
    assert fetch(third["tag"], tmp_path / "b", workspace=tmp_path / "ws2") == read_info(tmp_path / "three")


def test_a_run_killed_before_it_published_publishes_when_it_comes_again(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path / "one")
    monkeypatch.setattr(registry_module, "publish", lambda *_: True)
    stored = version(data, workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-01-31")
    assert git(origin, "tag", "--list") == ""
    monkeypatch.undo()
    monkeypatch.setenv("CBD_REGISTRY_GIT", str(origin))
    monkeypatch.setenv("CBD_REGISTRY_REMOTE", str(tmp_path / "shards"))
    assert version(data, workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-02-02") == stored
    assert git(origin, "tag", "--list") == stored["tag"]


def test_an_origin_that_is_out_of_reach_or_went_another_way_is_one_line(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version(make(tmp_path / "one"), workspace=str(tmp_path / "ws1"), supplier="acme", date="2026-01-31")
    monkeypatch.setenv("CBD_REGISTRY_GIT", str(tmp_path / "none.git"))
    with pytest.raises(EnvironmentFault, match="git fetch failed") as caught:
        find(tmp_path / "ws1", "0" * 64)
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("CBD_REGISTRY_GIT")
    version(make(tmp_path / "two", 100), workspace=str(tmp_path / "ws2"), supplier="acme", date="2026-01-31")
    monkeypatch.setenv("CBD_REGISTRY_GIT", str(origin))
    with pytest.raises(EnvironmentFault, match="and the other way round; move it away"):
        find(tmp_path / "ws2", "0" * 64)


def test_shards_in_a_bucket_are_fetched_and_a_tampered_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (endpoint := os.environ.get("CBD_TEST_S3_ENDPOINT")):
        pytest.skip("CBD_TEST_S3_ENDPOINT names no S3 server")
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client, bucket = boto3.session.Session().client("s3"), f"cbd-{uuid.uuid4().hex}"
    client.create_bucket(Bucket=bucket)
    monkeypatch.setenv("CBD_REGISTRY_REMOTE", f"s3://{bucket}/shards")
    stored = version(make(tmp_path / "one"), workspace=str(tmp_path / "ws"), supplier="acme", date="2026-01-31")
    assert fetch(stored["tag"], tmp_path / "out", workspace=tmp_path / "ws") == read_info(tmp_path / "one")
    shutil.rmtree(tmp_path / "ws" / "registry" / ".dvc" / "cache", ignore_errors=True)  # else what was fetched once is not asked for again
    kept = [item for item in client.list_objects_v2(Bucket=bucket)["Contents"] if not item["Key"].endswith(".tmp")]
    largest = max(kept, key=lambda item: item["Size"])["Key"]
    body = client.get_object(Bucket=bucket, Key=largest)["Body"].read()
    client.put_object(Bucket=bucket, Key=largest, Body=body[:-1] + b"x")
    with pytest.raises(DataError, match="in the remote are missing or altered"):
        fetch(stored["tag"], tmp_path / "again", workspace=tmp_path / "ws")
    assert not (tmp_path / "again").exists()
