"""Decoding on a Ray cluster: each task hands its images to a worker process with limits, on the machine where it runs.

Ray places the tasks, carries the bytes and repeats what was lost with a machine. What a delivery becomes does not depend on where its
images were decoded. Every machine of the cluster needs this package.
"""

import functools
import os
import socket
from collections.abc import Callable
from typing import Any

from cbd.config import Ingest
from cbd.errors import EnvironmentFault
from components.decoders import Asked, Outcome, schedule_here
from components.parallel import Pending

CLUSTER = "CBD_RAY_ADDRESS"
_MEND = "start it, set RAY_AUTH_MODE=token if it asks for a token, or unset the address to decode here"
LOCAL = "local"
"""An address: a cluster of this machine alone, started for this process."""
Schedule = Callable[[Asked, str, Ingest], Pending[list[Outcome]]]


@functools.cache
def schedule_on(address: str) -> tuple[Schedule, int]:
    """What starts decoding on the cluster at `address`, and how many images' worth of processors it has.

    Args:
        address: `host:port` of a running cluster, `auto` for the one that this machine is part of, or `local`.

    Raises:
        EnvironmentFault: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise EnvironmentFault(f"{CLUSTER}={address}: Ray is not installed; install the extra `ray`, or unset it to decode here") from None
    try:
        if not ray.is_initialized():
            _look_for(address)
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())[:160]
        raise EnvironmentFault(f"{CLUSTER}={address}: no Ray cluster answers: {text}; {_MEND}") from None
    decode = ray.remote(num_cpus=1)(_decode)

    def schedule(asked: Asked, source: str, limits: Ingest) -> Pending[list[Outcome]]:
        return _Task(decode.remote(asked, source, limits), address)

    return schedule, max(1, int(ray.cluster_resources().get("CPU", 1)))


def _look_for(address: str) -> None:
    """Raises OSError or ValueError if nothing listens there; Ray itself would go on trying for minutes."""
    if address not in (LOCAL, "auto"):
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


class _Task:
    """What Ray was asked for."""

    def __init__(self, reference: Any, address: str) -> None:
        self.reference, self.address = reference, address

    def result(self) -> list[Outcome]:
        """The outcome of every image.

        Raises:
            EnvironmentFault: the cluster lost it more often than it tries, or is out of reach.
        """
        import ray

        try:
            outcomes: list[Outcome] = ray.get(self.reference)
        except ray.exceptions.RayError as error:
            text = " ".join(str(error).split())[:160]
            raise EnvironmentFault(
                f"{CLUSTER}={self.address}: the Ray cluster failed: {text}; mend it, or unset it to decode here"
            ) from None
        return outcomes

    def cancel(self) -> object:
        """Stops it."""
        import ray

        return ray.cancel(self.reference)


def _decode(asked: Asked, source: str, limits: Ingest) -> list[Outcome]:
    """On a machine of the cluster."""
    return schedule_here(asked, source, limits, workers=1).result()
