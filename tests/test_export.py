"""A run's export: one folder that proves itself to whoever has the key, and to nobody else whatever an attacker puts into it."""

import base64
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import cbd
from cryptography.hazmat.primitives.asymmetric import ec
from decided_case import POLICY, make_case, record
from exported_run import run_case

from cbd import attest
from cbd.audit import append
from cbd.chain import KINDS
from cbd.config import Validation, canonical_json
from cbd.decision import DECISION, SIGNATURE, SignedDecision, open_decision
from cbd.errors import DataError
from cbd.exported import ATTESTATIONS, EXPORT, MANIFEST, MODEL, expected_files, verify_export
from cbd.files import sha256_file
from cbd.heads import sign_head
from cbd.keys import PrivateKey, PublicKey, ensure_key, generate_key, key_id, sign, to_pem
from cbd.log_slice import LOG_SLICE
from cbd.merkle import leaf_hash
from cbd.model_signature import MODEL_SIGNATURE, sign_model
from components.attestation import attest_validation
from components.decide import decide, refuse_step
from components.export import export_run, write_manifest
from components.inventory import seal
from components.keyring import rotate_key
from components.records import read_records
from components.verification import verify_run

Make = Callable[..., dict[str, Any]]
MUTATIONS = 5_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_evaluation: Make) -> SimpleNamespace:
    """An export, its workspace and its run."""
    root = tmp_path_factory.mktemp("whole")
    case = run_case(root / "workspace", make_evaluation)
    append(case.workspace, "quarantine", {"what": "nothing about the run"})
    told = export_run(case.workspace / "runs" / case.run_id, case.workspace, root / "export")
    key = ensure_key(case.workspace)
    return SimpleNamespace(folder=root / "export", told=told, case=case, key=key, keys=[key.public_key()])


@pytest.fixture
def export(whole: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of it to attack."""
    return Path(shutil.copytree(whole.folder, tmp_path / "export"))


def refused(folder: Path, keys: list[PublicKey], match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        verify_export(folder, keys)
    assert "\n" not in str(caught.value)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def seal_again(folder: Path, key: PrivateKey) -> None:
    """The manifest over whatever lies there now, as only the key's holder can make it."""
    manifest = folder / MANIFEST
    predicate = json.loads(base64.b64decode(json.loads(manifest.read_bytes())["payload"]))["predicate"]
    found = {path.relative_to(folder).as_posix(): sha256_file(path) for path in files_of(folder) if path != manifest}
    statement = {"_type": attest.STATEMENT, "subject": attest.resources(found), "predicateType": EXPORT, "predicate": predicate}
    manifest.write_bytes(attest.seal(statement, key))


def change_statement(folder: Path, step: str, key: PrivateKey, change: Callable[[dict[str, Any]], Any]) -> None:
    """An attestation that says something else, well signed, and the summary that names it anew unless it is the summary."""
    path = folder / ATTESTATIONS / f"{step}.json"
    statement = attest.unseal(path.read_bytes(), [key.public_key()], told="x")
    change(statement)
    path.write_bytes(attest.seal(statement, key))
    if step != "decide":
        digest = sha256_file(path)
        change_statement(folder, "decide", key, lambda summed: _rename(summed, path.name, digest))
    seal_again(folder, key)


def _rename(summed: dict[str, Any], name: str, digest: str) -> None:
    for each in summed["predicate"]["inputAttestations"]:
        if each["uri"] == name:
            each["digest"] = {"sha256": digest}


def test_an_export_proves_what_it_holds(whole: SimpleNamespace) -> None:
    told = verify_export(whole.folder, whole.keys)
    assert told == whole.told
    assert (told["verdict"], told["run_id"], told["became"], told["development_key"]) == ("PASS", "run-1", "not registered", True)
    assert told["log_lines"] == 1 and told["log_size"] == 2 and told["num_files"] == len(files_of(whole.folder)) == 21
    assert {path.relative_to(whole.folder).as_posix() for path in files_of(whole.folder)} - {MANIFEST} == expected_files(
        json.loads((whole.folder / MODEL / DECISION).read_text())["digests"]
    )


def test_a_run_that_validation_stopped_is_exported_with_its_decision_alone(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path / "w", make_evaluation)
    validation = case.subject.validation / "validation.json"
    validation.write_text(json.dumps({**json.loads(validation.read_text()), "passed": False, "critical": ["class count"]}))
    records = case.workspace / "runs" / case.run_id / "records"
    records.mkdir(parents=True)
    (records.parent / "report.html").write_text("page")
    sets = {"dataset": case.subject.dataset, "trusted_set": case.subject.trusted_set}
    attest_validation(str(records), validation, **sets, limits=Validation(), suite="5" * 64, workspace=str(case.workspace))
    named = {name: SimpleNamespace(path=str(getattr(case.subject, name))) for name in ("dataset", "trusted_set", "validation")}
    decided = {"records": str(records), "workspace": str(case.workspace), "run_id": case.run_id, "policy": POLICY.model_dump()}
    refuse_step.python_func(**named, **decided, decision=SimpleNamespace(path=str(case.decision)))
    record(case)
    told = export_run(records.parent, case.workspace, tmp_path / "export")
    assert told["verdict"] == "BLOCK" and told["model_digest"] is None
    assert [path.name for path in files_of(tmp_path / "export" / ATTESTATIONS)] == ["decide.json", "validate.json"]
    (tmp_path / "export" / MODEL / "model.json").write_text("{}")
    seal_again(tmp_path / "export", ensure_key(case.workspace))
    refused(tmp_path / "export", [ensure_key(case.workspace).public_key()], "model")


def test_a_run_without_a_decision_or_with_something_missing_is_not_exported(tmp_path: Path, make_evaluation: Make) -> None:
    case = run_case(tmp_path / "w", make_evaluation)
    run_dir = case.workspace / "runs" / case.run_id
    shutil.move(run_dir / ATTESTATIONS / "scan.json", tmp_path / "scan.json")
    with pytest.raises(DataError, match=r"scan\.json is missing"):
        export_run(run_dir, case.workspace, tmp_path / "export")
    shutil.move(tmp_path / "scan.json", run_dir / ATTESTATIONS / "scan.json")
    (run_dir / ATTESTATIONS / "scan.json").write_bytes((run_dir / ATTESTATIONS / "evaluate.json").read_bytes())
    with pytest.raises(DataError, match=r"run run-1 does not hold: .*export/attestations/scan\.json"):
        export_run(run_dir, case.workspace, tmp_path / "export")
    (run_dir / "records" / "decide.json").unlink()
    with pytest.raises(DataError, match="not decided on"):
        export_run(run_dir, case.workspace, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def mutations(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """File, position and new byte: every file at positions drawn at random, the first and last byte among them."""
    drawn, files = random.Random(0), files_of(folder)
    for number in range(MUTATIONS):
        path = files[number % len(files)]
        size = path.stat().st_size
        position = (0, size - 1)[number // len(files)] if number < 2 * len(files) else drawn.randrange(size)
        yield path, position, drawn.randrange(1, 256)


@pytest.mark.slow
def test_every_changed_byte_in_any_file_is_refused_by_the_files_name(whole: SimpleNamespace, export: Path) -> None:
    missed = []
    for path, position, shift in mutations(export):
        data = path.read_bytes()
        path.write_bytes(data[:position] + bytes([(data[position] + shift) % 256]) + data[position + 1 :])
        try:
            verify_export(export, whole.keys)
            missed.append((path.name, position))
        except DataError as error:
            if str(path) not in str(error):
                missed.append((path.name, position))
        path.write_bytes(data)
    assert missed == [] and verify_export(export, whole.keys) == whole.told


@pytest.mark.parametrize("cut", [0, 1, -1])
def test_a_cut_or_lengthened_file_is_refused(whole: SimpleNamespace, export: Path, cut: int) -> None:
    for path in files_of(export):
        data = path.read_bytes()
        path.write_bytes(data[:cut] if cut <= 0 else data + b"\n")
        refused(export, whole.keys, str(path))
        path.write_bytes(data)


def test_missing_and_extra_files_and_folders_are_refused(whole: SimpleNamespace, export: Path, tmp_path: Path) -> None:
    for path in files_of(export):
        shutil.move(path, tmp_path / "aside")
        refused(export, whole.keys, f"{path.name}: missing")
        shutil.move(tmp_path / "aside", path)
    for name in ("extra.json", "model/handler.py", "attestations/more.json", ".hidden", "a b", "model/deep/er", "manifest.json.bak"):
        extra = export / name
        extra.parent.mkdir(exist_ok=True)
        extra.write_text("x")
        refused(export, whole.keys, f"{extra.name}|deep")
        extra.unlink()
        if extra.parent.name == "deep":
            refused(export, whole.keys, "deep: an empty folder")
            extra.parent.rmdir()
    assert verify_export(export, whole.keys)


def test_links_and_special_files_are_refused(whole: SimpleNamespace, export: Path, tmp_path: Path) -> None:
    """Even where the file that a link leads to is right."""
    for path in (export / MANIFEST, export / MODEL / "model.safetensors", export / MODEL):
        shutil.move(path, tmp_path / "aside")
        path.symlink_to(tmp_path / "aside")
        refused(export, whole.keys, f"{path.name}: a link or a special file")
        path.unlink()
        shutil.move(tmp_path / "aside", path)
    os.mkfifo(export / "pipe")
    refused(export, whole.keys, "pipe: a link or a special file")


def test_an_attacker_who_signs_everything_again_is_refused(tmp_path: Path, make_evaluation: Make, whole: SimpleNamespace) -> None:
    """A whole workspace of his own, with another model: consistent to the last digest, and signed by him."""
    case = run_case(tmp_path / "his", make_evaluation, weight=666.0)
    export_run(case.workspace / "runs" / case.run_id, case.workspace, tmp_path / "export")
    his = ensure_key(case.workspace).public_key()
    assert verify_export(tmp_path / "export", [his])["verdict"] == "PASS"
    refused(tmp_path / "export", whole.keys, rf"manifest\.json: signed by key '{key_id(his)[:12]}', which is not trusted")
    refused(tmp_path / "export", [], "not trusted")
    mixed = Path(shutil.copytree(tmp_path / "export", tmp_path / "mix"))
    shutil.copyfile(whole.folder / MANIFEST, mixed / MANIFEST)
    refused(mixed, whole.keys, "altered")


def test_other_spellings_of_json_and_base64_are_refused(whole: SimpleNamespace, export: Path) -> None:
    path = export / MANIFEST
    data, envelope = path.read_bytes(), json.loads(path.read_bytes())
    spelled = [json.dumps(envelope, indent=1).encode(), data + b"\n", data.replace(b"{", b'{"payload":"",', 1)]
    spelled += [
        canonical_json({**envelope, "payload": text}) for text in (envelope["payload"] + "\n", envelope["payload"].rstrip("=") + "===")
    ]
    for text in spelled:
        path.write_bytes(text)
        refused(export, whole.keys, r"manifest\.json: expected .*canonical")
    path.write_bytes(data)
    for step in (path.stem for path in sorted((export / ATTESTATIONS).iterdir())):
        attestation = export / ATTESTATIONS / f"{step}.json"
        kept = attestation.read_bytes()
        attestation.write_bytes(json.dumps(json.loads(kept), indent=1).encode())
        seal_again(export, whole.key)
        refused(export, whole.keys, rf"{step}\.json: expected an object in canonical JSON")
        attestation.write_bytes(kept)
    slice_ = json.loads((export / LOG_SLICE).read_bytes())
    (export / LOG_SLICE).write_text(json.dumps(slice_))
    seal_again(export, whole.key)
    refused(export, whole.keys, r"log\.json: expected a slice of a log in canonical JSON")


def set_in(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(statement: dict[str, Any]) -> None:
        inner: Any = statement
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


OTHER = [
    {"name": name, "digest": {"sha256": "0" * 64}} for name in ("confounder", "dataset", "model", "policy", "trusted set", "decision.json")
]


@pytest.mark.parametrize(
    ("step", "change", "match"),
    [
        ("validate", set_in("subject", value=OTHER), r"validate\.json: dataset is 000000000000"),
        ("validate", set_in("predicate", "configuration", value=[]), r"validate\.json: trusted set is None"),
        ("version", set_in("subject", value=OTHER), r"version\.json: dataset is 000000000000"),
        (
            "train_confounder",
            set_in("predicate", "buildDefinition", "resolvedDependencies", value=OTHER),
            r"train_confounder\.json: dataset",
        ),
        ("train_deconfounded", set_in("subject", value=OTHER), r"train_deconfounded\.json: model"),
        ("train_deconfounded", set_in("predicate", "buildDefinition", "resolvedDependencies", value=[]), "dataset is None"),
        (
            "train_deconfounded",
            set_in("predicate", "runDetails", "metadata", "invocationId", value="run-0"),
            "run is run-0, expected run-1",
        ),
        (
            "train_deconfounded",
            set_in("predicateType", value=attest.TEST_RESULT),
            "predicate type is .*expected https://slsa.dev/provenance/v1",
        ),
        ("evaluate", set_in("subject", value=OTHER), r"evaluate\.json: model"),
        ("evaluate", set_in("predicate", "configuration", value=OTHER), r"evaluate\.json: trusted set"),
        ("scan", set_in("predicate", "cbd_invocationId", value=None), "run is None"),
        ("scan", set_in("subject", value=[]), r"scan\.json: model is None"),
        ("decide", set_in("subject", value=OTHER), r"decide\.json: decision\.json"),
        ("decide", set_in("predicate", "policy", "digest", "sha256", value="0" * 64), r"decide\.json: urn:cbd:policy"),
        ("decide", set_in("predicate", "cbd_verdict", value="BLOCK"), r"decide\.json: verdict is BLOCK, expected PASS"),
        ("decide", set_in("predicate", "inputAttestations", value=[]), "not the attestation that the verdict was given on"),
    ],
)
def test_attestations_that_do_not_lead_to_each_other_are_refused(
    whole: SimpleNamespace, export: Path, step: str, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    """All signed by the trusted key: somebody put together what does not belong together."""
    change_statement(export, step, whole.key, change)
    refused(export, whole.keys, match)


def test_files_of_another_run_are_refused_although_the_manifest_names_them(tmp_path: Path, make_evaluation: Make) -> None:
    workspace = tmp_path / "w"
    first, second = run_case(workspace, make_evaluation), run_case(workspace, make_evaluation, run_id="run-2", weight=2.0, per_class=3)
    for case in (first, second):
        export_run(workspace / "runs" / case.run_id, workspace, tmp_path / case.run_id)
    key = ensure_key(workspace)
    for path in files_of(tmp_path / "run-2"):
        name = path.relative_to(tmp_path / "run-2").as_posix()
        if name in (MANIFEST, "report.html") or path.read_bytes() == (tmp_path / "run-1" / name).read_bytes():
            continue
        mixed = Path(shutil.copytree(tmp_path / "run-1", tmp_path / f"mixed-{name.replace('/', '-')}"))
        shutil.copyfile(path, mixed / name)
        seal_again(mixed, key)
        refused(mixed, [key.public_key()], "altered|not the|of run|is about|names no decision")


def test_a_decision_with_a_better_verdict_or_another_policy_is_refused(whole: SimpleNamespace, export: Path) -> None:
    """Signed by the trusted key, whose holder forgot the attestations and the log."""
    content = json.loads((export / MODEL / DECISION).read_text())
    for changed, match in (
        ({"created": "2020-01-01T00:00:00Z"}, r"manifest\.json: of run"),
        ({"policy": {**content["policy"], "min_clean_accuracy": 0.1}}, "policy"),
    ):
        _decide_again(whole, export, {**content, **changed}, forge_manifest="policy" in changed)
        refused(export, whole.keys, match)


def _decide_again(whole: SimpleNamespace, export: Path, content: dict[str, Any], *, forge_manifest: bool) -> SignedDecision:
    place = export / MODEL
    (place / DECISION).write_bytes(canonical_json(content))
    (place / SIGNATURE).write_text(sign(canonical_json(content), whole.key) + "\n")
    (place / MODEL_SIGNATURE).unlink()
    sign_model(place, place, place / MODEL_SIGNATURE, whole.key)
    signed = open_decision(place, whole.keys)
    if forge_manifest:
        write_manifest(export, signed, whole.case.workspace)
    else:
        seal_again(export, whole.key)
    return signed


def test_a_log_slice_that_was_edited_is_refused(whole: SimpleNamespace, export: Path) -> None:
    path = export / LOG_SLICE
    good = json.loads(path.read_bytes())
    line = good["lines"][0]
    other = ec.generate_private_key(ec.SECP256R1())
    head = sign_head(whole.case.workspace)
    for changed, match in (
        ({"lines": []}, "names no decision"),
        ({"lines": [line, line]}, "doubled"),
        ({"lines": [{**line, "path": []}]}, "not in the tree"),
        ({"lines": [{**line, "path": [*line["path"], "0" * 64]}]}, "not in the tree"),
        ({"lines": [{**line, "path": ["X" * 64]}]}, "is no proof"),
        ({"lines": [{**line, "entry": {**line["entry"], "data": {}}}]}, "was edited"),
        ({"lines": [{**line, "entry": {**line["entry"], "signature": sign(b"x", other)}}]}, "not in the tree"),
        ({"head": {**good["head"], "root": "0" * 64}}, "the head is altered"),
        ({"head": {**good["head"], "size": 1}}, "the head is altered"),
        ({"head": {**good["head"], "signature": head["signature"]}}, "the head is altered"),
        ({"head": {}}, "is no head"),
        ({"more": 1}, "expected a slice"),
    ):
        path.write_bytes(canonical_json({**good, **changed}))
        seal_again(export, whole.key)
        refused(export, whole.keys, rf"log\.json: .*{match}")


def test_weights_that_are_none_are_refused_whoever_signed_them(whole: SimpleNamespace, export: Path) -> None:
    for data in (pickle.dumps([1]), (2**40).to_bytes(8, "little") + b"{}", b"", (4).to_bytes(8, "little") + b"null"):
        (export / MODEL / "model.safetensors").write_bytes(data)
        card = json.loads((export / MODEL / "model.json").read_text())
        (export / MODEL / "model.json").write_text(
            json.dumps({**card, "weights_sha256": sha256_file(export / MODEL / "model.safetensors")})
        )
        seal_again(export, whole.key)
        refused(export, whole.keys, r"model\.safetensors: no safetensors file")


@pytest.mark.parametrize("name", ["measurements/evaluation.json", "measurements/scan.json", "data/dataset.json", "bom.cdx.json"])
def test_what_the_decision_was_made_on_is_there_byte_for_byte(whole: SimpleNamespace, export: Path, name: str) -> None:
    """Another content, which the manifest names."""
    values = json.loads((export / name).read_text())
    (export / name).write_text(json.dumps({**values, "num_images": 7, "version": 7, "seed": 7}))
    seal_again(export, whole.key)
    refused(export, whole.keys, rf"{Path(name).name}: SHA-256 is .* altered|decide\.json: {Path(name).name} is")


LIGHT = """
import importlib.abc, socket, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
def no_network(*_): raise OSError("network")
socket.socket.connect = no_network
from pipelines.cli import main
main(sys.argv[1:])
"""
HEAVY = ("torch", "torchvision", "mlflow", "kfp", "dvc", "numpy", "pandas", "pyarrow", "PIL", "boto3", "great_expectations", "rich")


def test_the_check_needs_the_extra_audit_alone_and_no_network(whole: SimpleNamespace) -> None:
    """In a process where nothing of the pipeline can be imported; where the system allows it, in a namespace without a network."""
    key = whole.case.workspace / "keys" / "signing.pub"
    code = LIGHT.replace("{names}", repr(HEAVY))
    command = [sys.executable, "-c", code, "audit", "verify", str(whole.folder), "--trust", str(key), "--json"]
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-rn", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"verified": True, **whole.told}


def test_the_command_line_exports_and_verifies(whole: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, out = str(whole.case.workspace / "keys" / "signing.pub"), tmp_path / "out"
    export = ("audit", "export", whole.case.run_id, "--out", str(out), "--workspace", str(whole.case.workspace))
    assert cbd(capsys, *export)[0] == 0
    assert cbd(capsys, *export)[0] == 2, "nothing is overwritten"
    assert cbd(capsys, "audit", "verify", str(out), "--trust", key)[0] == 0
    for arguments, told in (
        ((), "name the public key that you trust"),
        (("--trust", str(out / "key.pub")), "lies in the export itself"),
        (("--trust", str(tmp_path / "none.pub")), "no such key"),
    ):
        code, _, error = cbd(capsys, "audit", "verify", str(out), *arguments)
        assert code == 2 and told in error
    (out / "report.html").write_text("another page")
    code, _, error = cbd(capsys, "audit", "verify", str(out), "--trust", key)
    assert code == 2 and f"{out / 'report.html'}: altered" in error


def test_in_the_workspace_the_attestations_of_a_run_are_checked_the_same_way(tmp_path: Path, make_evaluation: Make) -> None:
    case = run_case(tmp_path, make_evaluation)
    run_dir, records = tmp_path / "runs" / case.run_id, read_records(str(tmp_path / "runs" / case.run_id / "records"))
    seal(run_dir, tmp_path, records=records, result={"verdict": "PASS", "consistent": True})
    assert "attestations: 7, which lead from the data to the decision" in list(verify_run(run_dir, tmp_path))
    path = run_dir / ATTESTATIONS / "version.json"
    kept = path.read_bytes()
    for data in (None, kept[:-1] + b"x"):
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(DataError, match=r"version\.json: (missing|altered)"):
            list(verify_run(run_dir, tmp_path))
    path.write_bytes((run_dir / ATTESTATIONS / "train_confounder.json").read_bytes())
    seal(run_dir, tmp_path, records=records, result={"verdict": "PASS", "consistent": True})
    with pytest.raises(DataError, match=r"version\.json: (dataset|not the attestation)"):
        list(verify_run(run_dir, tmp_path))


def test_a_decision_that_was_replaced_by_a_later_one_is_not_exported(tmp_path: Path, make_evaluation: Make) -> None:
    case = run_case(tmp_path, make_evaluation)
    stricter = POLICY.model_copy(update={"min_clean_accuracy": 0.95})
    decide(case.subject, tmp_path / "again", policy=stricter, workspace=tmp_path, run_id="run-1")
    with pytest.raises(DataError, match=r"log\.json: the run was decided again since, PASS"):
        export_run(tmp_path / "runs" / "run-1", tmp_path, tmp_path / "export")


@pytest.fixture
def rotated(tmp_path: Path, make_evaluation: Make) -> SimpleNamespace:
    """A run that the first key signed, exported after two rotations; `keys` are all three."""
    case = run_case(tmp_path / "workspace", make_evaluation)
    keys = [ensure_key(case.workspace)]
    for _ in range(2):
        rotate_key(case.workspace, to=None, reason="test", by="me")
        keys.append(ensure_key(case.workspace))
    export_run(case.workspace / "runs" / case.run_id, case.workspace, tmp_path / "export")
    return SimpleNamespace(folder=tmp_path / "export", workspace=case.workspace, keys=keys, public=[key.public_key() for key in keys])


def test_after_rotations_an_export_holds_by_the_newest_key_alone_which_vouches_for_those_before(rotated: SimpleNamespace) -> None:
    first, second, newest = rotated.public
    assert verify_export(rotated.folder, [newest])["key_id"] == key_id(first)
    refused(rotated.folder, [first], r"manifest\.json: .*not trusted")
    refused(rotated.folder, [first, second], r"manifest\.json: .*not trusted")


def change_slice(folder: Path, key: PrivateKey, change: Callable[[dict[str, Any]], Any]) -> None:
    """The slice of the log with something else in it, in a manifest that the key's own holder signed."""
    content = json.loads((folder / LOG_SLICE).read_bytes())
    change(content)
    (folder / LOG_SLICE).write_bytes(canonical_json(content))
    seal_again(folder, key)


def _forged_rotation(thief: PrivateKey, victim: PublicKey, seq: int = 2) -> dict[str, Any]:
    """A line by which a thief hands over to his victim's key, as if it had come after his."""
    keys = {"from": to_pem(thief.public_key()), "to": to_pem(victim), "key_id": key_id(victim)}
    entry = {"seq": seq, "time": "2026-01-01T00:00:00.000Z", "event": "rotate", "data": keys, "previous": "0" * 64}
    digest = sha256(canonical_json(entry)).hexdigest()
    return {**entry, "hash": digest, "signature": sign(bytes.fromhex(digest), thief)}


def test_an_attackers_rotation_to_the_trusted_key_makes_nothing_of_his_believed(rotated: SimpleNamespace) -> None:
    thief, newest = generate_key(), rotated.keys[-1]
    forged = _forged_rotation(thief, newest.public_key())
    path = json.loads((rotated.folder / LOG_SLICE).read_bytes())["rotations"][0]["path"]
    for line in ({"entry": forged, "path": []}, {"entry": forged, "path": path}):
        change_slice(rotated.folder, newest, lambda content, line=line: content["rotations"].append(line))
        refused(rotated.folder, [newest.public_key()], r"log\.json: a rotation is not in the tree of the head")


def test_a_head_of_an_attackers_own_log_vouches_for_nothing(rotated: SimpleNamespace) -> None:
    """In his tree he hands over to the victim's key, which never signed a head over that."""
    thief, newest = generate_key(), rotated.keys[-1]
    forged = _forged_rotation(thief, newest.public_key(), seq=1)
    head = {"schema_version": 1, "size": 1, "root": leaf_hash(canonical_json(forged)).hex(), "time": forged["time"]}
    for named in (thief, newest):
        told = {**head, "key_id": key_id(named.public_key())}
        told["signature"] = sign(canonical_json(told), thief)
        proven = {"head": told, "rotations": [{"entry": forged, "path": []}]}
        change_slice(rotated.folder, newest, lambda content, proven=proven: content.update(proven))
        refused(rotated.folder, [newest.public_key()], r"log\.json: the head is altered, or of key .*, not a trusted one")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda content: content["rotations"].clear(), r"decision\.json: signed by key .*, which is not trusted"),
        (lambda content: content["rotations"].pop(0), r"decision\.json: signed by key .*, which is not trusted"),
        (lambda content: content["rotations"].pop(), r"log\.json: line 2 hands over to another key"),
        (lambda content: content["rotations"].reverse(), r"log\.json: line 2 hands over to another key"),
        (lambda content: content["rotations"].append(content["rotations"][-1]), r"log\.json: line 3 hands over to another key"),
        (lambda content: content["rotations"].append(content["lines"][0]), r"log\.json: line 1 is no rotation"),
    ],
)
def test_rotations_that_are_left_out_or_put_together_otherwise_are_refused(
    rotated: SimpleNamespace, change: Callable[[dict[str, Any]], Any], told: str
) -> None:
    change_slice(rotated.folder, rotated.keys[-1], change)
    refused(rotated.folder, [rotated.public[-1]], told)


def test_a_revoked_key_seals_no_manifest_any_more(rotated: SimpleNamespace) -> None:
    seal_again(rotated.folder, rotated.keys[0])
    refused(rotated.folder, [rotated.public[-1]], r"manifest\.json: signed by key .*, which is not trusted")


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory, make_evaluation: Make, make_canary: Make) -> SimpleNamespace:
    """The export of a run with a canary and a baseline, and its key."""
    root = tmp_path_factory.mktemp("attested")
    case = run_case(root / "workspace", make_evaluation, canary=make_canary(), baseline=True)
    export_run(case.workspace / "runs" / case.run_id, case.workspace, root / "export")
    return SimpleNamespace(folder=root / "export", case=case, key=ensure_key(case.workspace))


@pytest.fixture
def nine(attested: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(attested.folder, tmp_path / "nine"))


def test_validation_canary_and_baseline_attest_as_the_other_steps_do(attested: SimpleNamespace) -> None:
    public = [attested.key.public_key()]
    assert {path.stem for path in (attested.folder / ATTESTATIONS).iterdir()} == set(KINDS) and len(KINDS) == 9
    told = {step: attest.unseal((attested.folder / ATTESTATIONS / f"{step}.json").read_bytes(), public, told=step) for step in KINDS}
    digests = json.loads((attested.folder / MODEL / DECISION).read_text())["digests"]
    assert attest.digests_in(told["validate"]["subject"]) == {"dataset": digests["data"], "validation.json": digests["validation"]}
    assert attest.digests_in(told["canary"]["subject"]) == {"canary.json": digests["canary"]}
    canary = told["canary"]["predicate"]["buildDefinition"]
    assert attest.digests_in(canary["resolvedDependencies"])["canary"] == "f" * 64 and canary["externalParameters"]["trained_by"] == "r"
    undefended = attest.digests_in(told["train_undefended"]["predicate"]["buildDefinition"]["resolvedDependencies"])
    assert undefended["dataset"] == digests["data"] and "confounder" not in undefended
    assert verify_export(attested.folder, public)["num_files"] == 24


@pytest.mark.parametrize(
    ("step", "change", "match"),
    [
        ("canary", set_in("subject", value=[]), r"canary\.json: canary\.json is None"),
        ("canary", set_in("predicate", "buildDefinition", "resolvedDependencies", value=OTHER), r"canary\.json: trusted set is 0000"),
        (
            "train_undefended",
            set_in("predicate", "buildDefinition", "resolvedDependencies", value=OTHER),
            r"train_undefended\.json: dataset is 0000",
        ),
        ("train_undefended", set_in("predicate", "runDetails", "metadata", "invocationId", value="run-0"), "run is run-0, expected run-1"),
    ],
)
def test_attestations_of_canary_and_baseline_that_are_about_something_else_are_refused(
    attested: SimpleNamespace, nine: Path, step: str, change: Callable[[dict[str, Any]], None], match: str
) -> None:
    change_statement(nine, step, attested.key, change)
    refused(nine, [attested.key.public_key()], match)


def test_the_attestation_of_a_baseline_is_neither_left_out_nor_added(
    attested: SimpleNamespace, nine: Path, whole: SimpleNamespace, export: Path
) -> None:
    (nine / ATTESTATIONS / "train_undefended.json").rename(export / ATTESTATIONS / "train_undefended.json")
    seal_again(nine, attested.key)
    refused(nine, [attested.key.public_key()], r"train_undefended\.json: not the attestation that the verdict was given on")
    statement = attest.unseal((export / ATTESTATIONS / "train_undefended.json").read_bytes(), [attested.key.public_key()], told="x")
    (export / ATTESTATIONS / "train_undefended.json").write_bytes(attest.seal(statement, whole.key))
    seal_again(export, whole.key)
    refused(export, whole.keys, r"train_undefended\.json: not the attestation that the verdict was given on")
