"""A training on several machines: a TrainJob of Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), made, followed and removed.

Its pods run the image of the step that asks, under the runtime `cbd` of `k8s/trainer`, where what they may and mount stands.
"""

import contextlib
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cbd.config import Training
from cbd.errors import EnvironmentFault
from components.attestation import IMAGE

GROUP, VERSION, PLURAL, RUNTIME = "trainer.kubeflow.org", "v1alpha1", "trainjobs", "cbd"
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
CPU, MEMORY = "4", ("16G", "32G")
"""Requests of a pod, and of memory the limit; as those of a training step."""
POLL_SECONDS, PATIENCE = 10.0, 30
"""How often a TrainJob is looked at, and how many looks in a row may go unanswered."""
ANSWER_SECONDS = 30.0
"""How long a connection, and then an answer, is waited for."""
POD = ("KFP_POD_NAME", "KFP_POD_UID")
"""Where Kubeflow Pipelines tells a step what its pod is."""


def train_job(name: str, command: list[str], training: Training, *, image: str) -> dict[str, Any]:
    """The manifest: `training.nodes` pods with `training.processes` GPUs each, all with this command.

    The processes find each other by the variables PET_* that Kubeflow Trainer sets and torchrun reads.
    """
    gpus = {"nvidia.com/gpu": str(training.processes)}
    resources = {"requests": {"cpu": CPU, "memory": MEMORY[0], **gpus}, "limits": {"memory": MEMORY[1], **gpus}}
    size = {"numNodes": training.nodes, "numProcPerNode": training.processes, "resourcesPerNode": resources}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {"image": image, "command": command, **size},
        },
    }


def follow(command: list[str], training: Training, *, folder: Path) -> str | None:
    """Why the TrainJob that runs `command` failed, or None; it is removed, but a failed one stays for its logs as long as the step's pod.

    Raises:
        EnvironmentFault: this is no step on a cluster, the cluster refuses the TrainJob or answers no more, or the step is told to end.
    """
    if not NAMESPACE.is_file() or IMAGE not in os.environ:
        raise EnvironmentFault(f"training.nodes = {training.nodes}: only a step on a cluster can ask for more machines; set it to 1")
    name = f"cbd-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    made, jobs = train_job(name, command, training, image=os.environ[IMAGE]), _TrainJobs(NAMESPACE.read_text().strip())
    made["metadata"] |= _owned()
    why: str | None = None
    with _told_to_end():
        jobs.create(made)
        try:
            print(f"TrainJob {name} in namespace {jobs.namespace}: {training.nodes} nodes x {training.processes} processes", flush=True)
            why = _end(jobs, name, folder)
        finally:
            if why is None:
                jobs.delete(name)
    return why


def _owned() -> dict[str, Any]:
    """What has the cluster remove a TrainJob together with the pod of this step, whatever became of it."""
    name, uid = (os.environ.get(each) for each in POD)
    return {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]} if name and uid else {}


@contextlib.contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, a step that is told to end, because its run is cancelled, its time is over or its node goes, raises EnvironmentFault."""

    def end(*_: Any) -> None:
        raise EnvironmentFault("the step was told to end (SIGTERM); run it again, it goes on from the last whole epoch")

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(jobs: "_TrainJobs", name: str, folder: Path) -> str | None:
    """Waits for the end; why it failed, or None."""
    unanswered = 0
    while True:
        found = jobs.status(name)
        unanswered = 0 if found is not None else unanswered + 1
        if unanswered > PATIENCE:
            raise EnvironmentFault(f"TrainJob {name}: the API of Kubernetes answers no more; look at the cluster and run the step again")
        conditions = {each["type"]: each for each in (found or {}).get("conditions", ()) if each["status"] == "True"}
        if "Complete" in conditions:
            return None
        if failed := conditions.get("Failed"):
            return f"TrainJob {name} failed: {failed.get('message') or failed.get('reason')} (kubectl logs tells why)"
        time.sleep(POLL_SECONDS)


class _TrainJobs:
    """The TrainJobs of this namespace, by the API of Kubernetes."""

    def __init__(self, namespace: str) -> None:
        from kubernetes import client, config

        config.load_incluster_config()
        self.namespace = namespace
        self._api, self._refused = client.CustomObjectsApi(), client.ApiException
        self._where = {"group": GROUP, "version": VERSION, "namespace": namespace, "plural": PLURAL}

    def create(self, made: dict[str, Any]) -> None:
        """Makes it; one that is there already is this one, because its name is new, and an answer was lost."""
        for _ in range(PATIENCE):
            try:
                if self._asked(self._api.create_namespaced_custom_object, body=made) is not None:
                    return
            except self._refused as error:
                if error.status == 409:
                    return
                known = {403: "the account of the steps may not; apply k8s/trainer", 404: "there is no Kubeflow Trainer; install it"}
                why = known.get(error.status, error.reason)
                raise EnvironmentFault(f"TrainJob in namespace {self.namespace}: HTTP {error.status}: {why}") from None
            time.sleep(POLL_SECONDS)
        raise EnvironmentFault(f"TrainJob in namespace {self.namespace}: the API of Kubernetes answers no more; look at the cluster")

    def status(self, name: str) -> dict[str, Any] | None:
        """Its status; None if the API does not answer."""
        try:
            found = self._asked(self._api.get_namespaced_custom_object, name=name)
        except self._refused as error:
            raise EnvironmentFault(f"TrainJob {name}: HTTP {error.status}: {error.reason}; it was removed or may not be read") from None
        return None if found is None else found.get("status", {})

    def delete(self, name: str) -> None:
        """Removes it if the API does so when it is asked once: it goes with the step's pod anyway."""
        with contextlib.suppress(self._refused):
            self._asked(self._api.delete_namespaced_custom_object, name=name)

    def _asked(self, call: Callable[..., Any], **given: Any) -> dict[str, Any] | None:
        """The answer; None if there is none, or if it may be another one later."""
        from urllib3.exceptions import HTTPError

        try:
            answer: dict[str, Any] = call(**given, **self._where, _request_timeout=(ANSWER_SECONDS, ANSWER_SECONDS))
            return answer
        except HTTPError:
            return None
        except self._refused as error:
            if error.status == 429 or error.status >= 500:
                return None
            raise
