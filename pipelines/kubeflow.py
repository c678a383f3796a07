"""The Kubeflow Pipelines server: found, asked with patience, and its refusals told in one line.

kfp's own client tries a refused log-in five times over 25 s, waits for ever for a run that was cancelled or an answer that does not come,
and takes the log-in page of a proxy for an empty answer. Here a call is repeated only where that can help, and nothing is created twice.
"""

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cbd.errors import CbdError, ConfigError, EnvironmentFault
from pipelines.progress import printable

if TYPE_CHECKING:
    from kfp import Client

ENDPOINT = "KF_PIPELINES_ENDPOINT"
UI_ENDPOINT = "KF_PIPELINES_UI_ENDPOINT"
IN_CLUSTER = "http://ml-pipeline.kubeflow:8888"
"""Where Kubeflow Pipelines is for the pods of its cluster."""
TOKEN = "CBD_KFP_TOKEN"
"""Variable with the bearer token; an option would show it in the list of processes."""
EXPERIMENT = "cbd"
PAUSES: tuple[float, ...] = (1, 2, 4, 8, 16)
"""Seconds between attempts while the server is out of reach or busy."""
ANSWER_SECONDS = 20.0
"""So long a connection, and then an answer, is waited for; an answer to something that is made six times as long."""
BUSY = (409, 429, 502, 503, 504)
"""Codes after which the same call may be answered otherwise; 409: another made the same thing at the same moment, and now it is found."""
PAGE = 100
"""Things on a page of a list."""
Answer = TypeVar("Answer")


def connect(namespace: str = "") -> "Client":
    """A client of the server at KF_PIPELINES_ENDPOINT, or of the one in the cluster around this pod, after it has shown what it is.

    Raises:
        ConfigError: no server is named, it does not accept the credentials, or it serves several users and no namespace is named.
        EnvironmentFault: it does not answer, or is no KFP server with the API v2beta1.
    """
    host = _address()
    if not host:
        raise ConfigError(f"{ENDPOINT} is not set: expected the address of a Kubeflow Pipelines server, such as http://127.0.0.1:8888")
    import kfp

    class Client(kfp.Client):  # type: ignore[misc]
        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            _guard(self._healthz_api.api_client)  # one for all calls, of which this is the first
            return self._healthz_api.healthz_service_get_healthz()

    def opened() -> "Client":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            about = {"existing_token": os.environ.get(TOKEN), "ssl_ca_cert": os.environ.get("SSL_CERT_FILE")}
            return Client(host, namespace=namespace, credentials=_mounted_token(), **about)

    try:
        client = asked(opened)
        health = asked(client.get_kfp_healthz)
    except Missing as error:
        raise EnvironmentFault(f"{error}; cbd needs v2beta1, Kubeflow Pipelines 2") from None
    if health.multi_user and not client.get_user_namespace():
        raise ConfigError(f"{host}: serves several users, each in a namespace; name yours with --namespace")
    return client


def _guard(api: Any) -> None:
    """Has every call of the client's API end in time, be sent once, and refuse a page in place of an answer."""
    from kfp_server_api import ApiClient
    from urllib3.util import Retry

    class Guarded(ApiClient):  # type: ignore[misc]
        def call_api(self, resource_path: str, method: str, *given: Any, **about: Any) -> Any:
            about["_request_timeout"] = (ANSWER_SECONDS, ANSWER_SECONDS * (6 if method == "POST" else 1))
            return super().call_api(resource_path, method, *given, **about)

        def deserialize(self, response: Any, response_type: Any) -> Any:
            if "json" not in response.urllib3_response.headers.get("Content-Type", ""):
                raise EnvironmentFault(
                    f"{_address()}: answers with a page and not as a Kubeflow Pipelines server, perhaps with one to log in; "
                    f"put a token into {TOKEN}, or name the API's own address in {ENDPOINT}"
                )
            return super().deserialize(response, response_type)

    api.__class__ = Guarded  # kfp makes it itself
    api.rest_client.pool_manager.connection_pool_kw["retries"] = Retry(connect=0, read=0, respect_retry_after_header=False)


def _address() -> str:
    """Where the server is; empty if nothing says it."""
    return os.environ.get(ENDPOINT) or (IN_CLUSTER if "KUBERNETES_SERVICE_HOST" in os.environ else "")


def _mounted_token() -> Any | None:
    """What reads the token that a cluster has put into this pod for Kubeflow Pipelines, anew at each call; None where there is none."""
    from kfp import client

    path = os.environ.get(client.KF_PIPELINES_SA_TOKEN_ENV, client.KF_PIPELINES_SA_TOKEN_PATH)
    return client.ServiceAccountTokenVolumeCredentials(path) if Path(path).is_file() else None


def asked(call: Callable[[], Answer], *, patience: int = 1) -> Answer:
    """What the call returns; while the server is out of reach or busy it is asked again, `patience` times as often as `PAUSES` says.

    Raises:
        ConfigError, EnvironmentFault: the server refuses, or stays out of reach.
    """
    for pause in PAUSES * patience:
        with contextlib.suppress(_Passing):
            return _once(call)
        time.sleep(pause)
    try:
        return _once(call)
    except _Passing as error:
        raise EnvironmentFault(str(error)) from None


def created(make: Callable[[], Answer], find: Callable[[], Answer | None]) -> Answer:
    """What `make` returns, or what `find` finds of it after an attempt whose answer was lost: a server may create and then fail to say so.

    Raises:
        ConfigError, EnvironmentFault: the server refuses, or stays out of reach.
    """
    for pause in (*PAUSES, None):
        try:
            return _once(make)
        except _Passing as error:
            if pause is None:
                raise EnvironmentFault(str(error)) from None
            time.sleep(pause)
        if (found := asked(find)) is not None:
            return found
    raise ValueError("PAUSES is empty")


def listed(ask: Callable[..., Any], things: str, **about: Any) -> Iterator[Any]:
    """All `things` that a list call of the client gives, page by page; raises what `asked` does."""
    token = ""
    while True:
        page = asked(lambda token=token: ask(page_token=token, page_size=PAGE, **about))  # type: ignore[misc]
        yield from getattr(page, things) or ()
        if not (token := page.next_page_token):
            return


def named(name: str) -> str:
    """The filter of list calls for what has this display name."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def experiment_of(client: "Client", namespace: str) -> str:
    """The id of the experiment in which all runs are, made if there is none."""
    with contextlib.redirect_stdout(None):
        made = asked(lambda: client.create_experiment(EXPERIMENT, namespace=namespace or None))
    if not made.experiment_id:
        raise EnvironmentFault("the server gave its experiment no id; is it a Kubeflow Pipelines server of version 2?")
    return str(made.experiment_id)


def link_to(run_id: str) -> str:
    """The page of a run in the server's user interface."""
    return f"{(os.environ.get(UI_ENDPOINT) or _address()).rstrip('/')}/#/runs/details/{run_id}"


class Missing(EnvironmentFault):
    """The server does not have what it is asked for: it was deleted, or the server is of another kind."""


class _Passing(Exception):
    """A fault that may pass."""


def _once(call: Callable[[], Answer]) -> Answer:
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call()
    except ApiException as error:
        if error.status in BUSY:
            raise _Passing(f"the server is busy or starting ({error.status}: {_said(error.body)}); try again later") from None
        raise _refusal(error.status or 0, _said(error.body or error.reason)) from None
    except HTTPError as error:
        raise _Passing(f"the server does not answer ({type(error).__name__}); is {ENDPOINT} right, and does it run?") from None


def _refusal(status: int, said: str) -> CbdError:
    if status == 401:
        return ConfigError(f"the server does not accept the credentials (401); put a fresh token into {TOKEN}")
    if status == 403:
        return ConfigError(f"the server does not allow it (403: {said}); is --namespace yours, and may its account do this?")
    if status in (404, 501):
        return Missing(f"the server does not know what it is asked for ({status}: {said})")
    if status == 400:
        return ConfigError(f"the server refuses what it is given (400: {said}); one older than kfp 2.17 may not know all of it")
    return EnvironmentFault(f"the server failed, or its answer cannot be understood ({status}: {said}); look at its log")


def _said(body: Any) -> str:
    """The server's own words, cut short, as text that can hide nothing."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "no reason given")
    with contextlib.suppress(ValueError):
        answer = json.loads(text)
        if isinstance(answer, dict):
            text = str(answer.get("message") or answer.get("error") or text)
    return printable(" ".join(text.split())[:200])
