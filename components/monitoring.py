"""The last runs of a workspace as Prometheus metrics, read from what the runs left behind, anew at every scrape.

`python -m components.monitoring --workspace FOLDER` serves them at `/metrics`; alerts: `k8s/overlays/production/monitoring.yaml`.
"""

import functools
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cbd.errors import CbdError, ConfigError
from components.summary import VERDICTS, read_object

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

OUTCOMES = (*VERDICTS, "NOTHING_NEW", "FAILED")
"""What a run can come to; FAILED: it stopped before a verdict, or what ran contradicts it."""
LASTING = tuple(outcome for outcome in OUTCOMES if outcome != "NOTHING_NEW")
"""Those that hold until another of them: that nothing new was delivered mends no BLOCK."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    time: float
    """When its last step ended, in seconds since 1970."""
    outcome: str
    """One of OUTCOMES."""
    clean_accuracy: float | None
    attack_success_rate: dict[str, float]
    """By trigger; fractions, as all rates."""


def ended_runs(workspace: Path) -> list[Ended]:
    """The runs that have written a result, oldest first.

    A run that is killed together with its report writes none, and is only seen by the time that passes without another.

    Raises:
        ConfigError: there is no such folder.
    """
    if not workspace.is_dir():
        raise ConfigError(f"{workspace}: no such folder; give the workspace that the runs share with --workspace")
    found = (_read_run(path, path.stat().st_mtime_ns) for path in (workspace / "runs").glob("*/result.json"))
    return sorted((run for run in found if run), key=lambda run: run.time)


class LastRuns:
    """A collector of Prometheus over a workspace."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace

    def collect(self) -> "Iterator[GaugeMetricFamily]":
        """The metrics; where nothing was measured there is no sample, never a zero."""
        from prometheus_client.core import GaugeMetricFamily

        runs = ended_runs(self._workspace)
        ended = GaugeMetricFamily("cbd_run_ended_timestamp_seconds", "When the newest run of this outcome ended.", labels=["outcome"])
        for outcome, time in {run.outcome: run.time for run in runs}.items():
            ended.add_metric([outcome], time)
        last = GaugeMetricFamily(
            "cbd_last_run_outcome", "1 for the outcome of the newest run that found something new, 0 for all others.", labels=["outcome"]
        )
        accuracy = GaugeMetricFamily("cbd_last_run_clean_accuracy", "Fraction of the trusted images that its model gets right.")
        attacks = GaugeMetricFamily("cbd_last_run_attack_success_rate", "Fraction that a trigger turns to its target.", labels=["trigger"])
        for run in [run for run in runs if run.outcome in LASTING][-1:]:
            for outcome in LASTING:
                last.add_metric([outcome], float(outcome == run.outcome))
            if run.clean_accuracy is not None:
                accuracy.add_metric([], run.clean_accuracy)
            for trigger, rate in run.attack_success_rate.items():
                attacks.add_metric([trigger], rate)
        yield from (ended, last, accuracy, attacks)


@functools.lru_cache(maxsize=4096)
def _read_run(path: Path, mtime_ns: int) -> Ended | None:
    """None where no step says when it ended."""
    records = [read_object(record) for record in path.parent.glob("records/*.json")]
    times = [
        start + took for start, took in ((_number(each.get("started")), _number(each.get("seconds"))) for each in records) if start and took
    ]
    result = read_object(path)
    attacks = result.get("attack_success_rate")
    rates = {name: _rate(value) for name, value in attacks.items()} if isinstance(attacks, dict) else {}
    measured = {name: rate for name, rate in rates.items() if rate is not None}
    return Ended(max(times), _outcome(result), _rate(result.get("clean_accuracy")), measured) if times else None


def _outcome(result: dict[str, Any]) -> str:
    if result.get("alarms") or result.get("stopped"):
        return "FAILED"
    if result.get("verdict") in VERDICTS:
        return str(result["verdict"])
    return "NOTHING_NEW" if result.get("nothing_new") else "FAILED"


def _rate(value: Any) -> float | None:
    return _number(value.get("rate")) if isinstance(value, dict) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@click.command()
@click.option("--workspace", type=click.Path(path_type=Path), required=True, help="Folder that the runs share.")
@click.option("--port", type=click.IntRange(0, 65535), default=9464, show_default=True, help="0: any free one.")
def main(workspace: Path, port: int) -> None:
    """Serve the metrics of the last runs until the process is told to end."""
    from prometheus_client import CollectorRegistry, start_http_server

    try:
        ended_runs(workspace)
    except CbdError as error:
        raise click.UsageError(str(error)) from None
    registry = CollectorRegistry()
    registry.register(LastRuns(workspace))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # the first process of a container has no default for it
    server, thread = start_http_server(port, registry=registry)
    print(f"[monitoring] serving /metrics of {workspace} on port {server.server_port}", flush=True)
    thread.join()


if __name__ == "__main__":
    main()
