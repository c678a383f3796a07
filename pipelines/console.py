"""What a command prints when it is done: a few plain lines, or one JSON object."""

import json
from typing import Any

from pipelines.progress import printable


def tell_result(result: dict[str, Any], as_json: bool, *, following: str | None = None) -> int:
    """Prints the result of a run; returns the exit code that its verdict stands for."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        for line in _lines(result):
            print(printable(line))
        print(f"next: {following or _following(result)}")
    from pipelines.outcome import EXIT_CODES

    return EXIT_CODES[result["verdict"] or "NOTHING_NEW"]


def tell_outputs(outputs: dict[str, Any], as_json: bool, following: str, *, table: str | None = None) -> int:
    """Prints what a single step came to, or the rows of `outputs[table]`; returns 0."""
    if as_json:
        print(json.dumps(outputs, allow_nan=False))
        return 0
    if table:
        rows = outputs[table]
        print("  ".join(rows[0]) if rows else f"no {table}")
        for row in rows:
            print(printable("  ".join(_short(value) for value in row.values())))
    else:
        for name, value in outputs.items():
            print(printable(f"{name}: {_short(value)}"))
    print(f"next: {following}")
    return 0


def tell_rejudged(outputs: dict[str, Any], as_json: bool) -> int:
    """Prints what another policy makes of a run, and which checks it changes; returns the exit code of the new verdict."""
    if as_json:
        print(json.dumps(outputs, allow_nan=False))
    else:
        for line in _changes(outputs):
            print(printable(line))
        print(f"next: cbd report {outputs['run_dir']}")
    from pipelines.outcome import EXIT_CODES

    return EXIT_CODES[outputs["verdict"]]


def _changes(outputs: dict[str, Any]) -> list[str]:
    lines = [f"was {outputs['verdict_then']}, is {outputs['verdict']} under policy {_short(outputs['policy_sha256'])}; no alias moves"]
    lines += [f"policy {name}: {change['then']} -> {change['now']}" for name, change in outputs["changed_policy"].items()]
    for check in outputs["changed_checks"]:
        lines.append(f"check {check['check']} {check['name']}: {check['then']} -> {check['now']}: {check['sentence']}")
    return [*lines, str(outputs["sentence"]), f"decision: {outputs['decision']}"]


def _lines(result: dict[str, Any]) -> list[str]:
    data, model = result["data"], result["model"]
    lines = [str(result["sentence"] or result["verdict"])]
    if result["clean_accuracy"]:
        lines.append(f"clean accuracy: {_rate(result['clean_accuracy'])}")
    lines += [f"attack success, {attack}: {_rate(measured)}" for attack, measured in (result["attack_success_rate"] or {}).items()]
    if result["canary"] and result["canary"] not in lines[0]:
        lines.append(f"canary: {result['canary']}")
    if result["baseline"]:
        lines.append(f"without defence: {', '.join(f'{name.upper()} {_percent(value)}' for name, value in result['baseline'].items())}")
    counts = ", ".join(f"{data[key]} {key}" for key in ("delivered", "accepted", "duplicates", "quarantined"))
    lines.append(f"data: {counts}; digest {_short(data['digest'])}")
    if model["version"]:
        alias = f", alias {model['alias']}" if model["alias"] else ", no alias"
        lines.append(f"model: {model['name']} version {model['version']}{alias}; digest {_short(model['digest'])}")
    return [*lines, f"took: {sum(result['seconds'].values()):.0f} s", f"report: {result['report']}"]


def _following(result: dict[str, Any]) -> str:
    model, workspace = result["model"], result["workspace"]
    if result["nothing_new"]:
        return "deliver something new, or train on the same images with cbd run ... --again"
    if model["alias"]:
        return f"cbd predict models:/{model['name']}@{model['alias']} --workspace {workspace} --data IMAGES --out predictions.parquet"
    return f"cbd suspects {result['run_dir']}"


def _rate(measured: dict[str, Any]) -> str:
    if measured["rate"] is None:
        return "not measured (no images)"
    bounds = f"{_percent(measured['low'])} to {_percent(measured['high'])}"
    return f"{_percent(measured['rate'])} ({measured['k']} of {measured['n']}; {bounds})"


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
    is_digest = len(text) == 64 and all(char in "0123456789abcdef" for char in text)
    return text[:12] if is_digest else text
