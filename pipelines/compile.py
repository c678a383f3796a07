"""The pipelines as IR YAML, for a Kubeflow Pipelines server and for the golden files; and as manifests, for GitOps."""

import contextlib
import dataclasses
import hashlib
import importlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cbd.errors import ConfigError
from cbd.files import replacing

if TYPE_CHECKING:
    from kfp.dsl.graph_component import GraphComponent

FOLDER = Path(__file__).parent / "compiled"
PIPELINES = {"retrain": "pipelines.retrain", "redteam": "pipelines.redteam_pipeline"}
"""Where each is defined."""
PINNED = re.compile(r"[a-z0-9][a-z0-9._/:-]*@sha256:[0-9a-f]{64}")
SEPARATOR = "---\n"
WHOLE = "gke"
"""The kind of cluster whose settings are kept as golden files; the others differ in selectors and tolerations alone."""


def check_image(image: str) -> str:
    """The image, which is named by its digest; raises ConfigError on a bare tag."""
    if not PINNED.fullmatch(image):
        raise ConfigError(
            f"--image {image!r}: expected NAME@sha256:DIGEST, because a tag can be moved to another image; look its digest up"
        )
    return image


def compile_pipeline(
    out: Path,
    pipeline: str = "retrain",
    *,
    image: str | None = None,
    overlay: str | None = None,
    gpus: int = 1,
    manifest: bool = False,
    namespace: str | None = None,
) -> None:
    """Writes a pipeline compiled to `out`; every step runs in `image`, or in the placeholder of the golden files.

    Args:
        out: a YAML file.
        pipeline: a name in `PIPELINES`.
        image: NAME@sha256:DIGEST.
        overlay: kind of cluster, as `overlays.find_overlay` knows it; None compiles without settings of a cluster.
        gpus: of each training step, on a kind of cluster.
        manifest: write resources `Pipeline` and `PipelineVersion` instead, for a cluster. The version's name ends in 12 hex digits
            of what it holds, so that applying it twice is applying it once, and another pipeline is another version.
        namespace: of these resources.

    Raises:
        ConfigError: the image is not named by its digest, there is no such overlay, or `out` is no YAML file.
    """
    from components.records import IMAGE

    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: expected a file name that ends in .yaml")
    if manifest and image is None:
        raise ConfigError("--manifest: a cluster runs what it says, so name the image too: --image NAME@sha256:DIGEST")
    filled = IMAGE if image is None else check_image(image)
    text = compiled_text(overlay, pipeline, gpus).replace(IMAGE, filled)
    if manifest:
        version = f"{pipeline}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        text = _written(overlay, pipeline, gpus, version=version, namespace=namespace).replace(IMAGE, filled)
    with replacing(out) as temporary:
        temporary.write_text(text)


def compiled_text(overlay: str | None = None, pipeline: str = "retrain", gpus: int = 1) -> str:
    """The IR YAML of a pipeline with the placeholder as image; with an overlay, its settings follow as a second document."""
    return _written(overlay, pipeline, gpus)


def golden(pipeline: str, overlay: str | None = None) -> Path:
    """The golden file of a pipeline, or of its settings for the overlay `WHOLE`."""
    return FOLDER / f"{'-'.join(filter(None, (pipeline, overlay)))}.yaml"


def write_golden() -> list[Path]:
    """Writes the golden files: each pipeline, and the document with its settings for the overlay `WHOLE`."""
    texts = {golden(pipeline): compiled_text(None, pipeline) for pipeline in PIPELINES}
    texts |= {golden(pipeline, WHOLE): settings_text(WHOLE, pipeline) for pipeline in PIPELINES}
    for path, text in texts.items():
        with replacing(path) as temporary:
            temporary.write_text(text)
    return list(texts)


def settings_text(overlay: str, pipeline: str = "retrain") -> str:
    """The document with an overlay's settings, as YAML."""
    return compiled_text(overlay, pipeline).partition(SEPARATOR)[2]


def _written(overlay: str | None, pipeline: str, gpus: int, *, version: str | None = None, namespace: str | None = None) -> str:
    """What KFP's compiler writes: IR YAML, or manifests if there is a name for the version."""
    from kfp import compiler
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    options = None
    if version:
        options = KubernetesManifestOptions(pipeline_version_name=version, namespace=namespace, include_pipeline_manifest=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        path = Path(folder) / "compiled.yaml"
        compiler.Compiler().compile(
            _built(overlay, pipeline, gpus), str(path), kubernetes_manifest_options=options, kubernetes_manifest_format=bool(version)
        )
        return path.read_text()


def _built(overlay: str | None, pipeline: str, gpus: int) -> "GraphComponent":
    """The pipeline, built for a kind of cluster; raises ConfigError if that is not known, or not named where it must be."""
    from kfp import dsl

    from pipelines.overlays import chosen, find_overlay

    if pipeline not in PIPELINES:
        raise ConfigError(f"{pipeline!r}: no such pipeline; expected one of {', '.join(PIPELINES)}")
    defined: GraphComponent = getattr(importlib.import_module(PIPELINES[pipeline]), pipeline)
    if overlay is None:
        if gpus != 1:
            raise ConfigError(f"--gpus {gpus}: only clusters are told; name the kind of yours, too, by --overlay")
        return defined
    with chosen(dataclasses.replace(find_overlay(overlay), gpus=gpus)):
        return dsl.pipeline(name=defined.name, description=defined.description)(defined.pipeline_func)
