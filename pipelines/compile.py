"""The pipeline as IR YAML, for a Kubeflow Pipelines server and for the golden file."""

import contextlib
import re
import tempfile
from pathlib import Path

from cbd.errors import ConfigError
from cbd.files import replacing
from components.records import IMAGE

GOLDEN = Path(__file__).parent / "compiled" / "retrain.yaml"
PINNED = re.compile(r"[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}")


def compile_pipeline(out: Path, *, image: str | None = None) -> None:
    """Writes `retrain` compiled to `out`; every step runs in `image`, or in the placeholder of the golden file.

    Raises:
        ConfigError: the image is not named by its digest, or `out` is no YAML file.
    """
    if image is not None and not PINNED.fullmatch(image):
        raise ConfigError(
            f"--image {image!r}: expected NAME@sha256:DIGEST, because a tag can be moved to another image; look its digest up"
        )
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: expected a file name that ends in .yaml")
    text = compiled_text()
    with replacing(out) as temporary:
        temporary.write_text(text.replace(f"image: {IMAGE}\n", f"image: {image}\n") if image else text)


def compiled_text() -> str:
    """The IR YAML of `retrain`, with the placeholder as image."""
    from kfp import compiler

    from pipelines.retrain import retrain

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        compiler.Compiler().compile(retrain, str(Path(folder) / "retrain.yaml"))
        return (Path(folder) / "retrain.yaml").read_text()
