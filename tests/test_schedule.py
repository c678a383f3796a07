"""Recurring runs on a Kubeflow Pipelines server: applied again, replaced, paused, deleted; and no run is ended by accident."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import cbd
from kfp_server import Fault, Server

from cbd.errors import ConfigError
from pipelines import schedule
from pipelines.launch import Order
from pipelines.options import load
from pipelines.submit import Cluster

pytestmark = pytest.mark.slow

IMAGE = "registry.example/cbd@sha256:" + "0123456789abcdef" * 4
ORDER = Order("s3://bucket/delivery", "s3://bucket/trusted", Path("/workspace"))
GIVEN = ("--data", ORDER.data, "--trusted", ORDER.trusted, "--image", IMAGE, "--overlay", "onprem")


def apply(*, name: str = "model", image: str = IMAGE, **when: str) -> dict[str, Any]:
    order = Order(ORDER.data, ORDER.trusted, ORDER.workspace, name=name)
    return schedule.schedule(order, load(params_path=None, preset=None), Cluster(image, "onprem"), **(when or {"every": "12h"}))


def run_of(server: Server, state: str | None) -> None:
    """A run that the server's first schedule has started, behind three others that are going on."""
    made = {"run_id": "r1", "display_name": "Run of retrain-model", "state": state, "created_at": "2026-11-28T00:00:00Z"}
    known = {name: server.recurring[0][name] for name in ("recurring_run_id", "experiment_id")}
    others = [made | known | {"run_id": f"other-{number}", "recurring_run_id": None, "state": "RUNNING"} for number in range(3)]
    server.runs += [*others, made | known]


def test_a_schedule_runs_one_at_a_time_and_makes_up_for_nothing(server: Server) -> None:
    assert apply(cron="0 3 * * 1") == {"name": "retrain-model", "change": "created", "when": "0 3 * * 1", "paused": False}
    (made,) = server.recurring
    assert (made["max_concurrency"], made["no_catchup"], made["mode"]) == (1, True, "ENABLE")
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    executors = made["pipeline_spec"]["pipeline_spec"]["deploymentSpec"]["executors"].values()
    assert {executor["container"]["image"] for executor in executors} == {IMAGE}


def test_each_of_its_runs_gets_an_id_and_a_folder_of_its_own(server: Server) -> None:
    apply()
    given = server.recurring[0]["runtime_config"]["parameters"]
    assert given["run_id"] == "retrain-model-[[ScheduledTime]]"
    assert given["records"] == "/workspace/runs/retrain-model-[[ScheduledTime]]/records"


@pytest.mark.parametrize(("every", "seconds"), [("90m", 5400), ("12h", 43200), ("7d", 604800)])
def test_an_interval_is_told_in_seconds(server: Server, every: str, seconds: int) -> None:
    apply(every=every)
    assert server.recurring[0]["trigger"] == {"periodic_schedule": {"interval_second": seconds}}


def test_applied_again_nothing_changes(server: Server) -> None:
    apply()
    before = json.dumps(server.recurring)
    assert apply()["change"] == "unchanged"
    assert json.dumps(server.recurring) == before and server.asked.count("POST recurringruns") == 1


@pytest.mark.parametrize("change", [{"every": "6h"}, {"cron": "0 3 * * *"}, {"every": "12h", "image": IMAGE.replace("0123", "3210")}])
def test_what_changed_takes_the_place_of_what_was(server: Server, change: dict[str, str]) -> None:
    apply()
    first = server.recurring[0]["recurring_run_id"]
    assert apply(**change)["change"] == "replaced"
    (left,) = server.recurring
    assert left["recurring_run_id"] != first and left["mode"] == "ENABLE"


def test_a_paused_schedule_stays_paused_whatever_is_applied(server: Server) -> None:
    apply()
    schedule.pause("retrain-model", paused=True)
    assert apply()["paused"] and apply(every="6h")["paused"]
    assert [made["mode"] for made in server.recurring] == ["DISABLE"]
    schedule.pause("retrain-model", paused=False)
    assert [made["mode"] for made in server.recurring] == ["ENABLE"]


def test_schedules_of_two_models_leave_each_other_alone(server: Server) -> None:
    for name in ("cats", "dogs", "cat"):
        apply(name=name)
    apply(name="cat", every="6h")
    assert sorted(made["display_name"] for made in server.recurring) == ["retrain-cat", "retrain-cats", "retrain-dogs"]
    schedule.delete("retrain-cats")
    assert [row["name"] for row in schedule.schedules()] == ["retrain-dogs", "retrain-cat"]


def test_a_server_that_heeds_no_filter_costs_no_other_models_schedule(server: Server) -> None:
    apply(name="cats")
    server.filters = False
    apply(name="dogs")
    schedule.delete("retrain-dogs")
    assert [made["display_name"] for made in server.recurring] == ["retrain-cats"]


def test_the_list_goes_on_after_its_first_page(server: Server) -> None:
    for name in ("a", "b", "c", "d", "e"):
        apply(name=name)
    rows = schedule.schedules()
    assert [row["name"] for row in rows] == [f"retrain-{name}" for name in "abcde"]
    assert rows[0] == {"name": "retrain-a", "when": "every 43200 s", "paused": False, "at_a_time": 1, "catches_up": False}


@pytest.mark.parametrize("too_late", [False, True])
def test_a_schedule_whose_creation_was_answered_with_a_failure_is_made_once(server: Server, too_late: bool) -> None:
    server.faults = [Fault("POST", "recurringruns", 503, too_late=too_late)]
    assert apply()["change"] == "created"
    assert [made["mode"] for made in server.recurring] == ["ENABLE"]


def test_a_deletion_whose_answer_was_lost_has_happened(server: Server) -> None:
    apply()
    server.faults = [Fault("DELETE", "recurringruns", 503, too_late=True)]
    assert apply(every="6h")["change"] == "replaced"
    server.faults = [Fault("DELETE", "recurringruns", 503, too_late=True)]
    assert schedule.delete("retrain-model")["deleted"] and server.recurring == []


def test_a_server_lost_while_one_is_replaced_leaves_something_scheduled_and_the_next_time_leaves_one(server: Server) -> None:
    apply()
    server.faults = [Fault("DELETE", "recurringruns", 403)]
    with pytest.raises(ConfigError, match="403"):
        apply(every="6h")
    assert [made["mode"] for made in server.recurring] == ["ENABLE", "ENABLE"]
    assert apply(every="6h")["change"] == "replaced"
    assert [(made["mode"], made["trigger"]["periodic_schedule"]["interval_second"]) for made in server.recurring] == [("ENABLE", 21600)]


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", None, "RUNTIME_STATE_UNSPECIFIED", "OF_A_NEWER_SERVER"])
def test_a_run_that_is_going_on_is_not_ended_by_replacing_or_deleting_its_schedule(server: Server, state: str | None) -> None:
    apply()
    run_of(server, state)
    for change in (lambda: apply(every="6h"), lambda: schedule.delete("retrain-model")):
        with pytest.raises(ConfigError, match="is going on and would end"):
            change()
    assert len(server.recurring) == 1 and apply()["change"] == "unchanged"
    server.runs[-1]["state"] = "SUCCEEDED"
    assert schedule.delete("retrain-model") == {"name": "retrain-model", "deleted": True} and server.recurring == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cron", "0 3 * *"), "expected 5 fields"),
        (("--cron", "0 3 * * 1; rm"), "expected 5 fields"),
        (("--every", "12"), "expected a number and m, h or d"),
        (("--every", "0h"), "expected a number and m, h or d"),
        (("--every", "1h", "--cron", "0 3 * * 1"), "and not both"),
        ((), "expected --cron"),
        (("--every", "1h", "--image", "cbd:latest"), "NAME@sha256:DIGEST"),
        (("--every", "1h", "--data", "delivery"), "a cluster cannot read it"),
    ],
)
def test_a_mistake_is_refused_before_the_server_is_asked(
    server: Server, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = cbd(capsys, "schedule", *GIVEN, *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and server.asked == []


def test_the_commands_do_all_of_this(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert cbd(capsys, "schedule", *GIVEN, "--every", "12h", "--name", "cats", "--json")[0] == 0
    code, out, _ = cbd(capsys, "schedule", "list", "--json")
    assert code == 0 and json.loads(out)["schedules"][0]["name"] == "retrain-cats"
    assert cbd(capsys, "schedule", "pause", "retrain-cats")[0] == 0 and server.recurring[0]["mode"] == "DISABLE"
    assert cbd(capsys, "schedule", "resume", "retrain-cats")[0] == 0 and server.recurring[0]["mode"] == "ENABLE"
    code, _, err = cbd(capsys, "schedule", "delete", "retrain-dogs")
    assert code == 2 and "no such schedule; there are: retrain-cats" in err
    assert cbd(capsys, "schedule", "delete", "retrain-cats")[0] == 0 and server.recurring == []
