"""Checkpoints in a bucket: a training that lost its machine goes on, and from nothing that the workspace does not name."""

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trainings
from moto.server import ThreadedMotoServer

from cbd.dataset import make_row, to_batches, write_dataset
from cbd.errors import ConfigError, DataError
from cbd.files import sha256_file
from cbd.images import encode_png
from components.checkpoints import BUCKET, going_on

TRAINING = """
import sys
from pathlib import Path

from cbd.config import Confounder, Deconfounded, Gate, Model, Params
from components import checkpoints
from components.train_confounder import train_confounder
from components.train_deconfounded import train_deconfounded

root, out, killed_in = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
kept = checkpoints.replacing

def killed_before_it_is_named(path):
    global killed_in
    killed_in -= path.suffix == ".sha256"
    if killed_in == 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return kept(path)

checkpoints.replacing = killed_before_it_is_named
params = Params(model=Model(image_size=16), gate=Gate(min_clean_accuracy=0),
    confounder=Confounder(steps=12, batch_size=16, until_slow=False), deconfounded=Deconfounded(epochs=3, batch_size=16))
about = {"params": params, "checkpoints": root / "workspace" / "checkpoints"}
if not (out / "confounder").is_dir():
    train_confounder(root / "dataset", out / "confounder", **about)
train_deconfounded(root / "dataset", out / "confounder", model=out / "model", evidence=out / "evidence", **about)
"""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a real S3 server where one is named, else of a stand-in that other processes reach; checkpoints go to a new bucket."""
    import boto3

    stand_in = None
    if not (endpoint := os.environ.get("CBD_TEST_S3_ENDPOINT")):
        stand_in = ThreadedMotoServer(port=0, verbose=False)
        stand_in.start()
        endpoint = "http://{}:{}".format(*stand_in.get_host_and_port())
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client, bucket = boto3.session.Session().client("s3"), f"checkpoints-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    monkeypatch.setenv(BUCKET, f"s3://{bucket}/runs/")
    client.bucket = bucket
    yield client
    for key in objects(client):
        client.delete_object(Bucket=bucket, Key=key)
    client.delete_bucket(Bucket=bucket)
    if stand_in:
        stand_in.stop()


def objects(client: Any) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=client.bucket).get("Contents", ())]


def epochs(place: Path, *contents: bytes) -> Path:
    """The file of a training that has saved these contents, one after each epoch."""
    given = going_on(place, lambda done, total, measures: None)
    for content in contents:
        given["checkpoint"].write_bytes(content)
        given["on_epoch"](1, 2, {})
    return Path(given["checkpoint"])


def test_without_a_bucket_a_training_keeps_its_file_and_its_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(BUCKET, raising=False)
    assert going_on(tmp_path / "a.safetensors", print) == {"checkpoint": tmp_path / "a.safetensors", "on_epoch": print}


def test_an_address_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUCKET, "gs://box")
    with pytest.raises(ConfigError, match=r"expected s3://bucket/prefix"):
        going_on(tmp_path / "a.safetensors", print)


def test_the_last_epoch_comes_back_on_another_machine_and_the_bucket_holds_no_other(client: Any, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints" / "f00" / "a.safetensors"
    first = epochs(place, b"epoch 1", b"epoch 2")
    first.unlink()
    again = epochs(place)
    assert again != first
    assert again.read_bytes() == b"epoch 2"
    assert objects(client) == [f"runs/f00/{sha256_file(again)}.safetensors"]
    assert [path.name for path in place.parent.iterdir()] == ["a.safetensors.sha256"]


def test_a_checkpoint_that_somebody_put_into_the_bucket_is_not_trained_on(client: Any, tmp_path: Path) -> None:
    place = tmp_path / "f00" / "a.safetensors"
    epochs(place, b"epoch 1")
    client.put_object(Bucket=client.bucket, Key=objects(client)[0], Body=b"theirs")
    with pytest.raises(DataError, match=r"altered: SHA-256 is .*; delete it, and training starts anew"):
        epochs(place)


def test_where_the_bucket_has_lost_it_training_starts_anew(client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "f00" / "a.safetensors"
    epochs(place, b"epoch 1")
    client.delete_object(Bucket=client.bucket, Key=objects(client)[0])
    assert not epochs(place).exists()
    assert "no longer in the bucket, training starts anew" in capsys.readouterr().out
    assert epochs(place, b"epoch 1").read_bytes() == b"epoch 1"


@pytest.mark.slow
def test_of_two_processes_the_first_puts_the_checkpoint_and_both_go_on_from_it(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "data").mkdir()
    given = {"params": trainings.params(2), "checkpoints": tmp_path / "checkpoints"}
    (tmp_path / "checkpoints" / "f00").mkdir(parents=True)
    assert not trainings.keeping(tmp_path / "data", tmp_path / "out", **given)["found"]
    assert len(objects(client)) == 1
    assert trainings.keeping(tmp_path / "data", tmp_path / "again", **given)["found"]


@pytest.mark.slow
def test_trainings_that_were_killed_go_on_from_the_bucket_to_the_same_bytes(client: Any, tmp_path: Path) -> None:
    """Killed twice, in either stage, where an epoch is in the bucket and not named yet; the machine's own files are gone each time."""
    from pipelines.demo import load_scans

    scans, labels = load_scans()
    rows = [make_row(encode_png(scans[i]), label=int(labels[i]) % 2, original_path=f"{i}.png", source="acme") for i in range(64)]
    write_dataset(tmp_path / "killed" / "dataset", to_batches(rows), class_names=("even", "odd"), supplier="acme")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "dataset").symlink_to(tmp_path / "killed" / "dataset")

    def train(root: Path, out: Path, killed_in: int, **environment: str) -> tuple[int, str]:
        """Exit status and output."""
        pod = tmp_path / f"pod-{uuid.uuid4().hex[:6]}"
        pod.mkdir()
        env = {**os.environ, "TMPDIR": str(pod), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-c", TRAINING, str(root), str(out), str(killed_in)]
        ended = subprocess.run(command, env=env, check=False, stdout=subprocess.PIPE, text=True)
        return ended.returncode, ended.stdout

    out = tmp_path / "killed" / "out"
    status, told = train(tmp_path / "killed", out, 2)  # in the confounder's second epoch
    assert status == -signal.SIGKILL
    assert "1/3 epoch confounder" in told
    assert "2/3 epoch confounder" not in told
    assert len(objects(client)) == 2
    assert not (out / "confounder").exists()
    status, told = train(tmp_path / "killed", out, 6)
    assert status == -signal.SIGKILL
    assert "1/3 epoch confounder" not in told
    assert "2/3 epoch confounder" in told
    assert train(tmp_path / "killed", out, -1)[0] == 0
    assert train(tmp_path / "whole", tmp_path / "whole" / "out", -1, **{BUCKET: ""})[0] == 0
    for name in ("confounder/model.safetensors", "confounder/losses.parquet", "model/model.safetensors", "evidence/evidence.parquet"):
        assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / "out" / name)
    assert not list((tmp_path / "killed" / "workspace").rglob("*.safetensors"))
    assert len(list((tmp_path / "whole" / "workspace").rglob("*.safetensors"))) == 3
