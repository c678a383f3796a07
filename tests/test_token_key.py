"""A key in a PKCS#11 token signs everything that a key in a file does; the token is SoftHSM2's."""

import os
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from exported_run import run_case

from cbd.audit import append
from cbd.errors import ConfigError
from cbd.exported import verify_export
from cbd.heads import read_log
from cbd.keys import ENVIRONMENT, ensure_key, generate_key, is_development, key_id, load_public_key, sign, verify, write_private_key
from cbd.token_key import PIN, TokenKey, open_token_key
from components.export import export_run
from components.keyring import list_keys, rotate_key

Make = Callable[..., dict[str, Any]]
_PLACES = ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so")
LIBRARY = next((path for path in map(Path, _PLACES) if path.is_file()), None)
SECRET = "271828"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a P-256 key in a token; the PIN is not in it. Beside it lies a P-384 key, as 02."""
    if LIBRARY is None or not shutil.which("softhsm2-util"):
        pytest.skip("SoftHSM2 is not installed (Debian: softhsm2)")
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed (the extra `hsm`)")
    place = tmp_path_factory.mktemp("token")
    (place / "tokens").mkdir()
    (place / "softhsm2.conf").write_text(f"directories.tokendir = {place}/tokens\nlog.level = ERROR\n")
    environment = {**os.environ, "SOFTHSM2_CONF": str(place / "softhsm2.conf")}
    write_private_key(place / "1.pem", generate_key())
    other = ec.generate_private_key(ec.SECP384R1())
    (place / "2.pem").write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pins = ["--pin", SECRET]
    commands = [["--init-token", "--free", "--label", "cbd", "--so-pin", "314159", *pins]]
    commands += [["--import", str(place / f"{n}.pem"), "--token", "cbd", "--label", f"k{n}", "--id", f"0{n}", *pins] for n in (1, 2)]
    for command in commands:
        subprocess.run(["softhsm2-util", *command], env=environment, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(place / "softhsm2.conf"))
        yield f"pkcs11:token=cbd;id=%01?module-path={LIBRARY}"


@pytest.fixture
def signing(token: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, in place to sign."""
    monkeypatch.setenv(ENVIRONMENT, token)
    monkeypatch.setenv(PIN, SECRET)
    return token


def test_the_token_signs_and_gives_nothing_else(signing: str) -> None:
    key = open_token_key(signing)
    assert verify(b"data", sign(b"data", key), key.public_key()) and not verify(b"other", sign(b"data", key), key.public_key())
    with pytest.raises(NotImplementedError, match="stays in its token"):
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(NotImplementedError, match="stays in its token"):
        key.exchange(ec.ECDH(), key.public_key())


def test_a_run_is_signed_exported_and_verified_by_a_key_in_a_token_and_its_pin_is_nowhere(
    signing: str, tmp_path: Path, make_evaluation: Make
) -> None:
    """Log, heads, attestations, decision, model signature, manifest."""
    workspace = tmp_path / "workspace"
    case = run_case(workspace, make_evaluation)
    assert (
        isinstance(ensure_key(workspace), TokenKey) and not is_development(workspace) and not (workspace / "keys" / "signing.pem").exists()
    )
    told = export_run(workspace / "runs" / case.run_id, workspace, tmp_path / "export")
    assert verify_export(tmp_path / "export", [load_public_key(workspace)]) == told and told["development_key"] is False
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_the_pin_may_lie_in_a_file(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pin").write_text(f"{SECRET}\n")
    monkeypatch.delenv(PIN, raising=False)
    key = open_token_key(f"{token}&pin-source=file:{tmp_path}/pin")
    assert verify(b"data", sign(b"data", key), key.public_key())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("token=cbd", "token=other"), "No PKCS#11 token found for label other"),
        (("id=%01", "id=%07"), "could not find ECDSA"),
        (("id=%01", "id=%02"), "expected a P-256 key"),
        (("id=%01", "id="), "expected an id that is a number above 0"),
        (("token=cbd;", ""), "expected pkcs11:token=LABEL;id=%01"),
        (("id=%01", "id=%01;object=k1"), "expected pkcs11:token=LABEL;id=%01"),
        (("libsofthsm2.so", "absent.so"), "no library '/usr/.*absent.so'"),
    ],
)
def test_a_reference_that_leads_to_no_key_is_told_in_one_line(signing: str, change: tuple[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        open_token_key(signing.replace(*change))
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)


def test_a_wrong_or_missing_pin_is_told_and_never_shown(signing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIN, "161803")
    with pytest.raises(ConfigError, match="the token refuses: PinIncorrect") as caught:
        append(tmp_path, "event", {})
    assert "161803" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.delenv(PIN)
    with pytest.raises(ConfigError, match="no PIN; set CBD_SIGNING_PIN, or name a file"):
        append(tmp_path, "event", {})
    assert not read_log(tmp_path)


def test_a_pin_in_the_reference_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError, match="ends up in logs") as caught:
        open_token_key(f"{token}&pin-value={SECRET}")
    assert SECRET not in str(caught.value)


def test_a_development_key_hands_over_to_one_in_a_token(token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    monkeypatch.setenv(PIN, SECRET)
    told = rotate_key(tmp_path, to=token, reason="out of development", by="me")
    assert told["following"] == f"export {ENVIRONMENT}='{token}'" and told["key_id"] == key_id(open_token_key(token).public_key())
    monkeypatch.setenv(ENVIRONMENT, token)
    append(tmp_path, "event", {})
    assert [row["state"] for row in list_keys(tmp_path)] == ["revoked", "signs"] and len(read_log(tmp_path)) == 3


def test_without_the_extra_the_fix_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"python-pkcs11, which is not installed; install the extra `hsm`"):
        open_token_key("pkcs11:token=none;id=%01")


def test_the_command_line_rotates_to_a_token(
    signing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ENVIRONMENT)
    append(tmp_path, "event", {})
    code, out, err = cbd(capsys, "keys", "rotate", "--to", signing, "--reason", "x", "--workspace", str(tmp_path))
    assert code == 0 and SECRET not in out + err, err
