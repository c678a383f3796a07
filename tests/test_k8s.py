"""The manifests: both overlays rendered by kubectl, against Kubernetes' schemas, our policy, and the table of who talks to whom."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kubernetes_validate
import pytest
import yaml
from moto.server import ThreadedMotoServer

from cbd.config import NEEDS_GPU
from components.monitoring import LASTING
from pipelines.overlays import MORE_SETTINGS, SECRETS, SETTINGS, SIGNING_KEY

PROJECT = Path(__file__).parent.parent
OVERLAYS = ("dev", "production")
CUSTOM = {"ExternalSecret", "ServiceMonitor", "PrometheusRule", "EventBus", "EventSource", "Sensor"}
"""Kinds whose schemas come with their operators, not with Kubernetes."""
NEEDS_TOKEN = {("cbd", "cbd-runs")}
"""Argo's executor in a step's pod talks to the API of Kubernetes; nobody else does."""
Object = dict[str, Any]
Manifests = list[Object]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; it renders the overlays"),
]


@functools.cache
def _rendered(folder: str) -> Manifests:
    command = ["kubectl", "kustomize", str(PROJECT / "k8s" / folder)]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def rendered(overlay: str) -> Manifests:
    """All objects of an overlay, the caller's to change."""
    return deepcopy(_rendered(f"overlays/{overlay}"))


def of_kind(manifests: Manifests, *kinds: str) -> Manifests:
    return [each for each in manifests if each["kind"] in kinds]


def place(each: Object) -> tuple[str, str]:
    return each["metadata"].get("namespace", ""), each["metadata"]["name"]


def pods(manifests: Manifests) -> Iterator[tuple[str, Object]]:
    """Where each pod comes from, and its template."""
    for each in manifests:
        spec = each.get("spec") or {}
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield "/".join((each["kind"], *place(each))), template


def containers(pod: Object) -> Manifests:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def schema_faults(manifests: Manifests) -> Iterator[str]:
    """Strictly against the newest schemas: fields that do not exist are faults."""
    for each in manifests:
        if each["kind"] not in CUSTOM:
            try:
                kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
            except kubernetes_validate.ValidationError as error:
                yield f"{each['kind']} {place(each)}: {error.message}"


def pod_faults(manifests: Manifests) -> Iterator[str]:
    """The profile `restricted` of Pod Security, and what we ask beyond it."""
    for told, pod in pods(manifests):
        spec = pod["spec"]
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{told}: may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{told}: no seccomp profile"
        if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")) or any("hostPath" in each for each in spec["volumes"]):
            yield f"{told}: shares the host's namespaces or files"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{told}: mounts a token"
        if any("sizeLimit" not in each["emptyDir"] for each in spec["volumes"] if "emptyDir" in each):
            yield f"{told}: an emptyDir without a limit"
        elif _empty_dirs(spec) > min(_bytes(_limits(each).get("ephemeral-storage", "0Mi")) for each in containers(pod)):
            yield f"{told}: is ended before its emptyDirs are full"
        for container in containers(pod):
            yield from (f"{told}/{container['name']}: {fault}" for fault in container_faults(container))


def _limits(container: Object) -> dict[str, str]:
    return container.get("resources", {}).get("limits", {})


def _empty_dirs(spec: Object) -> int:
    return sum(_bytes(each["emptyDir"]["sizeLimit"]) for each in spec["volumes"] if "emptyDir" in each)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * 1024 ** (1 + "KMG".index(quantity[-2]))


def container_faults(container: Object) -> Iterator[str]:
    context, resources = container.get("securityContext", {}), container.get("resources", {})
    if context.get("readOnlyRootFilesystem") is not True:
        yield "writable root file system"
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "may gain privileges"
    if context.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if {"runAsUser", "runAsNonRoot", "seccompProfile"} & set(context):
        yield "overrides its pod's security"
    if not {"cpu", "memory", "ephemeral-storage"} <= set(resources.get("requests", {})):
        yield "asks for no resources"
    if not {"memory", "ephemeral-storage"} <= set(_limits(container)):
        yield "has no limits"


def image_faults(manifests: Manifests, *, by_digest: bool) -> Iterator[str]:
    pattern = r".+@sha256:[0-9a-f]{64}" if by_digest else r".+(@sha256:[0-9a-f]{64}|:(?!latest$)[\w.-]+)"
    for told, pod in pods(manifests):
        for container in containers(pod):
            if not re.fullmatch(pattern, container["image"]):
                yield f"{told}: {container['image']}"


def namespace_faults(manifests: Manifests) -> Iterator[str]:
    """Every namespace is there, restricted, and denies everything by default; everything lies in one of them."""
    names = {each["metadata"]["name"] for each in of_kind(manifests, "Namespace")}
    for each in of_kind(manifests, "Namespace"):
        labels = each["metadata"].get("labels", {})
        if any(labels.get(f"pod-security.kubernetes.io/{mode}") != "restricted" for mode in ("enforce", "audit", "warn")):
            yield f"{each['metadata']['name']}: not restricted"
    denied = {
        place(each)[0]
        for each in of_kind(manifests, "NetworkPolicy")
        if each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    }
    yield from (f"{name}: no default deny" for name in sorted(names - denied))
    yield from (
        f"{each['kind']} {place(each)}: in no namespace of ours"
        for each in manifests
        if each["kind"] != "Namespace" and place(each)[0] not in names
    )


def secret_faults(manifests: Manifests) -> Iterator[str]:
    """Secrets come by reference alone."""
    yield from (f"{place(each)}: a Secret" for each in of_kind(manifests, "Secret"))
    for told, pod in pods(manifests):
        for container in containers(pod):
            for variable in container.get("env", []):
                if re.search(r"(PASSWORD|SECRET|TOKEN|KEY)(?!.*_FILE$)", variable["name"]) and "valueFrom" not in variable:
                    yield f"{told}: {variable['name']} is written out"
    for each in of_kind(manifests, "ConfigMap"):
        for name, value in each.get("data", {}).items():
            if re.search(r"(?i)^\s*[\w-]*(password|secret|token)[\w-]*\s*[:=]", f"{name}={value}", re.MULTILINE) or re.search(
                r"://[^/\s]*:[^/\s]*@", value
            ):
                yield f"ConfigMap {place(each)}: {name}"


def account_faults(manifests: Manifests) -> Iterator[str]:
    """Each pod has an account of its own without a token; the only rights are in a Role without wildcards, about named objects."""
    accounts = {place(each): each for each in of_kind(manifests, "ServiceAccount")}
    for at, each in accounts.items():
        if each.get("automountServiceAccountToken") is not (at in NEEDS_TOKEN):
            yield f"{at}: token"
    for told, pod in pods(manifests):
        if (told.split("/")[1], pod["spec"].get("serviceAccountName")) not in accounts:
            yield f"{told}: no account of its own"
    yield from (
        f"{each['kind']} {place(each)}: rights in the whole cluster" for each in of_kind(manifests, "ClusterRole", "ClusterRoleBinding")
    )
    for each in of_kind(manifests, "Role"):
        for rule in each["rules"]:
            if "*" in (*rule["apiGroups"], *rule["resources"], *rule["verbs"]):
                yield f"Role {place(each)}: a wildcard"
            if rule["apiGroups"] == [""] and not rule.get("resourceNames"):
                yield f"Role {place(each)}: all {rule['resources']}"
    bound = {(place(each)[0], subject["name"]) for each in of_kind(manifests, "RoleBinding") for subject in each["subjects"]}
    yield from (f"{at}: has rights" for at in sorted(bound - NEEDS_TOKEN))


def budget_faults(manifests: Manifests) -> Iterator[str]:
    """What serves others is drained by rule, and probed."""
    budgets = {
        (place(each)[0], each["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"])
        for each in of_kind(manifests, "PodDisruptionBudget")
    }
    for each in of_kind(manifests, "Deployment", "StatefulSet"):
        if place(each) != ("cbd", "metrics") and place(each) not in budgets:
            yield f"{place(each)}: no PodDisruptionBudget"
        for container in each["spec"]["template"]["spec"]["containers"]:
            if not {"readinessProbe", "livenessProbe"} <= set(container):
                yield f"{place(each)}: not probed"


def backup_faults(manifests: Manifests) -> Iterator[str]:
    jobs = {each["metadata"]["name"]: each for each in of_kind(manifests, "CronJob")}
    if not {"postgres-backup", "postgres-restore"} <= set(jobs):
        yield "no backup, or no way to restore it"
    if any(each["spec"]["suspend"] is (name == "postgres-backup") for name, each in jobs.items()):
        yield "the backup does not run, or something else runs by itself"
    if any(each["spec"]["concurrencyPolicy"] != "Forbid" for each in jobs.values()):
        yield "two may run at once"


def selector_faults(manifests: Manifests) -> Iterator[str]:
    """What is named exists: pods behind each Service, claims and settings behind each pod, each Secret in the production overlay."""
    labels = [(told.split("/")[1], pod["metadata"]["labels"]) for told, pod in pods(manifests)]
    for each in of_kind(manifests, "Service"):
        if not any(at == place(each)[0] and each["spec"]["selector"].items() <= found.items() for at, found in labels):
            yield f"Service {place(each)}: no pods"
    there = {(each["kind"], *place(each)) for each in manifests}
    external = {place(each) for each in of_kind(manifests, "ExternalSecret")}
    for told, pod in pods(manifests):
        namespace = told.split("/")[1]
        for kind, name in _references(pod["spec"]):
            if kind == "Secret" and external and (namespace, name) not in external:
                yield f"{told}: Secret {name} comes from nowhere"
            if kind != "Secret" and (kind, namespace, name) not in there:
                yield f"{told}: {kind} {name} is not there"


def _references(value: Any) -> Iterator[tuple[str, str]]:
    kinds = {"configMapRef": "ConfigMap", "configMap": "ConfigMap", "secretRef": "Secret", "secretKeyRef": "Secret", "secret": "Secret"}
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in kinds:
                yield kinds[key], inner.get("name") or inner["secretName"]
            elif key == "persistentVolumeClaim":
                yield "PersistentVolumeClaim", inner["claimName"]
            else:
                yield from _references(inner)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


Row = tuple[str, str, str]
"""From, to, port."""


def allowed(manifests: Manifests) -> tuple[set[Row], set[Row]]:
    """What the policies let out, and what they let in."""
    out: set[Row] = set()
    into: set[Row] = set()
    for each in of_kind(manifests, "NetworkPolicy"):
        namespace = place(each)[0]
        for own in _selected(each["spec"]["podSelector"]):
            me = f"{namespace}/{own}"
            for rule in each["spec"].get("egress", []):
                out |= {(me, peer, port) for peer in _peers(rule.get("to"), namespace) for port in _ports(rule)}
            for rule in each["spec"].get("ingress", []):
                into |= {(peer, me, port) for peer in _peers(rule.get("from"), namespace) for port in _ports(rule)}
    return out, into


def _selected(selector: Object) -> list[str]:
    if selector == {"matchExpressions": [{"key": "part-of", "operator": "NotIn", "values": ["cbd"]}]}:
        return ["steps"]
    if "matchExpressions" in selector:
        (only,) = selector["matchExpressions"]
        assert (only["key"], only["operator"]) == ("app.kubernetes.io/name", "In")
        return [str(name) for name in only["values"]]
    return [selector["matchLabels"]["app.kubernetes.io/name"] if selector else "*"]


def _peers(peers: Manifests | None, namespace: str) -> Iterator[str]:
    if not peers:
        yield "everywhere"
    for peer in peers or []:
        if "ipBlock" in peer:
            assert peer["ipBlock"]["except"] == ["169.254.0.0/16"], "a pod may reach the credentials of its node"
            yield peer["ipBlock"]["cidr"]
            continue
        named = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", namespace)
        yield from (f"{named}/{pod}" for pod in (_selected(peer["podSelector"]) if "podSelector" in peer else ["*"]))


def _ports(rule: Object) -> list[str]:
    return [f"{each['port']}/{each['protocol']}" for each in rule.get("ports") or []] or ["all"]


def table(overlay: str) -> set[Row]:
    """The rows of `k8s/README.md` that hold in this overlay."""
    lines = (PROJECT / "k8s" / "README.md").read_text().splitlines()
    start = lines.index("| from | to | ports | overlay | why |")
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in _until_blank(lines[start + 2 :])]
    return {(row[0], row[1], port.strip()) for row in rows if row[3] in ("both", overlay) for port in row[2].split(",")}


def _until_blank(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("|"):
            return
        yield line


def network_faults(manifests: Manifests, overlay: str) -> Iterator[str]:
    """What the policies allow and the table tells are the same; between our own pods both ends must allow it."""
    out, into = allowed(manifests)
    mine = {peer for rows in (out, into) for row in rows for peer in row[:2] if peer.split("/")[0] in ("cbd", "cbd-tracking")}
    yield from (f"let out, but not in: {row}" for row in sorted(out - into) if row[1] in mine)
    yield from (f"let in, but not out: {row}" for row in sorted(into - out) if row[0] in mine)
    yield from (f"allowed, not in the table: {row}" for row in sorted((out | into) - table(overlay)))
    yield from (f"in the table, not allowed: {row}" for row in sorted(table(overlay) - (out | into)))


def monitoring_faults(manifests: Manifests) -> Iterator[str]:
    """The monitor finds the exporter, and the alerts ask for metrics and outcomes that it serves."""
    exporter = (PROJECT / "components" / "monitoring.py").read_text()
    (monitor,), (rules,) = of_kind(manifests, "ServiceMonitor"), of_kind(manifests, "PrometheusRule")
    services = [each for each in of_kind(manifests, "Service") if place(each)[0] == place(monitor)[0]]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    ports = {port["name"] for each in services if wanted <= each["metadata"].get("labels", {}).items() for port in each["spec"]["ports"]}
    yield from (f"no port {each['port']}" for each in monitor["spec"]["endpoints"] if each["port"] not in ports)
    alerts = {rule["alert"]: rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]}
    if not {"GateBlocked", "RunFailed", "NoRun"} <= set(alerts):
        yield "an alert is missing"
    if "absent(cbd_run_ended_timestamp_seconds)" not in alerts.values():
        yield "nobody is told that no run has ever ended"
    for name, expression in alerts.items():
        yield from (f"{name}: {metric} is not served" for metric in re.findall(r"cbd_\w+", expression) if f'"{metric}"' not in exporter)
        yield from (f"{name}: no outcome {each}" for each in re.findall(r'outcome="(\w+)"', expression) if each not in LASTING)


CHECKS: dict[str, Callable[[Manifests, str], Iterator[str]]] = {
    "schema": lambda manifests, overlay: schema_faults(manifests),
    "pods": lambda manifests, overlay: pod_faults(manifests),
    "images": lambda manifests, overlay: image_faults(manifests, by_digest=overlay == "production"),
    "namespaces": lambda manifests, overlay: namespace_faults(manifests),
    "secrets": lambda manifests, overlay: secret_faults(manifests),
    "accounts": lambda manifests, overlay: account_faults(manifests),
    "budgets": lambda manifests, overlay: budget_faults(manifests),
    "backups": lambda manifests, overlay: backup_faults(manifests),
    "selectors": lambda manifests, overlay: selector_faults(manifests),
    "network": network_faults,
    "monitoring": lambda manifests, overlay: monitoring_faults(manifests) if overlay == "production" else iter(()),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS)
def test_an_overlay_keeps_every_rule(check: str, overlay: str) -> None:
    assert list(CHECKS[check](rendered(overlay), overlay)) == []


def _get(manifests: Manifests, kind: str, name: str) -> Object:
    return next(each for each in manifests if each["kind"] == kind and each["metadata"]["name"] == name)


def _pod(manifests: Manifests, name: str = "mlflow") -> Object:
    return next(pod["spec"] for told, pod in pods(manifests) if told.endswith(f"/{name}"))


def _policy(manifests: Manifests, name: str) -> Object:
    return _get(manifests, "NetworkPolicy", name)["spec"]


def _box(manifests: Manifests) -> Object:
    return _pod(manifests)["containers"][0]


BREAKS: dict[str, tuple[str, Callable[[Manifests], object]]] = {
    "an unknown field": ("schema", lambda m: _pod(m).update(runAsNonRoot=True)),
    "a port of the wrong type": ("schema", lambda m: _box(m)["ports"][0].update(containerPort="http")),
    "root allowed": ("pods", lambda m: _pod(m)["securityContext"].pop("runAsNonRoot")),
    "user 0": ("pods", lambda m: _pod(m)["securityContext"].update(runAsUser=0)),
    "no seccomp": ("pods", lambda m: _pod(m, "postgres")["securityContext"].pop("seccompProfile")),
    "host network": ("pods", lambda m: _pod(m).update(hostNetwork=True)),
    "a host path": ("pods", lambda m: _pod(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}})),
    "a token in a pod": ("pods", lambda m: _pod(m).pop("automountServiceAccountToken")),
    "an endless emptyDir": ("pods", lambda m: _pod(m)["volumes"][0]["emptyDir"].pop("sizeLimit")),
    "an emptyDir over the limit": ("pods", lambda m: _pod(m)["volumes"][0]["emptyDir"].update(sizeLimit="40Gi")),
    "a writable root": ("pods", lambda m: _box(m)["securityContext"].update(readOnlyRootFilesystem=False)),
    "a writable root in an init container": (
        "pods",
        lambda m: _pod(m, "postgres-backup")["initContainers"][0]["securityContext"].pop("readOnlyRootFilesystem"),
    ),
    "escalation": ("pods", lambda m: _box(m)["securityContext"].pop("allowPrivilegeEscalation")),
    "privileged": ("pods", lambda m: _box(m)["securityContext"].update(privileged=True)),
    "capabilities kept": ("pods", lambda m: _box(m)["securityContext"]["capabilities"].update(add=["NET_RAW"])),
    "a container that overrides": ("pods", lambda m: _box(m)["securityContext"].update(runAsUser=0)),
    "no requests": ("pods", lambda m: _box(m)["resources"].pop("requests")),
    "no limits": ("pods", lambda m: _box(m)["resources"]["limits"].pop("memory")),
    "the tag latest": ("images", lambda m: _box(m).update(image="cbd-mlflow:latest")),
    "no tag": ("images", lambda m: _box(m).update(image="cbd-mlflow")),
    "a bare tag in production": ("images", lambda m: _box(m).update(image="cbd-mlflow:1.0")),
    "a namespace that is not restricted": (
        "namespaces",
        lambda m: _get(m, "Namespace", "cbd")["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "baseline"}),
    ),
    "no default deny": ("namespaces", lambda m: m.remove(_get(m, "NetworkPolicy", "default-deny"))),
    "a default deny that lets out": ("namespaces", lambda m: _policy(m, "default-deny").update(egress=[{}])),
    "an object in another namespace": ("namespaces", lambda m: _get(m, "Deployment", "mlflow")["metadata"].update(namespace="default")),
    "a Secret": ("secrets", lambda m: m.append({"kind": "Secret", "metadata": {"name": "s", "namespace": "cbd"}, "data": {"a": "b"}})),
    "a password in the environment": ("secrets", lambda m: _box(m)["env"].append({"name": "PGPASSWORD", "value": "x"})),
    "a password in settings": (
        "secrets",
        lambda m: _get(m, "ConfigMap", "cbd-settings")["data"].update(CBD_REGISTRY_GIT="https://me:pw@git.example/data"),
    ),
    "a password in a file of settings": (
        "secrets",
        lambda m: _get(m, "ConfigMap", "cbd-settings")["data"].update({"auth.ini": "[mlflow]\nadmin_password = x\n"}),
    ),
    "a token for everybody": ("accounts", lambda m: _get(m, "ServiceAccount", "mlflow").update(automountServiceAccountToken=True)),
    "the default account": ("accounts", lambda m: _pod(m).pop("serviceAccountName")),
    "a wildcard": ("accounts", lambda m: _get(m, "Role", "cbd-runs")["rules"][0].update(verbs=["*"])),
    "all secrets": ("accounts", lambda m: _get(m, "Role", "cbd-runs")["rules"][2].pop("resourceNames")),
    "rights for MLflow": ("accounts", lambda m: _get(m, "RoleBinding", "cbd-runs")["subjects"][0].update(name="mlflow")),
    "no budget": ("budgets", lambda m: m.remove(_get(m, "PodDisruptionBudget", "postgres"))),
    "no probe": ("budgets", lambda m: _box(m).pop("livenessProbe")),
    "no backup": ("backups", lambda m: m.remove(_get(m, "CronJob", "postgres-backup"))),
    "a backup that sleeps": ("backups", lambda m: _get(m, "CronJob", "postgres-backup")["spec"].update(suspend=True)),
    "two at once": ("backups", lambda m: _get(m, "CronJob", "postgres-restore")["spec"].update(concurrencyPolicy="Allow")),
    "a restoration by itself": ("backups", lambda m: _get(m, "CronJob", "postgres-restore")["spec"].update(suspend=False)),
    "a Service without pods": ("selectors", lambda m: _get(m, "Service", "mlflow")["spec"]["selector"].update(x="y")),
    "another claim": ("selectors", lambda m: m.remove(_get(m, "PersistentVolumeClaim", "cbd-workspace"))),
    "a Secret from nowhere": ("selectors", lambda m: m.remove(_get(m, "ExternalSecret", "mlflow-server"))),
    "everything let out": ("network", lambda m: _policy(m, "postgres").update(egress=[{}])),
    "every pod let in": ("network", lambda m: _policy(m, "postgres")["ingress"][0]["from"].append({"podSelector": {}})),
    "another port let in": (
        "network",
        lambda m: _policy(m, "postgres")["ingress"][0]["ports"].append({"port": 22, "protocol": "TCP"}),
    ),
    "one end closed": ("network", lambda m: _policy(m, "mlflow")["ingress"][0]["from"].pop(0)),
    "a row that does not hold": ("network", lambda m: m.remove(_get(m, "NetworkPolicy", "metrics"))),
    "a monitor that finds nothing": ("monitoring", lambda m: _get(m, "Service", "metrics")["metadata"]["labels"].clear()),
    "an alert on nothing": (
        "monitoring",
        lambda m: _get(m, "PrometheusRule", "cbd")["spec"]["groups"][0]["rules"][0].update(expr="cbd_last_run_verdict > 0"),
    ),
    "no alert where no run has ended": (
        "monitoring",
        lambda m: next(
            rule for rule in _get(m, "PrometheusRule", "cbd")["spec"]["groups"][0]["rules"] if rule["alert"] == "NoRunYet"
        ).update(expr="cbd_run_ended_timestamp_seconds == 0"),
    ),
    "an outcome that is none": (
        "monitoring",
        lambda m: _get(m, "PrometheusRule", "cbd")["spec"]["groups"][0]["rules"][0].update(expr='cbd_last_run_outcome{outcome="BAD"}'),
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_each_rule_is_seen_broken(broken: str) -> None:
    check, spoil = BREAKS[broken]
    manifests = rendered("production")
    spoil(manifests)
    assert list(CHECKS[check](manifests, "production"))


def test_the_names_that_compiled_pipelines_read_are_there() -> None:
    manifests = rendered("production")
    settings = _get(manifests, "ConfigMap", "cbd-settings")
    service = _get(manifests, "Service", "mlflow")
    assert settings["data"]["MLFLOW_TRACKING_URI"] == f"http://mlflow.{place(service)[0]}:{service['spec']['ports'][0]['port']}"
    hosts = next(each["data"] for each in of_kind(manifests, "ConfigMap") if "MLFLOW_SERVER_ALLOWED_HOSTS" in each.get("data", {}))
    assert "mlflow.cbd-tracking:5000" in hosts["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert set(settings["data"]) <= {*SETTINGS, *MORE_SETTINGS}
    secrets = {each["metadata"]["name"]: each["spec"]["data"] for each in of_kind(manifests, "ExternalSecret") if place(each)[0] == "cbd"}
    keys = {name: {entry["secretKey"] for entry in entries} for name, entries in secrets.items()}
    assert keys == {name: set(named) for name, named in SECRETS.items()} | {"cbd-signing-key": {Path(SIGNING_KEY).name}}


def test_the_pods_of_a_training_on_several_machines_know_what_a_training_step_knows() -> None:
    (runtime,) = of_kind(_rendered("trainer"), "TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [{"name": NEEDS_GPU, "value": "1"}]
    assert {(kind, told["name"]) for each in container["envFrom"] for kind, told in each.items()} == {
        ("configMapRef", "cbd-settings"),
        *(("secretRef", secret) for secret in SECRETS),
    }
    assert all(each["secretRef"]["optional"] for each in container["envFrom"] if "secretRef" in each)


def test_a_dump_goes_to_the_object_store_and_the_newest_or_a_named_one_comes_back(tmp_path: Path) -> None:
    """The command and the script are those of the rendered manifests; the store is a server that speaks S3."""
    manifests = rendered("production")
    script = next(each["data"]["backup.py"] for each in of_kind(manifests, "ConfigMap") if "backup.py" in each.get("data", {}))
    (tmp_path / "backup.py").write_text(script)
    dump = tmp_path / "mlflow.dump"
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    environment = os.environ | keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "BACKUP_BUCKET": "dumps", "BACKUP_PREFIX": "mlflow"}

    def move(job: str, **more: str) -> subprocess.CompletedProcess[str]:
        steps = {each["name"]: each for each in containers({"spec": _pod(manifests, job)})}
        command = steps["upload" if job == "postgres-backup" else "download"]["command"]
        command = [sys.executable, str(tmp_path / "backup.py"), command[2], str(dump)]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    try:
        with patch.dict(os.environ, environment):
            import boto3

            store = boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"])
            store.create_bucket(Bucket="dumps")
            store.put_object(Bucket="dumps", Key="mlflow/2020-01-01T000000Z.dump", Body=b"old")
        assert "no dump there" in move("postgres-restore", BACKUP_PREFIX="other").stderr
        dump.write_bytes(b"new")
        done = move("postgres-backup")
        assert done.returncode == 0 and re.search(r"upload: s3://dumps/mlflow/20\d\d-\S+Z\.dump, 3 bytes", done.stdout), done.stderr
        dump.unlink()
        assert move("postgres-restore").returncode == 0 and dump.read_bytes() == b"new"
        assert move("postgres-restore", BACKUP_NAME="mlflow/2020-01-01T000000Z.dump").returncode == 0 and dump.read_bytes() == b"old"
    finally:
        server.stop()
