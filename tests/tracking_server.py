"""MLflow as `k8s/base/tracking` has it: the Deployment's command and settings, and what its CronJobs run, on a real PostgreSQL and S3."""

import base64
import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parent.parent / "k8s" / "base" / "tracking"
ADMIN = ("admin", "a-password-of-the-admin")
RUNS = ("cbd-runs", "a-password-of-the-runs")


class TrackingServer:
    """One server process, which can be killed and started again; its database is emptied at first."""

    def __init__(self, folder: Path, *, database: str, endpoint: str, python: Path) -> None:
        """`database` is PostgreSQL's URL, `endpoint` that of an S3 server, `python` that of the server's packages."""
        import boto3

        self._folder, self._python, self._process = folder, python, None
        self._pg = urllib.parse.urlsplit(database)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store, self.bucket = boto3.session.Session().client("s3", endpoint_url=endpoint), f"cbd-{os.getpid()}-{time.time_ns()}"
        self.store.create_bucket(Bucket=self.bucket)
        settings = {
            **_literals("mlflow"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{self.bucket}/artifacts",
            "MLFLOW_S3_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT_URL": endpoint,
            "BACKUP_BUCKET": self.bucket,
        }
        settings["MLFLOW_SERVER_ALLOWED_HOSTS"] += f",127.0.0.1:{self.port}"
        self._settings = settings
        self.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")

    def start(self) -> None:
        """Starts it and waits until it answers."""
        (container,) = _pod(_object("mlflow.yaml", "Deployment", "mlflow")["spec"]["template"])
        changed = {"--host=0.0.0.0": "--host=127.0.0.1", "--port=5000": f"--port={self.port}", "--workers=2": "--workers=1"}
        assert set(changed) <= set(container["args"])
        command = [str(self._python.parent / "mlflow"), *(changed.get(each, each) for each in container["args"])]
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, env=self._environment(container), stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + 300
        while not self._healthy():
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError((self._folder / "server.log").read_text()[-2000:])
            time.sleep(0.2)

    def kill(self) -> None:
        """Ends the server and its workers, as a lost node would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def job(self, name: str, **settings: str) -> list[str]:
        """What each container of a CronJob prints, run one after another as its pod does."""
        job = _object("backup.yaml", "CronJob", name)
        printed = []
        for container in _pod(job["spec"]["jobTemplate"]["spec"]["template"]):
            command = [part.replace("/dump/", f"{self._folder}/").replace("/scripts/", f"{MANIFESTS}/") for part in container["command"]]
            if command[0] == "python":
                command[0] = str(self._python)
            environment = {**self._environment(container), **settings}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            printed.append(done.stdout.strip())
        return printed

    def run_in_pod(self, code: str, told: str) -> None:
        """Runs Python code in the server's environment, as `kubectl exec` would, with `told` on its standard input."""
        (container,) = _pod(_object("mlflow.yaml", "Deployment", "mlflow")["spec"]["template"])
        code = code.replace("http://localhost:5000", self.uri)
        subprocess.run([str(self._python), "-c", code], env=self._environment(container), input=told, text=True, check=True)

    def sql(self, *commands: str) -> list[str]:
        """The rows that the last of these prints, columns parted by `|`."""
        arguments = [argument for command in commands for argument in ("--command", command)]
        psql = ["psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1", *arguments]
        done = subprocess.run(psql, env=self._postgres(), check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    def status(self, path: str, *, user: tuple[str, str] | None = None, host: str = "") -> int:
        """The HTTP status of a GET."""
        request = urllib.request.Request(self.uri + path)
        if user:
            request.add_header("Authorization", "Basic " + base64.b64encode(":".join(user).encode()).decode())
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def objects(self) -> list[str]:
        """The keys in the bucket."""
        pages = self.store.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def _healthy(self) -> bool:
        try:
            return self.status("/health") == 200
        except (OSError, http.client.HTTPException):
            return False

    def _postgres(self) -> dict[str, str]:
        found = {"PGHOST": self._pg.hostname, "PGPORT": str(self._pg.port), "PGUSER": self._pg.username, "PGPASSWORD": self._pg.password}
        return {**os.environ, **{name: str(value) for name, value in found.items()}, "PGDATABASE": self._pg.path.strip("/")}

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        """What the container would see, with our secrets in their places."""
        secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1], "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32}
        told = {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
        told |= {"MLFLOW_AUTH_CONFIG_PATH": str(MANIFESTS / "basic_auth.ini")}
        asked = {each["name"] for each in container.get("env", []) if "valueFrom" in each} - {"PGPASSWORD"}
        mapped = self._settings if any("configMapRef" in each for each in container.get("envFrom", [])) else {}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        return {**inherited, **mapped, **told, **{name: secrets[name] for name in asked}, **_only_pg(self._postgres())}


def _only_pg(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("PG")}


def _object(file: str, kind: str, name: str) -> dict[str, Any]:
    found = yaml.safe_load_all((MANIFESTS / file).read_text())
    return next(each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name))


def _pod(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def _literals(name: str) -> dict[str, str]:
    maps = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["configMapGenerator"]
    (found,) = [each["literals"] for each in maps if each["name"] == name]
    return dict(literal.split("=", 1) for literal in found)
