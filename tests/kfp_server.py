"""A real HTTP server that speaks as much of the KFP API v2beta1 as our client calls, in the terms of the client package's own models.

It refuses what the models do not know, keeps what it is given, and fails when a test tells it to.
"""

import json
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

NEVER = "1970-01-01T00:00:00Z"
PREFIX = "/apis/v2beta1/"


@dataclass
class Fault:
    """What the server answers instead."""

    method: str
    path: str
    """Where it begins."""
    status: int
    times: int = 1
    too_late: bool = False
    """Do as asked first, then fail."""
    silent_seconds: float = 0.0
    """Before it answers."""
    retry_after: str | None = None
    """Header that tells when to ask again, in seconds."""
    body: bytes = b'{"error": "told to fail", "code": 14, "message": "told to fail"}'
    content_type: str = "application/json"


@dataclass
class Server:
    """What the server holds, was asked and is to do."""

    address: str = ""
    token: str | None = None
    multi_user: bool = False
    experiments: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    recurring: list[dict[str, Any]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    filters: bool = True
    """Whether it heeds the filter of a list call; else it lists all."""
    states: list[str] = field(default_factory=lambda: ["PENDING", "RUNNING", "SUCCEEDED"])
    """Of each run, one at every look; the last one stays."""

    def fault(self, method: str, path: str) -> Fault | None:
        """The next fault for this call, used up."""
        for fault in self.faults:
            if fault.times and fault.method == method and path.startswith(PREFIX + fault.path):
                fault.times -= 1
                return fault
        return None


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""
    held = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

        def answer(self) -> None:
            url = urlsplit(self.path)
            held.asked.append(f"{self.command} {url.path.removeprefix(PREFIX)}")
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            fault = held.fault(self.command, url.path)
            if fault:
                time.sleep(fault.silent_seconds)
            if held.token and self.headers.get("authorization") != f"Bearer {held.token}":
                self.send(401, {"message": "unauthenticated"})
            elif fault and not fault.too_late:
                self.send_bytes(fault.status, fault.body, fault.content_type, fault.retry_after)
            else:
                status, told = handle(held, self.command, url.path.removeprefix(PREFIX), body, query)
                if fault:
                    self.send_bytes(fault.status, fault.body, fault.content_type)
                else:
                    self.send(status, told)

        do_GET = do_POST = do_DELETE = answer

        def send(self, status: int, told: dict[str, Any]) -> None:
            self.send_bytes(status, json.dumps(told).encode(), "application/json")

        def send_bytes(self, status: int, body: bytes, content_type: str, retry_after: str | None = None) -> None:
            self.send_response(status)
            if retry_after:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    held.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()


def handle(held: Server, method: str, path: str, body: dict[str, Any], query: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Status and answer of one call."""
    if path == "healthz":
        return 200, {"multi_user": held.multi_user}
    kind, _, rest = path.partition("/")
    identity, _, verb = rest.partition(":")
    kinds: dict[str, tuple[list[dict[str, Any]], str, type]] = {
        "experiments": (held.experiments, "experiment_id", api.V2beta1Experiment),
        "runs": (held.runs, "run_id", api.V2beta1Run),
        "recurringruns": (held.recurring, "recurring_run_id", api.V2beta1RecurringRun),
    }
    if kind not in kinds:
        return 404, {"message": "Not Found"}
    things, key, model = kinds[kind]
    if method == "POST" and not rest:
        return create(things, key, model, body)
    if method == "GET" and not rest:
        return 200, listed(
            things, {"experiments": "experiments", "runs": "runs", "recurringruns": "recurringRuns"}[kind], query, filters=held.filters
        )
    found = next((thing for thing in things if thing[key] == identity), None)
    if found is None:
        return 404, {"message": f"{kind} {identity} not found"}
    if method == "DELETE":
        things.remove(found)
        return 200, {}
    if verb in ("enable", "disable"):
        found["mode"] = verb.upper()
        return 200, {}
    return 200, moved_on(held, found)


def create(things: list[dict[str, Any]], key: str, model: Any, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A new thing, if the client's model and KFP's own definition of a pipeline know all that is said of it."""
    if unknown := set(body) - set(model.attribute_map.values()):
        return 400, {"message": f"unknown fields {sorted(unknown)}"}
    spec = body.get("pipeline_spec")
    if spec is not None:
        parts = {"pipeline_spec": pipeline_spec_pb2.PipelineSpec, "platform_spec": pipeline_spec_pb2.PlatformSpec}
        for name, value in (spec if "pipeline_spec" in spec else {"pipeline_spec": spec}).items():
            json_format.ParseDict(value, parts[name]())
    made = {**body, key: str(uuid.uuid4()), "created_at": "2026-11-28T00:00:00Z"}
    if key == "run_id":
        made |= {"state": "PENDING", "finished_at": NEVER, "looked": 0}
    things.append(made)
    return 200, shown(made)


def listed(things: list[dict[str, Any]], name: str, query: dict[str, str], *, filters: bool) -> dict[str, Any]:
    """One page, filtered as asked; pages hold two things, so that there are several."""
    wanted = [thing for thing in things if query.get("experiment_id") in (None, thing.get("experiment_id"))]
    for predicate in json.loads(query.get("filter") or "{}").get("predicates", []) if filters else ():
        assert predicate["operation"] in (1, "EQUALS") and predicate["key"] == "display_name"
        wanted = [thing for thing in wanted if thing["display_name"] == predicate.get("string_value", predicate.get("stringValue"))]
    start = int(query.get("page_token") or 0)
    token = str(start + 2) if start + 2 < len(wanted) else ""
    return {name: [shown(thing) for thing in wanted[start : start + 2]], "next_page_token": token}


def moved_on(held: Server, run: dict[str, Any]) -> dict[str, Any]:
    """A run one look later."""
    if "looked" in run:
        run["state"] = held.states[min(run["looked"], len(held.states) - 1)]
        run["looked"] += 1
        if run["looked"] >= len(held.states):
            run["finished_at"] = "2026-11-28T01:00:00Z"
        run["run_details"] = {"task_details": [{"task_id": "1", "display_name": "ingest-step", "state": run["state"]}]}
    return shown(run)


def shown(thing: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in thing.items() if name != "looked"}
