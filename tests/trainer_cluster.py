"""A server that speaks the part of the API of Kubernetes that a training step uses, with a controller that really runs the TrainJobs.

It does what Kubeflow Trainer does: `numNodes` times the command, with the variables PET_* by which torchrun finds the others.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

TOKEN = "t0ken"
PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/cbd/trainjobs"


class Cluster:
    """What was asked of it, and what it answers."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.removed: list[str] = []
        self.unavailable, self.busy = 0, 503
        """So many looks are answered with this code."""
        self.broken: list[str] = []
        """Methods of the next calls that are done but not answered: the connection breaks."""
        self.refusal: int | None = None
        """Code with which creating is answered."""
        self._nodes: list[subprocess.Popen[bytes]] = []

    def create(self, made: dict[str, Any]) -> None:
        self.made.append(made)
        trainer = made["spec"]["trainer"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch = {"PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"], "PET_MASTER_PORT": port}
        for rank in range(trainer["numNodes"]):
            variables = {name: str(value) for name, value in torch.items()} | {"PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1"}
            place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            self._nodes.append(subprocess.Popen(trainer["command"], env=os.environ | variables | {"PATH": place}))

    def status(self) -> dict[str, Any]:
        codes = [node.poll() for node in self._nodes]
        if any(codes):
            return {"conditions": [{"type": "Failed", "status": "True", "reason": "JobsFailed", "message": "jobset failed"}]}
        if codes and all(code == 0 for code in codes):
            return {"conditions": [{"type": "Suspended", "status": "False"}, {"type": "Complete", "status": "True"}]}
        return {}

    def end(self) -> None:
        for node in self._nodes:
            node.kill()
            node.wait()


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self, code: int, value: dict[str, Any]) -> None:
            if self.command in cluster.broken:
                cluster.broken.remove(self.command)
                self.close_connection = True
                return
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _known(self, *, name: bool) -> bool:
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self._answer(401, {"kind": "Status", "reason": "Unauthorized"})
            elif (self.path.rpartition("/")[0] if name else self.path) != PATH:
                self._answer(404, {"kind": "Status", "reason": "NotFound"})
            else:
                return True
            return False

        def do_POST(self) -> None:
            made = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._known(name=False):
                if made["metadata"]["name"] in [job["metadata"]["name"] for job in cluster.made]:
                    return self._answer(409, {"kind": "Status", "reason": "AlreadyExists"})
                if cluster.refusal is None:
                    cluster.create(made)
                self._answer(cluster.refusal or 201, made)

        def do_GET(self) -> None:
            if self._known(name=True):
                cluster.unavailable -= 1
                found = {"metadata": {"name": self.path.rpartition("/")[2]}, "status": cluster.status()}
                self._answer(cluster.busy if cluster.unavailable >= 0 else 200, found)

        def do_DELETE(self) -> None:
            if self._known(name=True):
                cluster.removed.append(self.path.rpartition("/")[2])
                self._answer(200, {"kind": "Status", "status": "Success"})

        def log_message(self, *about: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """The cluster, and a kubeconfig for it in `folder`."""
    cluster = Cluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(cluster))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = {
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield cluster, folder / "kubeconfig"
    finally:
        cluster.end()
        server.shutdown()
        server.server_close()
