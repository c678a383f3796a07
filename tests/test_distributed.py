"""Two processes under torchrun compute what one does, to rounding; and each time the same bytes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed_work import SETTINGS, everything
from safetensors.torch import load_file
from torch import Tensor

from cbd import training
from cbd.distributed import agree, by_shares, is_first, num_processes, spread
from cbd.models import make_model

Told = dict[str, Tensor]


def under_torchrun(script: Path, *arguments: str, processes: int = 2) -> None:
    options = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *options, str(script), *arguments], check=True)


def test_alone_nothing_is_changed() -> None:
    model = make_model("wrn-16-1", num_classes=2, image_size=16, generator=torch.Generator())
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    assert spread(model) is model
    assert by_shares(lambda given: given, images) is images
    assert num_processes() == 1 and is_first() and agree(7)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    """What each of two processes came to."""
    folder = tmp_path_factory.mktemp("two")
    under_torchrun(Path(__file__).with_name("distributed_work.py"), str(folder))
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """What one process came to."""
    threads, bf16 = torch.get_num_threads(), training.computes_bf16
    yield everything(tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)
    training.computes_bf16 = bf16


@pytest.mark.slow
def test_a_step_of_two_processes_has_the_outputs_gradients_and_averages_of_one(ranks: list[Told], alone: Told) -> None:
    names = [name for name in alone if name.startswith("step/")]
    assert any("gradient" in name for name in names) and any("running_var" in name for name in names)
    for name in names:
        scale = float(alone[name].float().abs().max()) + 1e-6
        assert float((ranks[0][name].float() - alone[name].float()).abs().max()) < 1e-4 * scale, name


@pytest.mark.slow
def test_both_processes_hold_the_same_bytes_of_every_table_and_weight(ranks: list[Told]) -> None:
    assert ranks[0].keys() == ranks[1].keys() and all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["again", "killed"])
def test_two_processes_give_the_same_bytes_again_and_after_a_kill(ranks: list[Told], how: str) -> None:
    names = [name for name in ranks[0] if "/whole/" in name]
    assert names and [name for name in names if not torch.equal(ranks[0][name], ranks[0][name.replace("/whole/", f"/{how}/")])] == []


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_two_processes_come_to_the_measures_and_the_table_of_one(ranks: list[Told], alone: Told, settings: str) -> None:
    for name, close in (("curves", 0.03), ("losses", 0.03), ("preferences", 0.05), ("own", 0.05), ("weights", 0.03)):
        one, two = (told[f"{settings}/whole/{name}"] for told in (alone, ranks[0]))
        assert one.shape == two.shape and float((one - two).abs().max()) < close, name
