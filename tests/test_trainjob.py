"""Trainings on several machines: the TrainJob against Kubeflow Trainer's own models, and one that really runs on two nodes."""

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import trainings
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime, TrainerV1alpha1TrainJob
from trainer_cluster import Cluster, serving
from trainings import params

from cbd.config import Training
from cbd.errors import DataError, EnvironmentFault
from components import trainjob
from components.attestation import IMAGE
from components.processes import command
from components.trainjob import train_job

PROJECT = Path(__file__).parent.parent
PINNED = "registry.example/cbd@sha256:" + "0123456789abcdef" * 4


def shape_faults(model: Any, given: dict[str, Any]) -> list[str]:
    """Where a manifest is not what the model of its kind takes: a wrong type is refused, an unknown field vanishes."""
    try:
        kept = model.from_dict(given).to_dict()
    except ValueError as error:
        return [str(error)]
    return list(_lost(given, kept, ""))


def _lost(given: Any, kept: Any, where: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from _lost(value, kept[key], f"{where}/{key}") if key in kept else [f"{where}/{key}: no such field"]
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{where}/{index}")
    elif given != kept:
        yield f"{where}: {given!r} became {kept!r}"


def made(**changes: Any) -> dict[str, Any]:
    job = train_job("cbd-1", command(Path("/workspace/checkpoints/x")), Training(processes=4, nodes=3), image=PINNED)
    return job | {"spec": job["spec"] | {"trainer": job["spec"]["trainer"] | changes}}


def test_a_train_job_is_one_by_kubeflow_trainers_models_and_asks_for_what_the_parameter_says() -> None:
    job = made()
    assert shape_faults(TrainerV1alpha1TrainJob, job) == []
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (3, 4, PINNED)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "4"
    assert trainer["command"] == ["python", "-m", "torch.distributed.run", "-m", "components.processes", "/workspace/checkpoints/x"]


@pytest.mark.parametrize("change", [{"numNodes": "three"}, {"nodes": 3}, {"command": "python"}])
def test_what_is_no_train_job_is_found_out(change: dict[str, Any]) -> None:
    assert shape_faults(TrainerV1alpha1TrainJob, made(**change)) != []


def rendered() -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(PROJECT / "k8s" / "trainer")]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; it renders the manifests")
def test_the_runtime_is_one_by_the_models_is_restricted_and_is_the_one_that_train_jobs_name() -> None:
    runtime = next(each for each in rendered() if each["kind"] == "TrainingRuntime")
    assert shape_faults(TrainerV1alpha1TrainingRuntime, runtime) == []
    assert (runtime["metadata"]["name"], runtime["metadata"]["namespace"]) == (trainjob.RUNTIME, "cbd")
    jobs = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert [job["template"]["metadata"]["labels"] for job in jobs] == [{"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}]
    spec = jobs[0]["template"]["spec"]
    pod = spec["template"]["spec"]
    assert spec["backoffLimit"] == 0 and spec["activeDeadlineSeconds"] > 0
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        context = container["securityContext"]
        assert (
            context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
        )
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/workspace", "/dev/shm", "/tmp"}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed; it renders the manifests")
def test_built_in_kinds_beside_the_runtime_are_valid_and_grant_no_more_than_a_step_does() -> None:
    import kubernetes_validate

    others = [each for each in rendered() if each["kind"] != "TrainingRuntime"]
    for each in others:
        kubernetes_validate.validate(each, kubernetes_validate.latest_version(), strict=True)
    roles = [each["rules"] for each in others if each["kind"] == "Role"]
    assert roles == [[{"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainjobs"], "verbs": ["create", "get", "delete"]}]]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster in which this is a step, and what it is asked for is looked at often."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv(IMAGE, PINNED)
    (tmp_path / "namespace").write_text("cbd")
    monkeypatch.setattr(trainjob, "NAMESPACE", tmp_path / "namespace")
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.2)
    with serving(tmp_path) as (held, kubeconfig):
        pods = functools.partial(kubernetes.config.load_kube_config, config_file=str(kubeconfig))
        monkeypatch.setattr(kubernetes.config, "load_incluster_config", pods)  # a pod's account, as a file
        yield held


def run(training: Any, place: Path) -> dict[str, Any]:
    for name in ("data", "workspace"):
        (place / name).mkdir()
    (place / "data" / "given").write_text("made")
    told: dict[str, Any] = training(place / "data", place / "out", params=params(1, 2), checkpoints=place / "workspace" / "checkpoints")
    return told


@pytest.mark.slow
def test_two_nodes_train_together_and_the_step_puts_out_what_the_first_wrote(cluster: Cluster, tmp_path: Path) -> None:
    cluster.unavailable = 2
    told = run(trainings.counting, tmp_path)
    assert told == {"tracked": None, "agreed": True, "training": {"processes": 1, "nodes": 2}}
    assert (tmp_path / "out" / "made").read_text() == "made by 2"
    name = cluster.made[0]["metadata"]["name"]
    assert shape_faults(TrainerV1alpha1TrainJob, cluster.made[0]) == [] and cluster.removed == [name]
    assert {path.name for path in (tmp_path / "workspace" / "checkpoints").iterdir()} == {"first-True", "first-False"}


@pytest.mark.slow
def test_a_node_that_dies_fails_the_step_and_the_train_job_stays_for_its_logs(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="training in 2 processes: TrainJob cbd-[0-9a-f]+ failed: jobset failed"):
        run(trainings.dying, tmp_path)
    assert cluster.removed == [] and not (tmp_path / "out").exists()
    assert list((tmp_path / "workspace" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_what_a_node_refuses_is_refused_in_the_same_words(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="dataset: nothing in it$"):
        run(trainings.refusing, tmp_path)


@pytest.mark.parametrize(("code", "fix"), [(403, "apply k8s/trainer"), (404, "there is no Kubeflow Trainer")])
def test_a_cluster_that_takes_no_train_jobs_is_named_with_the_fix(cluster: Cluster, tmp_path: Path, code: int, fix: str) -> None:
    cluster.refusal = code
    with pytest.raises(EnvironmentFault, match=f"HTTP {code}: .*{fix}"):
        run(trainings.counting, tmp_path)
    assert cluster.removed == []


def test_an_api_that_answers_no_more_ends_the_step_and_removes_the_train_job(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "PATIENCE", 2)
    cluster.unavailable = 10**6
    with pytest.raises(EnvironmentFault, match="the API of Kubernetes answers no more"):
        run(trainings.counting, tmp_path)
    assert cluster.removed == [cluster.made[0]["metadata"]["name"]]


@pytest.fixture
def quick(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, with TrainJobs of one empty command each."""
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.01)
    return cluster


def ended(tmp_path: Path, program: str = "pass") -> str | None:
    """Why a TrainJob of two nodes that run this program failed, or None."""
    return trainjob.follow([sys.executable, "-c", program], Training(nodes=2), folder=tmp_path / "job")


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_api_ends_no_training(quick: Cluster, tmp_path: Path, code: int) -> None:
    quick.unavailable, quick.busy = 3, code
    assert ended(tmp_path) is None


@pytest.mark.parametrize("broken", [["POST"], ["DELETE"] * 9])
def test_an_answer_that_is_lost_ends_no_training_and_makes_no_second_one(quick: Cluster, tmp_path: Path, broken: list[str]) -> None:
    quick.broken = broken
    assert ended(tmp_path) is None and len(quick.made) == 1 and len(set(quick.removed)) == 1


def test_an_api_that_takes_connections_and_never_answers_is_given_up(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainjob, "PATIENCE", 1)
    monkeypatch.setattr(trainjob, "ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(kubernetes.config, "load_incluster_config", lambda: kubernetes.client.Configuration.set_default(at(address)))
        try:
            with pytest.raises(EnvironmentFault, match="the API of Kubernetes answers no more"):
                ended(tmp_path)
        finally:
            kubernetes.client.Configuration.set_default(None)


def at(address: str) -> Any:
    made = kubernetes.client.Configuration()
    made.host = address
    return made


def test_a_step_that_is_told_to_end_removes_its_train_job(quick: Cluster, tmp_path: Path) -> None:
    def tell() -> None:
        while quick.unavailable == 0:  # not looked at yet
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(EnvironmentFault, match="told to end"):
        ended(tmp_path, "import time; time.sleep(60)")
    assert quick.removed == [quick.made[0]["metadata"]["name"]] and signal.getsignal(signal.SIGTERM) == before


def test_a_train_job_goes_with_the_pod_of_its_step(quick: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "retrain-x1")
    monkeypatch.setenv("KFP_POD_UID", "0123-4567")
    assert ended(tmp_path) is None
    (owner,) = quick.made[0]["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "v1", "kind": "Pod", "name": "retrain-x1", "uid": "0123-4567"}
    assert shape_faults(TrainerV1alpha1TrainJob, quick.made[0]) == []


def test_several_machines_are_refused_where_there_is_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"training.nodes = 2: only a step on a cluster .* set it to 1"):
        run(trainings.counting, tmp_path)
