"""The red team as a pipeline: the same rows as by the command, by KFP's runner and its loops."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command import cbd
from kfp_server import Server
from small_delivery import REDTEAM_PARAMS, write_small

from cbd.errors import DataError
from cbd.images import encode_png
from pipelines import local, redteam, trials
from pipelines.options import load

DELIVERY = {"data": "s3://bucket/clean", "trusted": "s3://bucket/trusted", "limit": 0}


@pytest.fixture
def params_of(tmp_path: Path) -> Any:
    (tmp_path / "params.yaml").write_text(REDTEAM_PARAMS)
    return partial(load, params_path=tmp_path / "params.yaml", poison__attack="badnets")


def test_trials_are_plain_lists_and_every_defence_is_compared_with_none(params_of: Any) -> None:
    given = trials.arguments(DELIVERY, attacks=["badnets", "clean"], presets=["cbd", "abl"], seeds=[0, 1], params_of=params_of)
    assert given["seeds"] == [{"attack": "", "preset": "none", "seed": seed} for seed in (0, 1)]
    assert given["undefended"] == [{"attack": attack, "preset": "none", "seed": seed} for seed in (0, 1) for attack in ("badnets", "clean")]
    assert [(trial["attack"], trial["preset"]) for trial in given["defended"][:2]] == [("badnets", "cbd"), ("badnets", "abl")]
    assert set(given["presets"]) == {"none", "cbd"}
    assert len(json.dumps(given["presets"])) < 2**14


def test_a_trial_is_the_same_through_parameters_as_by_the_command(params_of: Any) -> None:
    """Its digest names its row and its model: what the one has trained the other takes."""
    given = json.loads(
        json.dumps(trials.arguments(DELIVERY, attacks=["sig"], presets=["cbd"], seeds=[3], params_of=params_of)), parse_int=float
    )
    plain, trial = trials._trial(given["defended"][0], given["presets"])
    names = {"seed", "preset", "model", "confounder", "deconfounded", "poison"}
    for params in (plain, trial.params):
        assert params.model_dump(include=names) == params_of(preset=params.preset, seed=3).model_dump(include=names)
    assert (trial.attack, trial.preset, trial.params.preset) == ("sig", "cbd", "cbd")


def test_a_table_with_a_row_missing_is_refused(tmp_path: Path, params_of: Any) -> None:
    for number, name in enumerate(f"{kind}/{label}/{i}" for kind in ("delivery", "trusted") for label in "ab" for i in range(3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(encode_png(np.full((8, 8, 3), number, np.uint8)))
    delivery = {"data": str(tmp_path / "delivery"), "trusted": str(tmp_path / "trusted"), "limit": 0}
    given = trials.arguments(delivery, attacks=["badnets"], presets=["none"], seeds=[0], params_of=params_of)
    with pytest.raises(DataError, match="the row of badnets none seed 0 is missing"):
        trials.collect(str(tmp_path), given["delivery"], given["undefended"], presets=given["presets"])
    assert not (tmp_path / "redteam.parquet").exists()


GIVEN = ("redteam", "--data", DELIVERY["data"], "--trusted", DELIVERY["trusted"], "--params", "params.yaml")
IMAGE = "registry.example/cbd@sha256:" + "0123456789abcdef" * 4


def test_with_an_overlay_the_command_submits_the_pipeline_and_follows_it_to_its_table(
    server: Server, params_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--attacks", "badnets,sig", "--presets", "cbd", "--seeds", "2", "--overlay", "gke:a100", "--image", IMAGE, "--run-id", "first")
    code, out, err = cbd(capsys, *GIVEN, *more, "--json")
    assert code == 0 and "succeeded" in err
    told = json.loads(out.splitlines()[-1])
    assert told["table"] == "/workspace/redteam/cbd-redteam/redteam.parquet"
    (run,) = server.runs
    given = run["runtime_config"]["parameters"]
    assert given["delivery"]["data"] == DELIVERY["data"] and given["out"] == "/workspace/redteam/cbd-redteam"
    assert [len(given[name]) for name in ("seeds", "undefended", "defended")] == [2, 4, 4]
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "redteam"
    assert cbd(capsys, *GIVEN, *more, "--json")[0] == 0
    assert len(server.runs) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--overlay", "gke"), "--overlay and --image go together"),
        (("--overlay", "gke", "--image", "cbd:latest"), "NAME@sha256:DIGEST"),
        (("--overlay", "gke", "--image", IMAGE, "--data", "/home/me"), "a cluster cannot read it"),
        (("--overlay", "gke", "--image", IMAGE, "--group-by", "{{$x"), "which the server replaces"),
    ],
)
def test_what_no_cluster_could_run_is_refused(
    server: Server, params_of: Any, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    code, _, err = cbd(capsys, *GIVEN, *more)
    assert code == 2 and message in err.splitlines()[-1]
    assert not server.runs


def test_a_red_team_that_failed_is_told(server: Server, params_of: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server.states = ["RUNNING", "FAILED"]
    code, _, err = cbd(capsys, *GIVEN, "--overlay", "gke", "--image", IMAGE)
    assert code == 1 and "submit it again: what was measured is not measured again" in err


@pytest.mark.slow
def test_kfps_runner_comes_to_the_rows_of_the_command(tmp_path: Path, params_of: Any, torch_one_thread: None) -> None:
    write_small(tmp_path, params=REDTEAM_PARAMS)
    about = {"attacks": ["badnets"], "presets": ["none", "cbd"], "seeds": [0], "params_of": params_of}
    out, places = tmp_path / "out", {"data": str(tmp_path / "delivery"), "trusted": str(tmp_path / "trusted")}
    given = {"out": str(out), "group_by": "", **trials.arguments({**places, "limit": 0}, **about)}
    assert local.run(given, tmp_path / "run", pipeline="pipelines.redteam_pipeline:redteam"), (
        tmp_path / "run" / "pipeline.log"
    ).read_text()[-3000:]
    rows = pq.read_table(out / "redteam.parquet").to_pylist()
    assert [(row["attack"], row["preset"]) for row in rows] == [("badnets", "none"), ("badnets", "cbd")]
    assert len(list(out.rglob("model.safetensors"))) == 4
    assert (out / "redteam.md").read_text().count("badnets") == 4

    taken_in = redteam.take_in(**places, out=out, limit=0, params=params_of(preset="none", seed=0).ingest)
    assert list(out.glob("taken-in-*")) == [taken_in]
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")}
    assert redteam.redteam(taken_in, out, **about) == rows
    assert {path: path.stat().st_mtime_ns for path in out.rglob("model.safetensors")} == trained
