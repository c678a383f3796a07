"""What a cluster must know of each step: what it takes, how long it may run, where it runs, what it may read.

What a step takes stands in the pipeline itself, because it is the same everywhere. The rest comes from an overlay, one for each kind of
cluster; compiled, most of it is a second YAML document. The embedded runner looks at none of it.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from kfp import dsl
from kfp.dsl.structures import ResourceSpec

from cbd.config import NEEDS_GPU
from cbd.errors import ConfigError
from cbd.keys import ENVIRONMENT
from components.attestation import IMAGE as IMAGE_VARIABLE
from components.records import IMAGE

GPU_RESOURCE = "nvidia.com/gpu"
WORKSPACE = "/workspace"
"""Where the claim `cbd-workspace` lies in every step: records and artifacts of runs, log, registry, digests of checkpoints."""
SETTINGS = ("MLFLOW_TRACKING_URI",)
MORE_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
    "CBD_CHECKPOINTS",
    "CBD_LOG",
    "CBD_LOG_HEADS",
    "CBD_REGISTRY_GIT",
    "CBD_REGISTRY_REMOTE",
    "MLFLOW_EXPERIMENT_NAME",
)
"""Keys of the ConfigMap `cbd-settings`, each under the name of its variable; these may be missing."""
KEY, TRACKING, STORE = "cbd-signing-key", "cbd-tracking", "cbd-object-store"
"""Secrets: what signs, the user of the tracking server, that of the object store."""
SIGNING_KEY = "/var/run/cbd/signing/key.pem"
SECRETS = {
    TRACKING: ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    STORE: ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""Keys of these, each under the name of its variable. They may be missing: a workload identity needs none."""


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
    trains: bool = False
    """Then an overlay says how many GPUs."""


SMALL = Needs(("500m", "2"), ("2G", "4G"), 3600)
"""Steps that write records, commit and register."""
DATA = Needs(("2", "4"), ("8G", "16G"), 6 * 3600)
"""Steps that decode and validate."""
TRAINING = Needs(("4", "8"), ("16G", "32G"), 24 * 3600, gpus=1, trains=True)
"""Steps that train."""
MEASURING = replace(TRAINING, trains=False)
"""Steps that measure what was trained."""
RETRIES = {"num_retries": 3, "backoff_duration": "60s", "backoff_factor": 2.0, "backoff_max_duration": "168h"}
"""The longest duration counts from the start of the first try, waits for nodes included: after it Argo ends the one that runs."""


@dataclass(frozen=True)
class Overlay:
    """How one kind of cluster names its GPU nodes, and what keeps others off them."""

    pool_label: str
    """Of a node: the pool that it belongs to."""
    selector: dict[str, str]
    """Labels of the GPU nodes, where no pool is named."""
    taints: dict[str, str] = field(default_factory=dict)
    """Tolerated taints beside that of the GPU, with their values."""
    gpus: int = 1
    """Of each training step; none where it only waits for a TrainJob."""


OVERLAYS = {
    "gke": Overlay("cloud.google.com/gke-nodepool", {"cloud.google.com/gke-nodepool": "cbd-gpu"}, {"cloud.google.com/gke-spot": "true"}),
    "eks": Overlay("eks.amazonaws.com/nodegroup", {"eks.amazonaws.com/nodegroup": "cbd-gpu"}),
    "onprem": Overlay("nvidia.com/gpu.product", {"nvidia.com/gpu.present": "true"}),
}
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_CHOSEN: ContextVar[Overlay | None] = ContextVar("overlay", default=None)


def find_overlay(name: str) -> Overlay:
    """The overlay `KIND`, or `KIND:POOL` with that pool's nodes; raises ConfigError if there is none."""
    kind, colon, pool = name.partition(":")
    if kind not in OVERLAYS:
        raise ConfigError(f"--overlay {name!r}: expected one of {', '.join(OVERLAYS)}, or one with a pool of GPU nodes, such as gke:POOL")
    if not colon:
        return OVERLAYS[kind]
    if not LABEL_VALUE.fullmatch(pool):
        raise ConfigError(f"--overlay {name!r}: {pool!r} is no value that the label {OVERLAYS[kind].pool_label} can have; name a pool")
    return replace(OVERLAYS[kind], selector={OVERLAYS[kind].pool_label: pool})


@contextlib.contextmanager
def chosen(overlay: Overlay | None) -> Iterator[None]:
    """Inside, pipelines are built for this kind of cluster."""
    before = _CHOSEN.set(overlay)
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def place(task: dsl.PipelineTask, needs: Needs, *secrets: str) -> dsl.PipelineTask:
    """The task, which gets what it needs and these secrets, no others; nothing is cached.

    Resources are set as one: each of KFP's setters reads the source of the whole call stack for its error message, 30 ms a call.
    """
    task.set_caching_options(False)
    overlay = _CHOSEN.get()
    gpus = overlay.gpus if overlay and needs.trains else needs.gpus
    gpu = (GPU_RESOURCE, str(gpus)) if gpus else (None, None)
    task.container_spec.resources = ResourceSpec(*needs.cpu, *needs.memory, *gpu)
    if overlay:
        _on_cluster(task, needs, secrets)
        if gpus:
            _on_gpu_nodes(task, overlay)
    return task


def retried(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """The task, which a cluster starts again after a fault: only for steps that may run twice without a trace.

    The embedded runner would do so as well, minutes later; there a fault is told at once.
    """
    return task.set_retry(**RETRIES) if _CHOSEN.get() else task


def _on_cluster(task: dsl.PipelineTask, needs: Needs, secrets: Sequence[str]) -> None:
    from kfp import kubernetes

    task.container_spec.env = {IMAGE_VARIABLE: IMAGE} | ({ENVIRONMENT: SIGNING_KEY} if KEY in secrets else {})
    kubernetes.set_timeout(task, needs.timeout_seconds)
    kubernetes.set_security_context(task, run_as_non_root=True)
    kubernetes.mount_pvc(task, "cbd-workspace", WORKSPACE)
    if KEY in secrets:
        kubernetes.use_secret_as_volume(task, KEY, SIGNING_KEY.rpartition("/")[0])
    kubernetes.use_config_map_as_env(task, "cbd-settings", {name: name for name in SETTINGS})
    kubernetes.use_config_map_as_env(task, "cbd-settings", {name: name for name in MORE_SETTINGS}, optional=True)
    for secret in sorted(SECRETS.keys() & secrets):
        kubernetes.use_secret_as_env(task, secret, {name: name for name in SECRETS[secret]}, optional=True)


def _on_gpu_nodes(task: dsl.PipelineTask, overlay: Overlay) -> None:
    from kfp import kubernetes

    task.container_spec.env |= {NEEDS_GPU: "1"}
    for label, value in overlay.selector.items():
        kubernetes.add_node_selector(task, label, value)
    kubernetes.add_toleration(task, GPU_RESOURCE, operator="Exists", effect="NoSchedule")
    for taint, value in overlay.taints.items():
        kubernetes.add_toleration(task, taint, operator="Equal", value=value, effect="NoSchedule")
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit="8Gi")
