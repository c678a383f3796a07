"""Keys and signatures: what is malformed, readable by others or another one is refused."""

import base64
import hashlib
import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cbd.audit import append
from cbd.errors import ConfigError, DataError
from cbd.keys import (
    ENVIRONMENT,
    ensure_key,
    from_pem,
    generate_key,
    is_development,
    key_id,
    load_public_key,
    sign,
    to_pem,
    verify,
    write_private_key,
)

RFC_6979 = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEYP7UuiVanTHJYet0xjVtaMBJuJI7
Yfps5mliLmDyn7Z5A/4QCLi8maQa6elWKLxk8vGyDC1+n1F3o8KU1EYimQ==
-----END PUBLIC KEY-----
"""
"""The P-256 key of RFC 6979, appendix A.2.5."""
X = "60fed4ba255a9d31c961eb74c6356d68c049b8923b61fa6ce669622e60f29fb6"
Y = "7903fe1008b8bc99a41ae9e95628bc64f2f1b20c2d7e9f5177a3c294d4462299"
SIGNATURE = (
    0xF1ABB023518351CD71D881567B1EA663ED3EFCF6C5132B354F28D3B0B7D38367,
    0x019F4113742A2B14BD25926B49C649155F267E60D3814B4C0CC84250E46F0083,
)
"""Its signature r, s over the text `test` with SHA-256, from the same place."""


def test_a_published_signature_holds_and_the_key_id_is_the_digest_of_the_published_key() -> None:
    key = from_pem(RFC_6979, told="the RFC's key")
    signature = base64.b64encode(encode_dss_signature(*SIGNATURE)).decode()
    assert verify(b"test", signature, key) and not verify(b"sample", signature, key)
    der = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004" + X + Y)
    assert key_id(key) == hashlib.sha256(der).hexdigest() and to_pem(key) == RFC_6979


def test_base64_that_means_the_same_and_is_not_the_same_is_refused() -> None:
    """The last character before the padding has bits that decoders ignore (RFC 4648, section 3.5)."""
    key = from_pem(RFC_6979, told="the RFC's key")
    signature = base64.b64encode(encode_dss_signature(*SIGNATURE)).decode()
    assert signature.endswith("=")
    at = len(signature.rstrip("=")) - 1
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature[:at] + alphabet[alphabet.index(signature[at]) + 1] + signature[at + 1 :]
    assert base64.b64decode(other) == base64.b64decode(signature) and not verify(b"test", other, key)


def test_the_key_is_private_and_stays_the_same(tmp_path: Path) -> None:
    key = ensure_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "keys" / "signing.pem").stat().st_mode) == 0o600
    assert isinstance(key.curve, ec.SECP256R1)
    before = (tmp_path / "keys" / "signing.pem").read_bytes()
    assert ensure_key(tmp_path).private_numbers() == key.private_numbers()
    assert (tmp_path / "keys" / "signing.pem").read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    ensure_key(tmp_path)
    (tmp_path / "keys" / "signing.pem").chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        ensure_key(tmp_path)


def test_a_key_on_a_read_only_file_system_as_a_clusters_secret_is_taken_as_it_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Secret is root's and has mode 0644: nobody else is in the container, and no one could change the mode."""
    key = ensure_key(tmp_path)
    (tmp_path / "keys" / "signing.pem").chmod(0o644)
    mounted = os.statvfs_result([*os.statvfs(tmp_path)[:8], os.ST_RDONLY, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: mounted)
    assert ensure_key(tmp_path).private_numbers() == key.private_numbers()


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    ensure_key(tmp_path)
    path = tmp_path / "keys" / "signing.pem"
    for data in (
        ed25519.Ed25519PrivateKey.generate().private_bytes(*form),
        ec.generate_private_key(ec.SECP384R1()).private_bytes(*form),
        b"not a key",
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match="expected a P-256 key|not a private key"):
            ensure_key(tmp_path)


def test_a_key_on_a_curve_that_is_not_known_is_refused_in_one_line() -> None:
    der = (
        ec.generate_private_key(ec.SECP256R1())
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    curve = bytes.fromhex("06082a8648ce3d030107")  # prime256v1, whose last arc becomes that of no curve
    body = base64.b64encode(der.replace(curve, curve[:-1] + b"\x63")).decode()
    with pytest.raises(DataError, match=r"^line 3: not a public key in PEM form"):
        from_pem(f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n", told="line 3")


def test_a_swapped_public_key_is_noticed(tmp_path: Path) -> None:
    ensure_key(tmp_path / "mine")
    ensure_key(tmp_path / "other")
    append(tmp_path / "mine", "event", {})
    (tmp_path / "mine" / "keys" / "signing.pub").write_bytes((tmp_path / "other" / "keys" / "signing.pub").read_bytes())
    for attack in (load_public_key, ensure_key, lambda workspace: append(workspace, "event", {})):
        with pytest.raises(DataError, match="does not belong"):
            attack(tmp_path / "mine")
    with pytest.raises(DataError, match="no such key"):
        load_public_key(tmp_path / "nowhere")


def test_a_signature_holds_for_its_bytes_and_key_only(tmp_path: Path) -> None:
    key, other = ensure_key(tmp_path / "a"), ensure_key(tmp_path / "b")
    signature = sign(b"PASS", key)
    assert verify(b"PASS", signature, key.public_key())
    assert not verify(b"PASs", signature, key.public_key())
    assert not verify(b"PASS", signature, other.public_key())
    for broken in ("", "AAAA", "not base64!", signature[:-4], signature + "AAAA"):
        assert not verify(b"PASS", broken, key.public_key())


def test_a_key_from_the_environment_signs_and_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = generate_key()
    write_private_key(tmp_path / "mine.pem", mine)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "mine.pem"))
    append(tmp_path / "workspace", "event", {})
    assert key_id(load_public_key(tmp_path / "workspace")) == key_id(mine.public_key()) and not is_development(tmp_path / "workspace")
    assert sorted(path.name for path in (tmp_path / "workspace" / "keys").iterdir() if path.suffix) == ["signing.pub"]
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(DataError, match=f"signing.pem: no such key; .*{ENVIRONMENT}"):
        append(tmp_path / "workspace", "event", {})
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "nowhere.pem"))
    with pytest.raises(ConfigError, match="no such file"):
        append(tmp_path / "workspace", "event", {})


@pytest.mark.parametrize("name", ["keys/signing.pem", "{0}/keys/../keys/signing.pem", "{0}/mine.pem", "link.pem"])
def test_a_key_in_the_workspace_is_a_development_key_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    key = generate_key()
    for path in (tmp_path / "keys" / "signing.pem", tmp_path / "mine.pem"):
        write_private_key(path, key)
    (tmp_path / "link.pem").symlink_to(tmp_path / "mine.pem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, name.format(tmp_path))
    assert ensure_key(tmp_path).private_numbers() == key.private_numbers()
    assert is_development(tmp_path) and is_development(Path())
    monkeypatch.setenv(ENVIRONMENT, "pkcs11:token=x")
    assert not is_development(tmp_path)


def test_a_key_that_the_environment_names_by_the_workspaces_own_name_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, f"{tmp_path}/keys/../keys/signing.pem")
    append(tmp_path, "event", {})
    assert is_development(tmp_path) and load_public_key(tmp_path)


def test_another_key_from_the_environment_does_not_sign_where_one_signed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(tmp_path, "event", {})
    before = (tmp_path / "audit.jsonl").read_bytes()
    write_private_key(tmp_path / "other.pem", generate_key())
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path / "other.pem"))
    with pytest.raises(DataError, match="cbd keys rotate"):
        append(tmp_path, "event", {})
    assert (tmp_path / "audit.jsonl").read_bytes() == before
