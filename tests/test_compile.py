"""The compiled pipeline: the golden file, its image, and settings that a local run would never miss."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd.errors import ConfigError
from components import STEPS
from components.records import IMAGE
from pipelines.compile import GOLDEN, compile_pipeline, compiled_text

PINNED = "registry.example/cbd@sha256:" + "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def text() -> str:
    return compiled_text()


@pytest.fixture(scope="module")
def spec(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task that runs a step, by name."""
    dags = [spec["root"]["dag"], *(component["dag"] for component in spec["components"].values() if "dag" in component)]
    steps = {name for name, component in spec["components"].items() if "executorLabel" in component}
    return {name: task for dag in dags for name, task in dag["tasks"].items() if task["componentRef"]["name"] in steps}


def test_the_golden_file_is_what_the_pipeline_compiles_to(text: str) -> None:
    assert text == GOLDEN.read_text(), "the pipeline has changed: look at `git diff` after `cbd compile`"


def test_compiling_twice_gives_the_same_bytes(text: str) -> None:
    assert compiled_text() == text


def test_every_step_is_a_task_and_none_is_cached(spec: dict[str, Any]) -> None:
    found = {name.replace("-", "_").removesuffix("_step").rstrip("_0123456789").removesuffix("_step") for name in tasks(spec)}
    assert set(STEPS) <= found
    assert [name for name, task in tasks(spec).items() if task["cachingOptions"].get("enableCache")] == []


def test_every_step_runs_in_the_one_placeholder_image_and_installs_nothing(spec: dict[str, Any]) -> None:
    executors = spec["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {IMAGE}
    assert not any("pip install" in part for executor in executors for part in executor["container"]["command"])


def test_conditions_look_only_at_unnamed_outputs_and_plain_parameters(spec: dict[str, Any]) -> None:
    dags = [spec["root"]["dag"], *(component["dag"] for component in spec["components"].values() if "dag" in component)]
    conditions = [
        task["triggerPolicy"]["condition"] for dag in dags for task in dag["tasks"].values() if "condition" in task.get("triggerPolicy", {})
    ]
    assert conditions
    for condition in conditions:
        named = [part.split("']")[0] for part in condition.split("parameter_values['")[1:]]
        assert named and all(name.endswith("-Output") or name == "pipelinechannel--baseline" for name in named)


def test_an_image_named_by_its_digest_is_filled_in_everywhere(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "retrain.yaml", image=PINNED)
    written = (tmp_path / "retrain.yaml").read_text()
    executors = yaml.safe_load(written)["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {PINNED}
    assert IMAGE not in written.replace(PINNED, "")


@pytest.mark.parametrize("image", ["cbd", "cbd:latest", "cbd@sha256:123", f"{PINNED}\nx", f"cbd; rm@sha256:{'0' * 64}", ""])
def test_an_image_that_could_be_moved_is_refused(tmp_path: Path, image: str) -> None:
    with pytest.raises(ConfigError, match="NAME@sha256:DIGEST"):
        compile_pipeline(tmp_path / "retrain.yaml", image=image)
    assert not list(tmp_path.iterdir())
