"""The exit handler: one self-contained page and one JSON object about a run, however it ended."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfp import dsl

from cbd.errors import CbdError
from cbd.files import replacing, write_json
from cbd.heads import Head
from components.anchors import TAG, told
from components.inventory import seal
from components.pages import View, delivery, measured, measures, provenance, render
from components.pages.afterwards import afterwards
from components.pages.canary import canary
from components.pages.text import clip, count, percent
from components.pages.unknown import unknown
from components.pages.validation import validation
from components.records import kfp_component, step
from components.summary import Run, read_run, summarise

SECTIONS: dict[str, Callable[[Run], View]] = {
    "checks": measures.checks,
    "rates": measures.rates,
    "battery": measures.battery,
    "unknown": unknown,
    "canary": canary,
    "curves": measures.curves,
    "losses": measures.losses,
    "weights": measures.weights,
    "patterns": delivery.patterns,
    "gallery": delivery.gallery,
    "totals": delivery.totals,
    "quarantine": delivery.quarantine,
    "classes": delivery.classes,
    "validation": validation,
    "afterwards": afterwards,
    "identities": provenance.identities,
    "packages": provenance.packages,
    "parameters": provenance.parameters,
    "timings": provenance.timings,
}


def report(records: str, out: Path, *, final_status: dict[str, Any] | None = None, workspace: str = "") -> dict[str, Any]:
    """What the run came to (the `--json` object), after writing it to `result.json` beside the page `out`.

    Works after any failure: what was not measured is None in the object and said to be missing on the page.

    Args:
        records: folder of the steps' records.
        out: where the HTML page goes, in the run's folder.
        final_status: how the pipeline ended, as Kubeflow tells the exit handler (`state`, `error_message`).
        workspace: where the key lies that must have signed the decision; empty: the signature is not looked at.

    Raises:
        EnvironmentFault: the run's folder cannot be written.
    """
    run = read_run(records, final_status=final_status, workspace=Path(workspace) if workspace else None)
    result = summarise(run, out.parent)
    write_json(out.with_name("result.json"), result)
    page = render(_view(run, result, run_id=out.parent.name))
    with replacing(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return result


def close(records: str, *, workspace: str, run_id: str, final_status: dict[str, Any] | None = None) -> None:
    """Writes the report into the run's folder, closes the tracking run, and raises if the wrong branch ran.

    Raises:
        CbdError: what ran is not what the verdict demands.
    """
    out = Path(records).parent / "report.html"
    with step(records, "report") as outputs:
        result = report(records, out, final_status=final_status, workspace=workspace)
        outputs |= {"paths": {"report": str(out)}, "verdict": result["verdict"], "consistent": result["consistent"]}
        head = _close_log(Path(workspace), result=result, page=out)
        outputs["log"] = "closed" if isinstance(head, dict) else head
        outputs["tracking"] = _close_tracking(workspace, run_id, result=result, page=out, head=head)
        if result["alarms"]:
            raise CbdError(f"the run contradicts its verdict: {result['alarms'][0]} See {out}")


def _close_log(workspace: Path, *, result: dict[str, Any], page: Path) -> Head | str:
    """The head of the log after the line that seals the run; why there is none, where the log or its anchors refuse."""
    try:
        return seal(page.parent, workspace, records=read_run(str(page.parent / "records")).records, result=result)
    except CbdError as error:
        print(f"[report] the page stands, the log could not be closed: {error}", file=sys.stderr)
        return f"not closed: {error}"


def _close_tracking(workspace: str, run_id: str, *, result: dict[str, Any], page: Path, head: Head | str) -> str:
    from components.tracking import close_run

    ended_well = (result["verdict"] is not None or result["nothing_new"]) and result["consistent"] and not result["stopped"]
    try:
        kept = {"artifacts": [page, page.with_name("result.json")], "tags": {TAG: told(head)} if isinstance(head, dict) else {}}
        close_run(workspace, run_id, status="FINISHED" if ended_well else "FAILED", **kept)
    except CbdError as error:
        print(f"[report] the page stands, the tracking run could not be closed: {error}", file=sys.stderr)
        return f"not closed: {error}"
    return "closed"


def _view(run: Run, result: dict[str, Any], *, run_id: str) -> View:
    sections = {name: measured(build, run) for name, build in SECTIONS.items()}
    ends = {"alarms": result["alarms"], "stopped": [{"step": name, "why": clip(why, 600)} for name, why in run.stopped.items()]}
    tiles = [measured(build, run) for build in (_accuracy_tile, _attack_tile, _confounder_tile, _delivery_tile)]
    return sections | ends | {"face": measures.face(run, result), "tiles": tiles, "run_id": clip(run_id, 80), "trial": run.trial}


def _accuracy_tile(run: Run) -> View:
    rate = run.evaluation.get("clean_accuracy") or {}
    note = f"at least {percent(rate['low'])}, on {count(rate['n'])} trusted images" if rate else "not measured"
    return {"name": "Clean accuracy", "value": percent(rate.get("rate")), "note": note}


def _attack_tile(run: Run) -> View:
    found = measures.worst_attack(run.evaluation)
    if found is None:
        return {"name": "Attack success", "value": percent(None), "note": "not measured"}
    name, rate = found
    return {"name": "Attack success", "value": percent(rate["rate"]), "note": f"at most {percent(rate['high'])}, {clip(name, 40)}"}


def _confounder_tile(run: Run) -> View:
    measured_confounder = run.evaluation.get("confounder") or {}
    separated, asr = (measured_confounder.get("separated", run.separation.get("separated")), measured_confounder.get("asr"))
    if separated is None:
        return {"name": "Confounder", "value": percent(None), "note": "not measured"}
    note = f"the attack succeeds on it in {percent(asr['rate'])}" if asr else "attack success on it was not measured"
    return {"name": "Confounder", "value": "separated" if separated else "not separated", "note": note}


def _delivery_tile(run: Run) -> View:
    ingest = run.outputs("ingest")
    note = f"of {count(ingest['delivered'])} delivered, {count(ingest['quarantined'])} in quarantine" if ingest else "not measured"
    return {"name": "Images accepted", "value": count(ingest.get("accepted")), "note": note}


@kfp_component
def report_step(records: str, workspace: str, run_id: str, status: dsl.PipelineTaskFinalStatus):
    """Writes the report after the run, however it ended, and fails the run if the wrong branch ran.

    Args:
        records: folder of the steps' records; the page goes beside it.
        workspace: folder of the workspace, for the tracking server.
        run_id: the run whose tracking run is closed.
        status: how the pipeline ended.
    """
    from components.report import close

    close(records, workspace=workspace, run_id=run_id, final_status=vars(status))
