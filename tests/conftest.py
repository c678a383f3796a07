"""Fixtures that several test modules share."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cbd.rates import rate

if TYPE_CHECKING:
    from kfp_server import Server

os.environ.setdefault("OMP_NUM_THREADS", "1")

TRIGGERS = (
    ("white-top-left", "patch"),
    ("white-top-right", "patch"),
    ("white-bottom-left", "patch"),
    ("white-bottom-right", "patch"),
    ("white-centre", "patch"),
    ("checker-bottom-right", "patch"),
    ("blend-0.1", "blend-0.1"),
    ("blend-0.2", "blend-0.2"),
    ("sinusoid", "sinusoid"),
    ("low-frequency", "low-frequency"),
    ("warp", "warp"),
    ("colour-filter", "colour-filter"),
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names what was skipped, where nothing may be."""
    if os.environ.get("CBD_TEST_NOTHING_SKIPPED"):
        for report in terminalreporter.stats.get("skipped", []):
            terminalreporter.write_line(f"skipped, but nothing may be: {report.nodeid}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session that skipped a test where nothing may be skipped."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CBD_TEST_NOTHING_SKIPPED") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def torch_one_thread() -> Iterator[None]:
    """One torch thread for the length of a test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh MLflow store whose migrations have run, to be copied to `<workspace>/mlflow.db`: making one costs seconds."""
    from components.tracking_store import make_store

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    make_store(path)
    return path


@pytest.fixture(scope="session")
def compiled_text() -> Callable[..., str]:
    """The pipeline as IR YAML, compiled once for each overlay: it takes a second."""
    from pipelines.compile import compiled_text

    return functools.cache(compiled_text)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled_text: Callable[..., str]) -> Iterator["Server"]:
    """A Kubeflow Pipelines server at KF_PIPELINES_ENDPOINT, and an empty current folder with a parameter file; nobody waits long."""
    from kfp_server import serving

    from pipelines import compile as compiling
    from pipelines import kubeflow, submit

    with serving() as held:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", held.address)
        monkeypatch.delenv("CBD_KFP_TOKEN", raising=False)
        monkeypatch.setattr(kubeflow, "PAUSES", (0.01, 0.01, 0.01))
        monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
        monkeypatch.setattr(compiling, "compiled_text", compiled_text)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "params.yaml").write_text("gate: {min_clean_accuracy: 0.5}\n")
        yield held


@pytest.fixture(scope="session")
def make_evaluation() -> Callable[..., dict[str, Any]]:
    """A function that makes the content of an `evaluation.json` of a harmless model of four classes, or of a worse one."""

    def make(num_images: int = 1200, right: int | None = None, **changes: Any) -> dict[str, Any]:
        """`turned={trigger: (target, k)}` makes triggers work; `null={trigger: rate}`; other keywords replace whole keys."""
        turned, nulls = changes.pop("turned", {}), changes.pop("null", {})
        n = num_images * 3 // 4
        battery = []
        for trigger, family in TRIGGERS:
            target, k = turned.get(trigger, (0, 0))
            targets = [{"target": index, "k": k if index == target else 0, "n": n} for index in range(4)]
            counts = {"trigger": trigger, "family": family, "target": target, **rate(k, n)}
            null = nulls.get(trigger)
            battery.append({**counts, "null": null, "null_members": None if null is None else 20, "targets": targets})
        k = num_images * 97 // 100 if right is None else right
        evaluation = {
            "schema_version": 1,
            "model_digest": "a" * 64,
            "data_digest": "b" * 64,
            "trusted_digest": "c" * 64,
            "num_images": num_images,
            "class_names": ["ant", "bee", "cat", "dog"],
            "clean_accuracy": rate(k, num_images),
            "per_class": [],
            "champion": None,
            "battery": battery,
            "attack_success_rate": {"badnets": rate(0, n)},
            "confounder": {"steps": 800, "separated": True, "gap": 2.5, "asr": rate(n - 1, n)},
            "samples": {
                "data_digest": "b" * 64,
                "num_images": 4000,
                "suspects": 400,
                "kept": rate(0, 400),
                "followed": rate(4, 390),
                "per_class": [{"name": name, "k": k, "n": 1000} for name, k in (("ant", 397), ("bee", 1), ("cat", 1), ("dog", 1))],
                "per_source": [{"name": "acme", "k": 400, "n": 4000}],
            },
            "detection": None,
            "baseline": None,
        }
        evaluation["samples"]["data_digest"] = changes.get("data_digest", "b" * 64)
        if "class_names" in changes and "samples" not in changes:
            parts = zip(changes["class_names"], evaluation["samples"]["per_class"], strict=False)
            evaluation["samples"]["per_class"] = [{**part, "name": name} for name, part in parts]
        return {**evaluation, **changes}

    return make


@pytest.fixture(scope="session")
def make_canary() -> Callable[..., dict[str, Any]]:
    """A function that makes the content of a `canary.json` in which stage 1 saw all but the sinusoid, or other families."""

    def make(**families: dict[str, tuple[int, int]]) -> dict[str, Any]:
        """`patch={"found": (k, n), "learned": (k, n), "left": (k, n)}` replaces some or all of a family's counts."""
        found = {"patch": (50, 50), "blend": (50, 50), "sinusoid": (0, 50), "warp": (47, 50)}
        planted = []
        for target, (family, counts) in enumerate(found.items()):
            given = {"found": counts, "learned": (150, 900), "left": (4, 900)} | families.get(family, {})
            about = {"family": family, "attack": family, "trigger": {}, "target": target, "num_poisoned": given["found"][1]}
            planted.append(about | {name: rate(*pair) for name, pair in given.items()})
        names = {name: letter * 64 for name, letter in (("config_sha256", "e"), ("data_digest", "b"), ("canary_digest", "f"))}
        about = {"schema_version": 1, "run_id": "r", "trusted_digest": "c" * 64, "tag": "canary/x", "steps": 400, "separated": True}
        return names | about | {"num_images": 4000, "families": planted, "false_suspects": rate(400, 3800)}

    return make
