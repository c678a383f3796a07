"""What `cbd audit export` does, and the check of what it wrote, which needs neither the pipeline's packages nor a workspace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbd.errors import ConfigError
from cbd.exported import MANIFEST, verify_export
from cbd.keys import PublicKey, read_trusted_keys


def is_export(place: Path) -> bool:
    """Whether a folder claims to be an exported run."""
    return (place / MANIFEST).is_file()


def verify(place: Path, trust: Sequence[Path]) -> dict[str, Any]:
    """What an exported run proves.

    Args:
        place: the folder.
        trust: public keys, or folders of them, that do not lie in `place`.

    Raises:
        ConfigError: no key is named, or one that came with the export.
        DataError: names the first thing that is wrong.
    """
    if not trust:
        raise ConfigError(f"{place}: an export is worth what its key is; name the public key that you trust with --trust KEY")
    for path in trust:
        if path.resolve().is_relative_to(place.resolve()):
            raise ConfigError(f"--trust {path}: lies in the export itself, which proves nothing; take the key from its owner")
    keys: list[PublicKey] = [key for path in trust for key in read_trusted_keys(path)]
    return {"verified": True, **verify_export(place, keys)}


def export(run: str, workspace: Path, out: Path) -> dict[str, Any]:
    """What the export of a run in the folder `out` proves."""
    from components.export import export_run
    from pipelines.outcome import find_run

    run_dir = find_run(run, workspace)
    return export_run(run_dir, run_dir.parent.parent, out)
