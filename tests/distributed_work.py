"""What the tests of training in several processes run, alone and under torchrun, and what all of it came to, as tensors in a file."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_training import bars, params
from torch import Tensor
from torch.nn import functional as F

from cbd import distributed, training
from cbd.confounder import train_confounder
from cbd.deconfounded import Evidence, train_deconfounded
from cbd.errors import ConfigError, EnvironmentFault
from cbd.models import make_model
from cbd.pilot import train_pilot

NUM = 96
SETTINGS: dict[str, dict[str, object]] = {
    "critic": {"mi_weight": 0.1},
    "formula": {"weight": "formula", "normalise_weight": True, "confounder_view": "augmented", "dependence": "hsic", "mi_weight": 0.1},
}
"""Between them, everything in stage 2 that looks at a whole batch."""


class Killed(BaseException):
    pass


def one_step() -> dict[str, Tensor]:
    """Outputs, gradients and running averages after one batch in float32."""
    images, labels = bars(32, 1)
    model = make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator().manual_seed(0)).train()
    forward = distributed.spread(model)
    logits, embedding = forward(images)
    losses = F.cross_entropy(logits, labels, reduction="none")
    (losses / losses.mean() * losses).mean().add(embedding.std()).backward()  # type: ignore[no-untyped-call]
    told = {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return told | dict(model.named_buffers()) | {"logits": logits.detach(), "embedding": embedding.detach()}


def whole_training(folder: Path, deconfounded: dict[str, object], *, killed: bool = False) -> dict[str, Tensor]:
    """All tables and weights of the three trainings; `killed`: of one that is interrupted after every epoch and resumed."""
    images, labels = bars(NUM, 0)
    common: dict[str, Any] = {"num_classes": 4, "params": params(**deconfounded)}

    def run(train: Any, name: str, *about: Any, **more: Any) -> Any:
        def interrupt(done: int, total: int, measures: dict[str, float]) -> None:
            if killed:
                raise Killed

        while True:
            try:
                return train(images, labels, *about, checkpoint=folder / name, on_epoch=interrupt, **more, **common)
            except Killed:
                continue

    found = run(train_confounder, "c")
    flown = run(train_pilot, "p", found.losses, steps=found.steps)
    evidence = Evidence(found.model, found.losses, torch.linspace(0, 1, NUM), torch.arange(NUM) < 10)
    trained = run(train_deconfounded, "d", evidence)
    told = {"losses": found.losses, "final": found.final_losses, "preferences": flown.preferences, "pilot": flown.logits}
    told |= {"own": trained.final_losses, "predicted": trained.predicted, "weights": trained.sample_weights}
    told |= {f"c {name}": tensor for name, tensor in found.model.state_dict().items()}
    told |= {f"d {name}": tensor for name, tensor in trained.model.state_dict().items()}
    curves = [[row["loss"], row["accuracy"]] for row in (*found.history, *flown.history, *trained.history)]
    return {name: tensor.detach().contiguous() for name, tensor in told.items()} | {"curves": torch.tensor(curves)}


def everything(folder: Path) -> dict[str, Tensor]:
    """One step, each training, each again, and each interrupted and resumed."""
    training.computes_bf16 = lambda device_type: False  # type: ignore[assignment]  # bfloat16 makes much of another order of sums
    torch.set_num_threads(1)
    told = {f"step/{name}": tensor.contiguous() for name, tensor in one_step().items()}
    for settings, deconfounded in SETTINGS.items():
        for how in ("whole", "again", "killed"):
            made = whole_training(folder / f"{settings}-{how}", deconfounded, killed=how == "killed")
            told |= {f"{settings}/{how}/{name}": tensor for name, tensor in made.items()}
    return told


def refuse(folder: Path) -> None:
    """What several processes refuse: a batch that they cannot share out evenly, and states that are not the same for all."""
    model = make_model("wrn-16-1", num_classes=4, image_size=16, generator=torch.Generator())
    with pytest.raises(ConfigError, match="a batch of 31 images cannot be shared out evenly among 2 processes"):
        distributed.spread(model)(bars(31, 0)[0])
    own = folder / f"state-{os.environ['RANK']}"
    training.Session({"model": model}, {}, torch.Generator()).finish_epoch(own, key="k", measures={})  # the first process writes
    with pytest.raises(EnvironmentFault, match="not the same file for all processes"):
        training.Session({"model": model}, {}, torch.Generator()).resume(own, key="k")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with distributed.started():
        refuse(place)
        save_file({name: tensor.clone() for name, tensor in everything(place).items()}, place / f"rank-{os.environ['RANK']}.safetensors")
