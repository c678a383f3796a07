"""New objects start a run: the example for Argo Events, rendered, and the command of its job against a server of Kubeflow Pipelines."""

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import cbd
from kfp_server import Server
from test_k8s import CUSTOM, PROJECT, Manifests, image_faults, namespace_faults, pod_faults, schema_faults, secret_faults

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; it renders the example")


@functools.cache
def _rendered() -> Manifests:
    command = ["kubectl", "kustomize", str(PROJECT / "k8s" / "examples" / "events")]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def found(kind: str, name: str = "") -> dict[str, Any]:
    return deepcopy(next(each for each in _rendered() if each["kind"] == kind and each["metadata"]["name"].startswith(name)))


def job() -> dict[str, Any]:
    """What the sensor makes, as it would stand in the cluster."""
    made: dict[str, Any] = found("Sensor")["spec"]["triggers"][0]["template"]["k8s"]["source"]["resource"]
    return made | {"metadata": {"namespace": "cbd-events", "name": "cbd-delivery-x"}}


def faults(made: dict[str, Any]) -> list[str]:
    known = [each for each in _rendered() if each["kind"] not in CUSTOM]
    return [
        *schema_faults([*known, made]),
        *pod_faults([made]),
        *image_faults([made], by_digest=True),
        *secret_faults([*known, made]),
    ]


def _spoil(made: dict[str, Any], **changes: Any) -> None:
    made["spec"]["template"]["spec"]["containers"][0].update(changes)


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "schema": (lambda made: made["spec"].update(retries=3), "retries"),
    "root": (lambda made: made["spec"]["template"]["spec"]["securityContext"].update(runAsNonRoot=False), "may run as root"),
    "token": (lambda made: made["spec"]["template"]["spec"].update(automountServiceAccountToken=True), "mounts a token"),
    "image": (lambda made: _spoil(made, image="registry.example/cbd:latest"), "cbd:latest"),
    "secret": (lambda made: _spoil(made, env=[{"name": "CBD_KFP_TOKEN", "value": "x"}]), "written out"),
}


def test_the_example_passes_the_schemas_and_our_policy() -> None:
    assert faults(job()) == []


@pytest.mark.parametrize("broken", SPOILED)
def test_each_rule_is_seen_broken(broken: str) -> None:
    made, (spoil, message) = job(), SPOILED[broken]
    spoil(made)
    assert any(message in fault for fault in faults(made))


def of_argo_events() -> dict[str, list[dict[str, Any]]]:
    """By kind: of the pods that Argo Events makes, the pod's security and then each container's."""
    source, sensor, bus = (found(kind)["spec"] for kind in ("EventSource", "Sensor", "EventBus"))
    made = {kind: [spec["template"], spec["template"]["container"]] for kind, spec in {"EventSource": source, "Sensor": sensor}.items()}
    names = ("containerTemplate", "reloaderContainerTemplate", "metricsContainerTemplate")
    made["EventBus"] = [bus["jetstream"], *(bus["jetstream"][name] for name in names)]
    return {kind: [each["securityContext"] for each in contexts] for kind, contexts in made.items()}


@pytest.mark.parametrize("kind", ["EventBus", "EventSource", "Sensor"])
def test_the_pods_of_argo_events_are_admitted_under_restricted(kind: str) -> None:
    pod, *boxes = of_argo_events()[kind]
    assert pod["runAsNonRoot"] and pod["runAsUser"] and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert boxes and all(box == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} for box in boxes)


def test_who_may_make_jobs_does_so_in_a_namespace_without_our_secrets() -> None:
    ours = [each for each in _rendered() if each["metadata"].get("namespace") != "cbd"]
    assert list(namespace_faults(ours)) == []
    beside = [each for each in _rendered() if each not in ours]
    assert {each["kind"] for each in beside} == {"Role", "RoleBinding"}
    told = [rule for each in beside for rule in each.get("rules", ()) if rule["apiGroups"] != ["pipelines.kubeflow.org"]]
    assert told == [{"apiGroups": [""], "resources": ["serviceaccounts"], "resourceNames": ["cbd-runs"], "verbs": ["use"]}]


def test_the_sensor_waits_for_the_event_that_the_source_gives_and_makes_jobs_alone() -> None:
    source, sensor = found("EventSource"), found("Sensor")
    (event,) = (name for kind in ("sqs", "minio", "pubSub") for name in source["spec"].get(kind, {}))
    (dependency,) = sensor["spec"]["dependencies"]
    assert (dependency["eventSourceName"], dependency["eventName"]) == (source["metadata"]["name"], event)
    assert "parameters" not in sensor["spec"]["triggers"][0]["template"]["k8s"], "nothing of an event may reach the command"
    account = sensor["spec"]["template"]["serviceAccountName"]
    assert found("RoleBinding", account)["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": "cbd-events"}]
    assert source["spec"]["template"]["serviceAccountName"] != account, "what reads the queue needs nothing of Kubernetes"
    assert found("Role", account)["rules"] == [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create"]}]
    used = job()["spec"]["template"]["spec"]
    names = {used["containers"][0]["envFrom"][0]["configMapRef"]["name"], used["volumes"][0]["configMap"]["name"]}
    assert names == {found("ConfigMap")["metadata"]["name"]}


def test_the_jobs_command_submits_a_run_as_the_account_that_the_cluster_vouches_for(
    server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes fills in $(NAME); the token comes from the projected volume."""
    server.token = "from-the-volume"
    (tmp_path / "token").write_text(server.token)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "token"))
    settings, container = found("ConfigMap")["data"], job()["spec"]["template"]["spec"]["containers"][0]
    (tmp_path / "params.yaml").write_text(settings["params.yaml"])
    words = [re.sub(r"\$\((\w+)\)", lambda match: settings[match[1]], word) for word in [*container["command"][1:], *container["args"]]]
    code, _, err = cbd(capsys, *(word.replace("/etc/cbd", str(tmp_path)) for word in words))
    assert code == 0, err
    (run,) = server.runs
    given = run["runtime_config"]["parameters"]
    assert (given["data"], given["gate"]["min_clean_accuracy"]) == (settings["DATA"], 0.9)
    assert run["service_account"] == "cbd-runs"
