"""The signature of a model together with its decision, in the format of OpenSSF model-signing (`model.sig`, a Sigstore bundle).

Whoever has the public key can check it with the stock `model_signing verify key`.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from cbd.bundle import CARD, WEIGHTS
from cbd.decision import DECISION, SIGNATURE
from cbd.errors import DataError
from cbd.keys import PrivateKey, PublicKey, key_id, to_pem

MODEL_SIGNATURE = "model.sig"
SIGNED_FILES = (WEIGHTS, CARD, DECISION, SIGNATURE)
"""What it is over."""


def sign_model(bundle: Path, decision: Path, out: Path, key: PrivateKey) -> None:
    """Writes the signature over the bundle's two files and the decision's two to the file `out`."""
    from model_signing import hashing
    from model_signing._signing import sign_ec_key
    from model_signing._signing.signing import Payload

    class Signer(sign_ec_key.Signer):
        """Takes the key itself; the library's own takes the path of a file."""

        def __init__(self) -> None:
            self._private_key = key

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        staged = Path(folder) / "model"  # the name stands in the signature, and is not checked
        staged.mkdir()
        for name in SIGNED_FILES:
            _link(bundle / name if name in (WEIGHTS, CARD) else decision / name, staged / name)
        Signer().sign(Payload(hashing.Config().hash(staged))).write(out)


def verify_model(folder: Path, key: PublicKey) -> None:
    """Checks that `model.sig` in the folder is the key's over exactly the other four files there.

    Raises:
        DataError: a file is missing, a link, too many or altered, or the signature is malformed or another key's.
    """
    from model_signing import verifying

    found = {path.name: path for path in folder.iterdir()}
    for name in sorted({*SIGNED_FILES, MODEL_SIGNATURE} ^ set(found)):
        what = "not part of a signed model" if name in found else "missing"
        raise DataError(f"{folder / name}: {what}; expected {', '.join(SIGNED_FILES)} and {MODEL_SIGNATURE}")
    for name, path in sorted(found.items()):
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{path}: expected a plain file, found a link or something else; restore {name}")
    config: Any = verifying.Config()
    with tempfile.TemporaryDirectory() as private:
        pem = Path(private) / "key.pub"
        pem.write_text(to_pem(key))
        try:
            config.use_elliptic_key_verifier(public_key=pem)
            config.set_hashing_config(_hashing()).verify(folder, folder / MODEL_SIGNATURE)
        except Exception as error:  # the library raises what its parsers do, on bytes that may be anybody's
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(
                f"{folder / MODEL_SIGNATURE}: not the signature of key {key_id(key)[:12]} over this model: {reason}; restore the model"
            ) from None


def _hashing() -> Any:
    """All files but the signature, whatever the signature itself says should be left out."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[MODEL_SIGNATURE], ignore_git_paths=False)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
