"""What a cluster must know of each step: what it takes, how long it may run, where it runs, what it may read.

What a step takes stands in the pipeline itself, because it is the same everywhere. The rest comes from an overlay, one for each kind of
cluster; compiled, most of it is a second YAML document. The embedded runner looks at none of it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from kfp import dsl

from cbd.keys import ENVIRONMENT
from components.attestation import IMAGE as IMAGE_VARIABLE
from components.records import IMAGE

GPU_RESOURCE = "nvidia.com/gpu"
WORKSPACE = "/workspace"
"""Where the claim `cbd-workspace` lies in every step: records, log, registry and checkpoints, so that a lost node costs an epoch."""
SIGNING_KEY = "/var/run/cbd/signing/key.pem"
SETTINGS = ("MLFLOW_TRACKING_URI",)
MORE_SETTINGS = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "CBD_REGISTRY_GIT", "CBD_REGISTRY_REMOTE", "MLFLOW_EXPERIMENT_NAME")
"""Keys of the ConfigMap `cbd-settings`, each under the name of its variable; these may be missing."""
SECRETS = {
    "cbd-tracking": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "cbd-object-store": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""Secrets and their keys, each under the name of its variable. They may be missing: a workload identity needs none."""


@dataclass(frozen=True)
class Needs:
    """What a step takes on a cluster."""

    cpu: tuple[str, str]
    """Request and limit, in Kubernetes' units."""
    memory: tuple[str, str]
    """Request and limit, in Kubernetes' units."""
    timeout_seconds: int
    """After so long the step is ended and counts as failed."""
    gpus: int = 0
    """As long as an overlay does not say otherwise of a training step."""


SMALL = Needs(("500m", "2"), ("2G", "4G"), 3600)
"""Steps that write records, commit and register."""
DATA = Needs(("2", "4"), ("8G", "16G"), 6 * 3600)
"""Steps that decode and validate."""
TRAINING = Needs(("4", "8"), ("16G", "32G"), 24 * 3600, gpus=1)
"""Steps that train."""
MEASURING = Needs(TRAINING.cpu, TRAINING.memory, TRAINING.timeout_seconds, gpus=1)
"""Steps that measure what was trained."""
RETRIES = {"num_retries": 3, "backoff_duration": "60s", "backoff_factor": 2.0, "backoff_max_duration": "900s"}


@dataclass(frozen=True)
class Overlay:
    """How one kind of cluster names its GPU nodes, and what keeps others off them."""

    selector: dict[str, str]
    taints: dict[str, str] = field(default_factory=dict)
    """Tolerated taints beside that of the GPU, with their values."""
    gpus: int = 1
    """Of each training step."""


OVERLAYS = {
    "gke": Overlay({"cloud.google.com/gke-nodepool": "cbd-gpu"}, {"cloud.google.com/gke-spot": "true"}),
    "eks": Overlay({"eks.amazonaws.com/nodegroup": "cbd-gpu"}),
    "onprem": Overlay({"nvidia.com/gpu.present": "true"}),
}
_CHOSEN: ContextVar[Overlay | None] = ContextVar("overlay", default=None)


@contextlib.contextmanager
def chosen(overlay: Overlay | None) -> Iterator[None]:
    """Inside, pipelines are built for this kind of cluster."""
    before = _CHOSEN.set(overlay)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def place(task: dsl.PipelineTask, needs: Needs) -> dsl.PipelineTask:
    """The task, which gets what it needs; nothing is cached."""
    task.set_caching_options(False)
    task.set_cpu_request(needs.cpu[0]).set_cpu_limit(needs.cpu[1])
    task.set_memory_request(needs.memory[0]).set_memory_limit(needs.memory[1])
    overlay = _CHOSEN.get()
    if needs.gpus:
        gpus = overlay.gpus if overlay and needs is TRAINING else needs.gpus
        task.set_accelerator_type(GPU_RESOURCE).set_accelerator_limit(gpus)
    if overlay:
        _on_cluster(task, needs)
        if needs.gpus:
            _on_gpu_nodes(task, overlay)
    return task


def retried(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """The task, which a cluster starts again after a fault: only for steps that may run twice without a trace.

    The embedded runner would do so as well, minutes later; there a fault is told at once.
    """
    return task.set_retry(**RETRIES) if _CHOSEN.get() else task


def _on_cluster(task: dsl.PipelineTask, needs: Needs) -> None:
    from kfp import kubernetes

    task.set_env_variable(IMAGE_VARIABLE, IMAGE).set_env_variable(ENVIRONMENT, SIGNING_KEY)
    kubernetes.set_timeout(task, needs.timeout_seconds)
    kubernetes.set_security_context(task, run_as_non_root=True)
    kubernetes.mount_pvc(task, "cbd-workspace", WORKSPACE)
    kubernetes.use_secret_as_volume(task, "cbd-signing-key", SIGNING_KEY.rpartition("/")[0])
    kubernetes.use_config_map_as_env(task, "cbd-settings", {name: name for name in SETTINGS})
    kubernetes.use_config_map_as_env(task, "cbd-settings", {name: name for name in MORE_SETTINGS}, optional=True)
    for secret, names in SECRETS.items():
        kubernetes.use_secret_as_env(task, secret, {name: name for name in names}, optional=True)


def _on_gpu_nodes(task: dsl.PipelineTask, overlay: Overlay) -> None:
    from kfp import kubernetes

    for label, value in overlay.selector.items():
        kubernetes.add_node_selector(task, label, value)
    kubernetes.add_toleration(task, GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    for taint, value in overlay.taints.items():
        kubernetes.add_toleration(task, taint, operator="Equal", value=value, effect="NoSchedule")
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit="8Gi")
