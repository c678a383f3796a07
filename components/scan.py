"""Beside the evaluation: triggers that nobody knows are looked for, on the candidate and on the confounder."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl

from cbd.anomaly import enough_controls
from cbd.bundle import bundle_digest, read_card
from cbd.config import Gate
from cbd.dataset import load_samples, read_info
from cbd.errors import DataError
from cbd.files import replacing, write_json
from cbd.scan_record import read_scan, smallest
from components.records import kfp_component, progress

SCAN = "scan.json"
TRIGGERS = "triggers.png"
LEAST_NORM = 0.01
"""In pixels; a smaller norm counts as this."""
COLUMNS, GAP = 16, 2
"""Most triggers per row of the picture, and grey pixels between them."""


class _Trusted(NamedTuple):
    """The trusted set in two parts: the inversion sees one, triggers are stamped on the other."""

    cal_images: Any
    """uint8 [N, 3, S, S]"""
    cal_labels: Any
    test_images: Any
    test_labels: Any

    def cal(self) -> tuple[Any, Any]:
        """Images and labels of the first part as tensors on the best device."""
        import torch

        from cbd.training import best_device

        return torch.from_numpy(self.cal_images).to(best_device()), torch.from_numpy(self.cal_labels).to(best_device())


def scan(
    model: Path, confounder: Path | None, trusted_set: Path, out: Path, *, policy: Gate, seed: int, controls: Sequence[Path] = ()
) -> dict[str, Any]:
    """What stands out on each model, in brief; all of it goes to `out/scan.json`, pictures of the triggers to `out/triggers.png`.

    Args:
        model: bundle of the candidate.
        confounder: bundle of the confounder; None if there is none.
        trusted_set: data set that does not come from the supplier, with the model's classes.
        out: gets both files.
        policy: tells which p-value counts.
        seed: of the inversion and of the Monte-Carlo null.
        controls: bundles of harmless models of the same classes; a `scan.json` of this trusted set and seed that lies in one is used.

    Raises:
        DataError: a bundle or data set is missing or altered, or their classes differ.
    """
    started = time.monotonic()
    info, card = read_info(trusted_set), read_card(model)
    for bundle in (model, *([confounder] if confounder else []), *controls):
        if (other := read_card(bundle)).class_names != info.class_names or other.image_size != card.image_size:
            raise DataError(
                f"{bundle}: {other.image_size} pixels, classes {list(other.class_names)}; expected {card.image_size} and the trusted set's "
                f"{list(info.class_names)}; give models and a trusted set that belong together"
            )
    trusted = _halves(trusted_set, card.image_size, seed=seed)
    ranked = controls if enough_controls(len(controls), policy.scan_alpha) else ()
    null = [_control_statistic(control, trusted, trusted_set, seed=seed) for control in ranked]
    sources = {"candidate": model, **({"confounder": confounder} if confounder else {})}
    found: dict[str, Any] = {
        "schema_version": 1,
        "model_digest": bundle_digest(model),
        "confounder_digest": bundle_digest(confounder) if confounder else None,
        "trusted_digest": info.digest,
        "seed": seed,
        "num_classes": len(info.class_names),
        "num_cal": len(trusted.cal_labels),
        "num_test": len(trusted.test_labels),
        "num_controls": len(controls),
        "scan_alpha": policy.scan_alpha,
        "confounder": None,
        "transfer": [],
    }
    triggers = {}
    for number, (source, bundle) in enumerate(sources.items()):
        progress("scan", number, len(sources), source)
        network = _network(bundle)
        triggers[source] = _invert(network, trusted, seed=seed)
        found[source] = _entry(triggers[source], null, alpha=policy.scan_alpha, seed=seed)
        if source == "candidate" or found[source]["flagged"] is not None:
            about = {"target": smallest(found[source]["log_norms"]), "judges": (model, *controls), "seed": seed}
            found["transfer"].append({"source": source} | _transfer(network, triggers[source], trusted, **about))
    found["seconds"] = round(time.monotonic() - started, 3)
    read_scan(found)
    with replacing(out) as temporary:
        temporary.mkdir()
        write_json(temporary / SCAN, found)
        _draw(list(triggers.values()), temporary / TRIGGERS)
    progress("scan", len(sources), len(sources))
    brief = {source: {name: found[source][name] for name in ("statistic", "p_value", "method", "flagged")} for source in sources}
    return brief | {"transfer": found["transfer"]}


def _halves(trusted_set: Path, image_size: int, *, seed: int) -> _Trusted:
    """The trusted set split in two (see `held_out`); the images to stamp are in random order."""
    import numpy as np

    from cbd.scan import TEST_IMAGES
    from components.controls import held_out

    samples, test = load_samples(trusted_set, image_size=image_size), held_out(trusted_set)
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(test))[:TEST_IMAGES]
    return _Trusted(samples.images[~test], samples.labels[~test], samples.images[drawn], samples.labels[drawn])


def _network(bundle: Path) -> Any:
    from cbd.models import load_model
    from cbd.training import best_device

    return load_model(bundle)[0].to(best_device())


def _invert(network: Any, trusted: _Trusted, *, seed: int) -> Any:
    import torch

    from cbd.scan import invert

    return invert(network, *trusted.cal(), generator=torch.Generator().manual_seed(seed))


def _log_norms(triggers: Any) -> list[float]:
    """Per class; a model that calls everything one class needs no trigger for it, whose norm of 0 has no logarithm."""
    logs: list[float] = triggers.norms.double().clamp_min(LEAST_NORM).log().tolist()
    return logs


def _entry(triggers: Any, null: list[float], *, alpha: float, seed: int) -> dict[str, Any]:
    """What `scan.json` says of one model."""
    from cbd.anomaly import p_value

    log_norms = _log_norms(triggers)
    statistic, p, method = p_value(log_norms, null, alpha=alpha, seed=seed)
    return {
        "log_norms": log_norms,
        "success": triggers.success.double().clamp(0, 1).tolist(),
        "unreached": (triggers.success == 0).nonzero().flatten().tolist(),
        "statistic": statistic,
        "p_value": p,
        "method": method,
        "flagged": smallest(log_norms) if p is not None and p <= alpha else None,
    }


def _control_statistic(control: Path, trusted: _Trusted, trusted_set: Path, *, seed: int) -> float:
    """The statistic of a harmless model: from the scan in its folder, or anew where that is of other weights, images or seed.

    Triggers are inverted on the half that it was not trained on, if it was trained on one.
    """
    import numpy as np

    from cbd.anomaly import anomaly_indices
    from components.controls import held_out, unseen
    from components.summary import read_object

    if not unseen(control, trusted_set)[~held_out(trusted_set)].all():
        trusted = trusted._replace(cal_images=trusted.test_images, cal_labels=trusted.test_labels)
    elif (control / SCAN).is_file():
        known = read_scan(read_object(control / SCAN))
        about = (bundle_digest(control), read_info(trusted_set).digest, seed)
        if (known.model_digest, known.trusted_digest, known.seed) == about:
            return float(anomaly_indices(np.array(known.candidate.log_norms)).max())
    return float(anomaly_indices(np.array(_log_norms(_invert(_network(control), trusted, seed=seed)))).max())


def _transfer(network: Any, triggers: Any, trusted: _Trusted, *, target: int, judges: Sequence[Path], seed: int) -> dict[str, Any]:
    """The trigger of `target` on held-out images, on the first of `judges`, with its null: see `cbd.scan.squeeze`."""
    import torch

    from cbd.scan import squeeze, strongest, transfers

    generator, (candidate, *controls) = torch.Generator().manual_seed(seed), [_network(judge) for judge in judges]
    squeezed = squeeze(network, *trusted.cal(), triggers=triggers, budget=float(triggers.norms[target]), generator=generator)
    stamped_on = (trusted.test_images, trusted.test_labels)
    others = [label for label in range(len(triggers.masks)) if label != target]
    targets = [target, *strongest(candidate, *stamped_on, triggers=squeezed, targets=others)]
    (k, n), *compared = transfers(candidate, *stamped_on, triggers=squeezed, targets=targets)
    compared += [transfers(control, *stamped_on, triggers=squeezed, targets=[target])[0] for control in controls]
    return {"target": target, "k": k, "n": n, "null": max((k / n for k, n in compared if n), default=0.0)}


def _draw(found: list[Any], path: Path) -> None:
    """One block per model, one picture of mask times pattern per class, in their order."""
    import numpy as np
    from PIL import Image

    blocks = []
    columns = min(COLUMNS, len(found[0].masks))
    for triggers in found:
        shown = (255 * triggers.masks * triggers.patterns).round().byte().cpu().numpy()
        shown = np.pad(shown, ((0, -len(shown) % columns), (0, 0), (GAP, GAP), (GAP, GAP)), constant_values=64)
        count, _, height, width = shown.shape
        rows = shown.reshape(count // columns, columns, 3, height, width).transpose(0, 3, 1, 4, 2)
        blocks.append(rows.reshape(-1, columns * width, 3))
    Image.fromarray(np.concatenate(blocks)).save(path)


@kfp_component
def scan_step(
    records: str,
    workspace: str,
    seed: int,
    gate: dict,
    trusted_set: dsl.Input[dsl.Dataset],
    confounder: dsl.Input[dsl.Model],
    model: dsl.Input[dsl.Model],
    scanned: dsl.Output[dsl.Artifact],
):
    """Looks for unknown triggers.

    Args:
        records: prefix of the step records.
        workspace: folder in whose registry clean controls are looked up.
        seed: seed of the inversion.
        gate: section `gate` of params.yaml.
        trusted_set: the trusted set.
        confounder: what stage 1 left behind.
        model: the candidate.
        scanned: what was found, and pictures of the triggers.
    """
    from pathlib import Path

    from components.attestation import attest_scan
    from components.records import step
    from components.scan import SCAN, scan_run

    with step(records, "scan") as outputs:
        outputs["paths"] = {"scanned": scanned.path}
        paths = {"model": Path(model.path), "confounder": Path(confounder.path), "trusted_set": Path(trusted_set.path)}
        outputs |= scan_run(paths, Path(scanned.path), policy=gate, seed=seed, workspace=workspace)
        about = {"model": paths["model"], "trusted_set": paths["trusted_set"], "policy": gate, "workspace": workspace}
        outputs["attestation"] = attest_scan(records, Path(scanned.path) / SCAN, **about)


def scan_run(paths: dict[str, Path], out: Path, *, policy: dict[str, Any], seed: int, workspace: str) -> dict[str, Any]:
    """`scan` with the artifacts of a pipeline run and the clean controls of its workspace."""
    from cbd.config import check_section
    from components.controls import find_controls

    checked = check_section(Gate, policy, name="gate")
    with tempfile.TemporaryDirectory() as folder:
        about = {name: paths[name] for name in ("model", "trusted_set")}
        controls = find_controls(Path(workspace), Path(folder), **about, min_images=checked.min_images).bundles
        return scan(paths["model"], paths["confounder"], paths["trusted_set"], out, policy=checked, seed=seed, controls=controls)
