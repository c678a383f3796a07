"""The compiled pipeline: the golden file, its image, and settings that a local run would never miss."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cbd.config import NEEDS_GPU
from cbd.errors import ConfigError, EnvironmentFault
from cbd.training import best_device
from components import STEPS
from components.records import IMAGE
from pipelines.compile import PIPELINES, WHOLE, compile_pipeline, compiled_text, golden
from pipelines.overlays import KEY, OVERLAYS, RETRIES, SIGNING_KEY, STORE, TRACKING

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
    assert text == golden("retrain").read_text(), "the pipeline has changed: look at `git diff` after `cbd compile`"


def test_the_red_teams_golden_files_are_what_it_compiles_to() -> None:
    assert compiled_text(None, "redteam") == golden("redteam").read_text(), "it has changed: look at `git diff` after `cbd compile`"


def test_on_a_cluster_trials_run_on_gpus_four_at_once_may_be_repeated_and_get_no_key(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "redteam.yaml", "redteam", image=PINNED, overlay="gke:trials")
    compiled, settings = yaml.safe_load_all((tmp_path / "redteam.yaml").read_text())
    said = of_steps(settings)
    for name in ("trial-step", "trial-step-2", "trial-step-3"):
        assert said[name]["nodeSelector"]["labels"] == {"cloud.google.com/gke-nodepool": "trials"}
    assert "nodeSelector" not in said["take-in-step"] and "nodeSelector" not in said["table-step"]
    assert not [name for name, told in said.items() if "secretAsVolume" in told]
    assert {secret["secretName"] for told in said.values() for secret in told.get("secretAsEnv", ())} == {STORE}
    assert [name for name, task in tasks(compiled).items() if "retryPolicy" not in task or task["cachingOptions"].get("enableCache")] == []
    loops = [task for task in compiled["root"]["dag"]["tasks"].values() if "parameterIterator" in task]
    assert [task["iteratorPolicy"]["parallelismLimit"] for task in loops] == [4, 4, 4]
    assert {executor["container"]["image"] for executor in compiled["deploymentSpec"]["executors"].values()} == {PINNED}


def test_a_pipeline_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of retrain, redteam"):
        compile_pipeline(tmp_path / "x.yaml", "retest")
    assert set(PIPELINES) == {"retrain", "redteam"}


def test_compiling_twice_gives_the_same_bytes(text: str) -> None:
    assert compiled_text() == text


@pytest.fixture(scope="module")
def on_clusters() -> dict[str, str]:
    """The pipeline as each overlay compiles it."""
    return {overlay: compiled_text(overlay) for overlay in OVERLAYS}


def of_steps(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an overlay's document says of each step, by the step's name."""
    executors = settings["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): said for name, said in executors.items()}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_an_overlays_golden_file_is_the_document_that_follows_the_pipeline(pipeline: str) -> None:
    following = compiled_text(WHOLE, pipeline).partition("---\n")[2]
    assert following == golden(pipeline, WHOLE).read_text(), "the overlay has changed: look at `git diff` after `cbd compile`"


@pytest.mark.parametrize("overlay", sorted(OVERLAYS.keys() - {WHOLE}))
def test_the_other_overlays_differ_in_selectors_and_tolerations_alone(on_clusters: dict[str, str], overlay: str) -> None:
    (one, kept), (other, settings) = (list(yaml.safe_load_all(on_clusters[name])) for name in (WHOLE, overlay))
    for said in (*of_steps(kept).values(), *of_steps(settings).values()):
        said.pop("nodeSelector", None)
        said.pop("tolerations", None)
    assert (other, settings) == (one, kept)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_nothing_in_the_pipeline_but_three_variables_and_retries(
    spec: dict[str, Any], on_clusters: dict[str, str], overlay: str
) -> None:
    compiled = next(yaml.safe_load_all(on_clusters[overlay]))
    for executor in compiled["deploymentSpec"]["executors"].values():
        told = {variable["name"]: variable["value"] for variable in executor["container"].pop("env")}
        assert told.pop("CBD_SIGNING_KEY", SIGNING_KEY) == SIGNING_KEY
        assert told.pop(NEEDS_GPU, None) == ("1" if "accelerator" in executor["container"]["resources"] else None)
        assert told == {"CBD_IMAGE": IMAGE}
    for task in tasks(compiled).values():
        task.pop("retryPolicy", None)
    assert compiled == spec


def test_on_this_machine_nothing_is_retried(spec: dict[str, Any]) -> None:
    assert [name for name, task in tasks(spec).items() if "retryPolicy" in task] == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_on_a_cluster_exactly_the_training_steps_go_to_gpu_nodes_with_shared_memory(
    spec: dict[str, Any], on_clusters: dict[str, str], overlay: str
) -> None:
    settings = of_steps(list(yaml.safe_load_all(on_clusters[overlay]))[1])
    resources = {name.removeprefix("exec-"): made["container"]["resources"] for name, made in spec["deploymentSpec"]["executors"].items()}
    on_gpu = {name for name, asked in resources.items() if asked.get("accelerator", {}).get("resourceType") == "nvidia.com/gpu"}
    assert on_gpu == {f"{step.replace('_', '-')}-step" for step in STEPS if step in ("canary", "evaluate", "scan") or "train" in step}
    assert settings.keys() == resources.keys()
    for name, said in settings.items():
        assert (said.get("nodeSelector", {}).get("labels") == OVERLAYS[overlay].selector) == (name in on_gpu)
        tolerated = {taint["key"] for taint in said.get("tolerations", ())}
        assert tolerated == ({"nvidia.com/gpu", *OVERLAYS[overlay].taints} if name in on_gpu else set())
        assert [volume["mountPath"] for volume in said.get("emptyDirMounts", ())] == ["/dev/shm"] * (name in on_gpu)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_on_a_cluster_every_step_ends_in_time_is_no_root_and_gets_secrets_by_name_only(on_clusters: dict[str, str], overlay: str) -> None:
    for said in of_steps(list(yaml.safe_load_all(on_clusters[overlay]))[1]).values():
        assert 0 < int(said["activeDeadlineSeconds"]) <= 24 * 3600
        assert said["securityContext"] == {"runAsNonRoot": True}
        assert [(claim["constant"], claim["mountPath"]) for claim in said["pvcMount"]] == [("cbd-workspace", "/workspace")]
        assert {(secret["secretName"], secret["optional"]) for secret in said.get("secretAsVolume", ())} <= {("cbd-signing-key", False)}


def test_a_step_that_asked_for_a_gpu_does_not_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = next(yaml.safe_load_all(compiled_text("gke")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert best_device().type == "cpu"
    for variable in compiled["deploymentSpec"]["executors"]["exec-scan-step"]["container"]["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    with pytest.raises(EnvironmentFault, match="CBD_NEEDS_GPU is set, but no GPU is seen: .*LD_LIBRARY_PATH"):
        best_device()


def test_a_step_that_waits_for_a_train_job_waits_on_no_gpu_node() -> None:
    compiled, settings = yaml.safe_load_all(compiled_text("gke", gpus=0))
    selected = {name for name, said in of_steps(settings).items() if {"nodeSelector", "tolerations", "emptyDirMounts"} & set(said)}
    assert selected == {"evaluate-step", "scan-step"}
    executors = compiled["deploymentSpec"]["executors"]
    assert {name for name, made in executors.items() if "accelerator" in made["container"]["resources"]} == {
        "exec-evaluate-step",
        "exec-scan-step",
    }


GRANTED = {
    "validate": {KEY},
    "train_undefended": {KEY, TRACKING, STORE},
    **{step: {KEY, STORE} for step in ("ingest", "version", "canary", "scan", "decide", "refuse")},
    **{step: {KEY, TRACKING, STORE} for step in ("train_confounder", "train_deconfounded", "evaluate", "register", "report")},
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_on_a_cluster_a_step_gets_the_secrets_that_it_uses_and_no_others(on_clusters: dict[str, str], overlay: str) -> None:
    compiled, settings = yaml.safe_load_all(on_clusters[overlay])
    granted: dict[str, set[str]] = {}
    for name, said in of_steps(settings).items():
        secrets = [*said.get("secretAsVolume", ()), *said.get("secretAsEnv", ())]
        step = name.rstrip("-0123456789").removesuffix("-step").replace("-", "_")
        granted[step] = {secret["secretName"] for secret in secrets}
        env = {each["name"] for each in compiled["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["env"]}
        assert ("CBD_SIGNING_KEY" in env) == (KEY in granted[step])
    assert granted == GRANTED


def test_the_docs_tell_the_secrets_of_each_step() -> None:
    lines = (Path(__file__).parent.parent / "docs" / "submit.md").read_text().splitlines()
    start = lines.index(f"| steps | `{KEY}` | `{TRACKING}` | `{STORE}` |")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 : lines.index("", start)]]
    told = {
        step: {name for name, cell in zip((KEY, TRACKING, STORE), row[1:], strict=True) if cell}
        for row in rows
        for step in row[0].split(", ")
    }
    assert told | {"refuse": told["decide"]} == GRANTED


def test_no_parameter_could_hold_a_secret(spec: dict[str, Any]) -> None:
    known = {name for component in spec["components"].values() for name in component.get("inputDefinitions", {}).get("parameters", {})}
    known |= set(spec["root"]["inputDefinitions"]["parameters"])
    assert not [name for name in known if any(word in name.lower() for word in ("secret", "password", "token", "credential", "key"))]


def test_every_step_says_what_it_takes(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        asked = executor["container"]["resources"]
        assert asked["resourceCpuRequest"] and asked["resourceCpuLimit"] and asked["resourceMemoryRequest"] and asked["resourceMemoryLimit"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_steps_that_a_second_time_change_nothing_outside_the_run_are_retried_and_with_a_back_off(
    on_clusters: dict[str, str], overlay: str
) -> None:
    spec = next(yaml.safe_load_all(on_clusters[overlay]))
    policies = {name.rstrip("-0123456789").removesuffix("-step"): task.get("retryPolicy") for name, task in tasks(spec).items()}
    assert {name for name, policy in policies.items() if policy} == {
        "validate",
        "version",
        "canary",
        "train-confounder",
        "train-deconfounded",
        "train-undefended",
        "evaluate",
        "scan",
    }
    for policy in filter(None, policies.values()):
        assert (policy["maxRetryCount"], policy["backoffDuration"], policy["backoffFactor"]) == (RETRIES["num_retries"], "60s", 2.0)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_step_that_is_retried_has_the_time_for_all_its_tries(pipeline: str) -> None:
    """Argo retries no more, and ends the try that runs, when the longest duration has passed since the first began."""
    spec, settings = yaml.safe_load_all(compiled_text("gke", pipeline))
    tries = {task["componentRef"]["name"].removeprefix("comp-"): task.get("retryPolicy") for task in tasks(spec).values()}
    for step, policy in ((step, policy) for step, policy in tries.items() if policy):
        retries, pause, longest = (
            int(policy["maxRetryCount"]),
            float(policy["backoffDuration"][:-1]),
            int(policy["backoffMaxDuration"][:-1]),
        )
        pauses = sum(pause * policy["backoffFactor"] ** number for number in range(retries))
        assert (retries + 1) * int(of_steps(settings)[step]["activeDeadlineSeconds"]) + pauses < longest, step
    assert any(tries.values())


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


def test_with_an_overlay_the_image_is_filled_in_where_a_step_reads_it_too(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "retrain.yaml", image=PINNED, overlay="eks")
    compiled, settings = yaml.safe_load_all((tmp_path / "retrain.yaml").read_text())
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert {"name": "CBD_IMAGE", "value": PINNED} in executor["container"]["env"]
    assert of_steps(settings)["scan-step"]["nodeSelector"]["labels"] == {"eks.amazonaws.com/nodegroup": "cbd-gpu"}
    assert IMAGE not in (tmp_path / "retrain.yaml").read_text()


def test_as_manifests_the_same_pipeline_is_the_same_version_and_another_image_another(tmp_path: Path) -> None:
    names = []
    for number, image in enumerate((PINNED, PINNED, PINNED.replace("0123", "3210"))):
        compile_pipeline(tmp_path / f"{number}.yaml", image=image, overlay="gke", manifest=True, namespace="ml")
        pipeline, version = yaml.safe_load_all((tmp_path / f"{number}.yaml").read_text())
        assert (pipeline["kind"], pipeline["metadata"]) == ("Pipeline", {"name": "retrain", "namespace": "ml"})
        assert version["kind"] == "PipelineVersion" and version["spec"]["pipelineName"] == "retrain"
        assert "cloud.google.com/gke-nodepool" in str(version["spec"]["platformSpec"]) and image in str(version["spec"]["pipelineSpec"])
        names.append(version["metadata"]["name"])
    assert names[0] == names[1] != names[2] and (tmp_path / "0.yaml").read_bytes() == (tmp_path / "1.yaml").read_bytes()


@pytest.mark.parametrize(
    ("overlay", "labels"),
    [
        ("gke:a100-spot", {"cloud.google.com/gke-nodepool": "a100-spot"}),
        ("onprem:NVIDIA-H200", {"nvidia.com/gpu.product": "NVIDIA-H200"}),
        ("onprem", {"nvidia.com/gpu.present": "true"}),
        ("eks", {"eks.amazonaws.com/nodegroup": "cbd-gpu"}),
    ],
)
def test_an_overlay_sends_training_to_its_nodes_or_to_those_of_a_pool(tmp_path: Path, overlay: str, labels: dict[str, str]) -> None:
    compile_pipeline(tmp_path / "retrain.yaml", overlay=overlay)
    settings = of_steps(list(yaml.safe_load_all((tmp_path / "retrain.yaml").read_text()))[1])
    assert settings["canary-step"]["nodeSelector"]["labels"] == labels
    assert "nodeSelector" not in settings["decide-step"]


def test_an_unknown_overlay_or_manifests_without_an_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--overlay 'aks': expected one of gke, eks, onprem"):
        compile_pipeline(tmp_path / "retrain.yaml", overlay="aks")
    for pool in ("", "two words", "-a", "a" * 64):
        with pytest.raises(ConfigError, match="is no value that the label cloud.google.com/gke-nodepool can have"):
            compile_pipeline(tmp_path / "retrain.yaml", overlay=f"gke:{pool}")
    with pytest.raises(ConfigError, match="name the image too"):
        compile_pipeline(tmp_path / "retrain.yaml", overlay="gke", manifest=True)
    assert not list(tmp_path.iterdir())
