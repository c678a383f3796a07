"""A key that stays in a PKCS#11 token (a security module, a smart card), used like one from a file: the token signs.

It is named by a URI of RFC 7512: `pkcs11:token=LABEL;id=%01?module-path=/usr/lib/softhsm/libsofthsm2.so`. What talks to the token is
securesystemslib's HSMSigner, with python-pkcs11 from the extra `hsm`.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote, unquote_to_bytes

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cbd.errors import ConfigError

SCHEME = "pkcs11:"
PIN = "CBD_SIGNING_PIN"
"""The token's PIN, unless the URI names a file that holds it: `pin-source=file:/run/secrets/pin`."""
_LIBRARY = "PYKCS11LIB"
"""Where securesystemslib looks for the path of the token's library."""
_KNOWN = {"token", "id", "module-path", "pin-source"}


class TokenKey(ec.EllipticCurvePrivateKey):
    """A P-256 key of which only the public half is here."""

    def __init__(self, token: "_Token") -> None:
        from securesystemslib.signer import HSMSigner

        with token.asked():
            _, public = HSMSigner.import_(token.key_number, token.label, token.pin)
        found = load_pem_public_key(public.keyval["public"].encode())
        if not isinstance(found, ec.EllipticCurvePublicKey) or not isinstance(found.curve, ec.SECP256R1):
            raise ConfigError(f"{token.uri}: expected a P-256 key, found another kind; name another one")
        self._token, self._public, self._signer = token, found, HSMSigner(token.key_number, public, token.pin, token.label)

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """The token's ECDSA signature with SHA-256 over the data (DER)."""
        if not isinstance(signature_algorithm, ec.ECDSA) or not isinstance(signature_algorithm.algorithm, hashes.SHA256):
            self._refuse()
        with self._token.asked():
            return bytes.fromhex(self._signer.sign(bytes(data)).signature)

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> bytes:
        self._refuse()

    def private_numbers(self) -> ec.EllipticCurvePrivateNumbers:
        self._refuse()

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> bytes:
        self._refuse()

    def __copy__(self) -> "TokenKey":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenKey":
        return self

    def _refuse(self) -> NoReturn:
        raise NotImplementedError("the key stays in its token, which signs with ECDSA and SHA-256 and does nothing else")


@functools.cache
def open_token_key(uri: str) -> TokenKey:
    """The key that the URI names; the PIN is asked of the environment or the file at each signature, and kept nowhere.

    Raises:
        ConfigError: no such URI, the extra is not installed, there is no such token or key, it is not P-256, or the PIN is wrong.
    """
    if importlib.util.find_spec("pkcs11") is None:
        raise ConfigError(f"{uri}: keys in tokens need python-pkcs11, which is not installed; install the extra `hsm`")
    values = _parse(uri)
    if not Path(library := values.get("module-path", os.environ.get(_LIBRARY, ""))).is_file():
        raise ConfigError(f"{uri}: no library {library!r}; expected module-path=, the path of the token's PKCS#11 library")
    return TokenKey(_Token(uri, library, values["token"], int(values["id"]), values.get("pin-source")))


@dataclass(frozen=True, slots=True)
class _Token:
    """Where a key lies."""

    uri: str
    library: str
    label: str
    key_number: int
    pin_source: str | None

    def pin(self, _: str) -> str:
        """The PIN, whatever it is asked for."""
        if self.pin_source is None and (pin := os.environ.get(PIN)):
            return pin
        file = Path((self.pin_source or "").removeprefix("file:"))
        if not file.is_file():
            raise ConfigError(f"{self.uri}: no PIN; set {PIN}, or name a file with pin-source=file:/PATH")
        return file.read_text().strip()

    @contextlib.contextmanager
    def asked(self) -> Iterator[None]:
        """Inside, securesystemslib finds the library, and what the token raises is told in one line."""
        from pkcs11.exceptions import PKCS11Error

        os.environ[_LIBRARY] = self.library
        try:
            yield
        except (ValueError, PKCS11Error) as error:
            what = f"{type(error).__name__} {error}".strip()
            raise ConfigError(f"{self.uri}: the token refuses: {what}; check token, id and PIN ({PIN}, or pin-source=file:)") from None


def _parse(uri: str) -> dict[str, str]:
    """Token label, key id as a number, module path and PIN source of a URI."""
    path, _, query = uri.removeprefix(SCHEME).partition("?")
    found = dict(part.partition("=")[::2] for part in [*path.split(";"), *query.split("&")] if part)
    if "pin-value" in found:
        uri = uri[: uri.index("pin-value")] + "pin-value=..."
        raise ConfigError(f"{uri}: a PIN in a reference ends up in logs; set {PIN}, or name a file with pin-source=file:/PATH")
    if set(found) - _KNOWN or not {"token", "id"} <= set(found):
        form = "pkcs11:token=LABEL;id=%01?module-path=PATH&pin-source=file:PATH"
        raise ConfigError(f"{uri}: expected {form}, found {', '.join(sorted(found)) or 'nothing'}")
    number = unquote_to_bytes(found["id"])
    if not number or number[0] == 0:
        raise ConfigError(f"{uri}: expected an id that is a number above 0, such as id=%01")
    return {name: unquote(value) for name, value in found.items()} | {"id": str(int.from_bytes(number))}
