"""Second step: a checked-in Great Expectations suite on the data set's manifest. Critical failures stop the run, warnings are told.

What the suite cannot compute is added to the manifest as columns, and its limits for warnings come from the section `validation`.
"""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.config import Validation
from cbd.dataset import verify_dataset
from cbd.errors import DataError
from cbd.files import replacing, sha256_file, write_json
from components.attestation import attest_validation
from components.columns import add_patches, manifest_frame
from components.pages.validation import page
from components.records import kfp_component

RESULT, PAGE = "validation.json", "validation.html"
EXAMPLES = 12
MEAN, MAX = "expect_column_mean_to_be_between", "expect_column_max_to_be_between"
SUITE = Path(__file__).parent.parent / "data" / "suites" / "delivery.json"


def validate(dataset: Path, out: Path, *, trusted_set: Path, limits: Validation) -> dict[str, Any]:
    """Whether the data set passed, with one sentence per critical failure and per warning; the whole goes to `out/validation.json`
    and, with the first images that each finding is about, to the page `out/validation.html`.

    An altered shard is a critical failure: then nothing else is looked at.

    Raises:
        DataError: the data set's own description is missing or altered.
    """
    try:
        info, trusted_info = verify_dataset(dataset), verify_dataset(trusted_set)
    except DataError as error:
        check = {"name": "shards_match_description", "column": None, "severity": "critical", "success": False}
        checks = [check | {"sentence": str(error), "examples": []}]
        digests: dict[str, Any] = {"data_digest": None, "trusted_digest": None, "num_images": None}
        patches = []
    else:
        frame = manifest_frame(dataset, info, trusted_set, trusted_info)
        patches = add_patches(frame, dataset, info, limits)
        checks = _run_suite(frame, limits)
        digests = {"data_digest": info.digest, "trusted_digest": trusted_info.digest, "num_images": info.num_images}
    failed = {kind: [c["sentence"] for c in checks if not c["success"] and c["severity"] == kind] for kind in ("critical", "warning")}
    result = {"passed": not failed["critical"], "critical": failed["critical"], "warnings": failed["warning"]}
    suite = {"name": SUITE.stem, "sha256": sha256_file(SUITE)}
    written = {"schema_version": 1, **result, "checks": checks, "patches": patches, "suite": suite, **digests}
    with replacing(out) as temporary:
        temporary.mkdir()
        write_json(temporary / RESULT, written)
        (temporary / PAGE).write_text(page(written, dataset), encoding="utf-8")
    return result | {"num_checks": len(checks), "paths": {"validation": str(out), "page": str(out / PAGE)}}


def validate_attested(records: str, dataset: Path, out: Path, *, trusted_set: Path, limits: Validation, workspace: str) -> dict[str, Any]:
    """As `validate`, and signed for."""
    told = validate(dataset, out, trusted_set=trusted_set, limits=limits)
    about = {"dataset": dataset, "trusted_set": trusted_set, "limits": limits, "suite": sha256_file(SUITE)}
    return told | {"attestation": attest_validation(records, out / RESULT, workspace=workspace, **about)}


def _run_suite(frame: Any, limits: Validation) -> list[dict[str, Any]]:
    """The outcome of every expectation of the suite on the frame, in the suite's order; its sentence tells one from the others."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
    logging.getLogger("great_expectations").setLevel(logging.WARNING)
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("data set").add_dataframe_asset("manifest")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    values = json.loads(SUITE.read_text())
    suite = gx.ExpectationSuite(name=values["name"], expectations=values["expectations"], meta=values["meta"])
    found = batch.validate(suite, expectation_parameters=limits.model_dump(), result_format="SUMMARY").results
    results = {result.expectation_config.meta["sentence"]: result for result in found}
    return [
        _check(item, result, limits) | {"examples": _examples(item, result, frame, limits)}
        for item, result in ((item, results[item["meta"]["sentence"]]) for item in values["expectations"])
    ]


def _examples(expectation: dict[str, Any], result: Any, frame: Any, limits: Validation) -> list[str]:
    """Sample ids of images that a failed expectation is about: the first that it names, or of each class some that are over its limit."""
    column, kind = expectation["kwargs"].get("column"), expectation["type"]
    if result.success or column not in frame:
        return []
    if (places := result.result.get("partial_unexpected_index_list")) is not None:
        found = frame.loc[places[:EXAMPLES]]
    elif kind in (MEAN, MAX):
        over = frame[frame[column] > (getattr(limits, expectation["kwargs"]["max_value"]["$PARAMETER"]) if kind == MAX else 0)]
        found = over.groupby("label").head(max(1, EXAMPLES // max(1, over["label"].nunique()))).head(EXAMPLES)
    else:
        return []
    return [sample for sample in found["sample_id"] if isinstance(sample, str)]


def _check(expectation: dict[str, Any], result: Any, limits: Validation) -> dict[str, Any]:
    """One expectation's outcome in plain values; never a supplier's text."""
    found, total = result.result.get("unexpected_count"), result.result.get("element_count")
    sentence = expectation["meta"]["sentence"]
    if not result.success and found is not None and total is not None:
        sentence = f"{found} of {total} images: {sentence}"
    observed = result.result.get("observed_value")
    finite = isinstance(observed, int | float) and math.isfinite(observed)
    limit = expectation["kwargs"].get("max_value")
    if isinstance(limit, dict):
        name = limit["$PARAMETER"]
        limit = getattr(limits, name)
        if not result.success:
            sentence += f" ({observed:.3g}, validation.{name} is {limit:.3g})" if finite else " (not measured)"
    return {
        "name": expectation["type"].removeprefix("expect_"),
        "column": expectation["kwargs"].get("column"),
        "severity": expectation["severity"],
        "success": bool(result.success),
        "unexpected_count": None if found is None else int(found),
        "num_images": None if total is None else int(total),
        "observed": float(observed) if finite else None,
        "limit": limit if isinstance(limit, int | float) else None,
        "sentence": sentence,
    }


@kfp_component
def validate_step(
    records: str,
    workspace: str,
    params: dict,
    dataset: dsl.Input[dsl.Dataset],
    trusted_set: dsl.Input[dsl.Dataset],
    validation: dsl.Output[dsl.Artifact],
) -> bool:
    """Validates a data set; the unnamed output says whether it passed.

    Args:
        records: prefix of the step records.
        workspace: folder of the key.
        params: section `validation` of params.yaml.
        dataset: the data set.
        trusted_set: the trusted set.
        validation: the result of every check.
    """
    from pathlib import Path

    from cbd.config import Validation, check_section
    from components.records import step
    from components.validate import validate_attested

    with step(records, "validate") as outputs:
        limits = check_section(Validation, params, name="validation")
        sets = {"trusted_set": Path(trusted_set.path), "limits": limits}
        outputs |= validate_attested(records, Path(dataset.path), Path(validation.path), workspace=workspace, **sets)
    return outputs["passed"]
