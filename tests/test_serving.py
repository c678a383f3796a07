"""A model is given out only with its signature, its digests and a decision that demands an alias; every forgery has its reason."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from decided_case import Case, change_json, make_bundle, make_case

import cbd
from cbd.bundle import CARD, WEIGHTS, bundle_digest, check_weights, read_card
from cbd.config import canonical_json
from cbd.decision import DECISION, SIGNATURE
from cbd.errors import CbdError, ConfigError, DataError
from cbd.files import sha256_file
from cbd.keys import ensure_key, key_id, sign
from cbd.model_signature import MODEL_SIGNATURE, SIGNED_FILES, sign_model
from cbd.signed_model import check_model, check_verdict

Make = Callable[..., dict[str, Any]]


def network_case(workspace: Path, make_evaluation: Make, **changes: Any) -> Case:
    """A decided case whose weights are a network's."""
    import torch

    from cbd.models import make_model, save_bundle

    case = make_case(workspace, make_evaluation, **changes)
    network = make_model("wrn-16-1", num_classes=4, image_size=32, generator=torch.Generator().manual_seed(0))
    save_bundle(network, read_card(case.bundle), case.bundle)
    for name in ("evaluation", "scan"):
        change_json(getattr(case.subject, name) / f"{name}.json", model_digest=bundle_digest(case.bundle))
    case.decide()
    return case


def gather(case: Case, out: Path) -> Path:
    """The folder of a signed model."""
    out.mkdir()
    for name in SIGNED_FILES:
        shutil.copyfile((case.bundle if name in (WEIGHTS, CARD) else case.decision) / name, out / name)
    shutil.copyfile(case.decision / MODEL_SIGNATURE, out / MODEL_SIGNATURE)
    return out


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory, make_evaluation: Make) -> Path:
    """A folder `model` with a champion, beside the workspace that made it."""
    root = tmp_path_factory.mktemp("passed")
    gather(network_case(root / "workspace", make_evaluation), root / "model")
    return root


@pytest.fixture
def model(passed: Path, tmp_path: Path) -> Path:
    """A copy of it to attack."""
    return Path(shutil.copytree(passed / "model", tmp_path / "model"))


def key_of(passed: Path) -> Path:
    return passed / "workspace" / "keys" / "signing.pub"


def refused(model: Path, trust: Path, match: str) -> None:
    with pytest.raises(CbdError, match=match) as caught:
        cbd.load(model, trust=trust)
    assert "\n" not in str(caught.value)


def test_a_champion_is_loaded(passed: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    network, card = cbd.load(model, trust=key_of(passed))
    logits, _ = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert logits.shape == (1, 4) and card.class_names == ("ant", "bee", "cat", "dog") and not network.training
    monkeypatch.setenv("CBD_TRUST", str(key_of(passed).parent))
    assert cbd.load(str(model))[1] == card


def test_nothing_is_trusted_by_itself(passed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CBD_TRUST", raising=False)
    with pytest.raises(ConfigError, match="no key to trust"):
        cbd.load(model)
    ensure_key(tmp_path / "other")
    refused(model, tmp_path / "other" / "keys" / "signing.pub", "not trusted")
    refused(model, tmp_path / "nowhere.pub", "no such key")
    (tmp_path / "empty").mkdir()
    refused(model, tmp_path / "empty", "no public key there")


@pytest.mark.parametrize("name", [*SIGNED_FILES, MODEL_SIGNATURE])
def test_a_changed_byte_in_any_file_is_refused(passed: Path, model: Path, name: str) -> None:
    data = (model / name).read_bytes()
    for position in range(0, len(data), max(1, len(data) // 12)):
        (model / name).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        refused(
            model, key_of(passed), "altered|not the signature|malformed|not JSON|schema version|expected the run's|not trusted|no model"
        )


@pytest.mark.parametrize("name", [*SIGNED_FILES, MODEL_SIGNATURE])
def test_a_missing_file_and_a_link_are_refused(passed: Path, model: Path, tmp_path: Path, name: str) -> None:
    shutil.move(model / name, tmp_path / name)
    refused(model, key_of(passed), f"{name} is missing")
    (model / name).symlink_to(tmp_path / name)
    refused(model, key_of(passed), f"{name} is missing")


def test_json_of_the_wrong_shape_is_refused_in_one_line(passed: Path, model: Path) -> None:
    decision, card = (json.loads((model / name).read_text()) for name in (DECISION, CARD))
    for text in (json.dumps(decision | {"digests": 5}), json.dumps(decision | {"digests": ["data"]}), "[" * 100_000, "5"):
        (model / DECISION).write_text(text)
        refused(model, key_of(passed), f"{DECISION}: (not JSON|schema version)")
    shutil.copyfile(passed / "model" / DECISION, model / DECISION)
    for text in ("[" * 100_000, json.dumps(card | {"class_names": 5}), "5"):
        (model / CARD).write_text(text)
        refused(model, key_of(passed), f"{CARD}: malformed")


def test_a_file_too_many_is_refused(passed: Path, model: Path) -> None:
    """`cbd.load` takes only what it knows; whoever checks the folder itself is told."""
    (model / "handler.py").write_text("import os")
    key = ensure_key(passed / "workspace").public_key()
    with pytest.raises(DataError, match=r"handler\.py: not part of a signed model"):
        check_model(model, [key])
    assert cbd.load(model, trust=key_of(passed))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"turned": {"white-centre": (1, 50)}}, "verdict REVIEW"),
        ({"turned": {"white-centre": (1, 600)}}, "verdict BLOCK"),
        ({"trial": True}, "a trial"),
    ],
)
def test_what_did_not_pass_is_refused_by_its_verdict(tmp_path: Path, make_evaluation: Make, changes: Any, told: str) -> None:
    case = make_case(tmp_path / "workspace", make_evaluation, **changes)
    case.decide()
    refused(gather(case, tmp_path / "model"), tmp_path / "workspace" / "keys" / "signing.pub", f"behind the alias champion stands {told}")


def test_a_review_is_a_candidate_and_no_other_alias_is_known(tmp_path: Path, make_evaluation: Make) -> None:
    case = make_case(tmp_path / "workspace", make_evaluation, turned={"white-centre": (1, 50)})
    case.decide()
    signed = check_model(gather(case, tmp_path / "model"), [ensure_key(tmp_path / "workspace").public_key()])
    check_verdict(signed, "candidate", told="x")
    for alias in ("champion", "latest"):
        with pytest.raises(DataError, match=f"alias {alias} stands verdict REVIEW"):
            check_verdict(signed, alias, told="x")


def test_the_decision_of_another_model_is_refused(tmp_path: Path, make_evaluation: Make) -> None:
    """All signed by the workspace's own key, but not together."""
    workspace = tmp_path / "workspace"
    first, second = make_case(workspace, make_evaluation), make_case(workspace, make_evaluation, run_id="run-2", weight=2.0)
    first.decide(), second.decide()
    model = gather(first, tmp_path / "model")
    for name in (DECISION, SIGNATURE, MODEL_SIGNATURE):
        shutil.copyfile(second.decision / name, model / name)
    refused(model, workspace / "keys" / "signing.pub", "its signed decision is about")
    shutil.copyfile(first.decision / DECISION, model / DECISION)
    shutil.copyfile(first.decision / SIGNATURE, model / SIGNATURE)
    refused(model, workspace / "keys" / "signing.pub", r"model\.sig: not the signature")


def test_an_attacker_who_signs_everything_again_with_a_key_of_his_own_gets_no_model_out(passed: Path, model: Path, tmp_path: Path) -> None:
    """With a key of his own, and with the name of the trusted key on what he signed."""
    own, trusted = ensure_key(tmp_path / "attacker"), ensure_key(passed / "workspace").public_key()
    content = json.loads((model / DECISION).read_text())
    for claimed, match in ((own.public_key(), "not trusted"), (trusted, "is not the signature of key")):
        data = canonical_json({**content, "signed_by": {"key_id": key_id(claimed), "development": False}})
        (model / DECISION).write_bytes(data)
        (model / SIGNATURE).write_text(sign(data, own) + "\n")
        (model / MODEL_SIGNATURE).unlink(missing_ok=True)
        sign_model(model, model, model / MODEL_SIGNATURE, own)
        refused(model, key_of(passed), match)
        check_model(model, [own.public_key()]) if claimed is not trusted else None


def test_a_confounder_is_refused_whatever_was_signed(passed: Path, model: Path) -> None:
    change_json(model / CARD, kind="confounder")
    with pytest.raises(DataError, match="a confounder holds the backdoor"):
        check_model(model, [ensure_key(passed / "workspace").public_key()])


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/cbd-was-here",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Payload()),
        b"PK\x03\x04" + b"\0" * 100,
        b"",
        b"\x08",
        (2**63).to_bytes(8, "little") + b"{}",
        (5 * 2**20).to_bytes(8, "little") + b"{" + b" " * (6 * 2**20),
        (2).to_bytes(8, "little") + b"{}" + b"smuggled",
        (100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995,
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}   ' + b"\0" * 4,
        (62).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999]}}  ' + b"\0" * 4,
    ],
    ids=["pickle", "zip", "empty", "one byte", "2^63 header", "5 MiB header", "smuggled bytes", "deep header", "shape bomb", "offset bomb"],
)
def test_what_only_looks_like_safetensors_is_refused(passed: Path, model: Path, data: bytes) -> None:
    """Although the card names exactly these bytes and a trusted key signed them."""
    (model / WEIGHTS).write_bytes(data)
    with pytest.raises(DataError, match="no safetensors file"):
        check_weights(model)
    change_json(model / CARD, weights_sha256=sha256_file(model / WEIGHTS))
    refused(model, key_of(passed), "no safetensors file")
    assert not Path("/tmp/cbd-was-here").exists()


def test_the_stock_verifier_agrees(passed: Path, model: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(model), "--signature", str(model / MODEL_SIGNATURE)]
    command += ["--public_key", str(key_of(passed))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Verification succeeded" in done.stdout, done.stderr
    (model / CARD).write_bytes((model / CARD).read_bytes() + b" ")
    assert subprocess.run(command, capture_output=True).returncode != 0


def test_importing_cbd_imports_neither_torch_nor_the_platform() -> None:
    code = "import sys, cbd, cbd.serving; print([name for name in ('torch', 'mlflow', 'kfp', 'model_signing') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_bundle_without_a_decision_is_no_champion(tmp_path: Path, passed: Path) -> None:
    refused(make_bundle(tmp_path / "bare", "a" * 64), key_of(passed), r"decision\.json is missing")


def test_the_guides_server_answers_with_the_class(passed: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from cbd.images import encode_png

    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "serving.md").read_text(), re.DOTALL)
    code = "\n".join(blocks).replace("evidence/model", str(model)).replace("keys/signing.pub", str(key_of(passed)))
    code, last, _ = code.partition("HTTPServer((")
    guide: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "docs/serving.md", "exec"), guide)
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    with guide["HTTPServer"](("127.0.0.1", 0), guide["Handler"]) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        answer = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}", data=encode_png(image), timeout=60).read()
    assert last and answer.decode() in guide["card"].class_names
