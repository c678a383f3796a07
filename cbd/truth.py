"""What is known about the poison in a data set, kept apart from it: only evaluation and tests read it, never training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from cbd.attacks.poisoning import Goal
from cbd.config import AttackName
from cbd.errors import DataError
from cbd.files import replacing, write_json

TRUTH = "truth.json"
ROLES = "roles.parquet"


@dataclass(frozen=True, slots=True)
class Truth:
    """What is known about the poison in a data set; only evaluation and tests read it, never training."""

    attack: str
    target_label: int
    poison_rate: float
    trigger: dict[str, Any]
    """Arguments that make the trigger again."""
    sample_ids: list[str]
    roles: list[str]
    """`clean`, `poison` or `cover`, in the order of `sample_ids`."""
    true_labels: list[int]
    mapping: str = "all-to-one"
    source_label: int | None = None

    @property
    def known_trigger(self) -> bool:
        """Whether the trigger can be made again, so that attack success can be measured."""
        return self.attack in get_args(AttackName)

    @property
    def goal(self) -> Goal:
        """Whom the attack is after, and what triggered images shall be called."""
        return Goal(self.target_label, self.mapping, self.source_label)

    def samples_with(self, *roles: str) -> set[str]:
        """Ids of the samples that have one of these roles."""
        return {sample for sample, role in zip(self.sample_ids, self.roles, strict=True) if role in roles}


def write_truth(folder: Path, truth: Truth | None) -> None:
    """Writes a TRUTH folder, whole or not at all; None says that nothing is known."""
    with replacing(folder) as temporary:
        temporary.mkdir()
        if truth is None:
            return write_json(temporary / TRUTH, {"attack": None})
        fields = ("attack", "target_label", "poison_rate", "trigger", "mapping", "source_label")
        write_json(temporary / TRUTH, {name: getattr(truth, name) for name in fields})
        columns = {"sample_id": truth.sample_ids, "role": truth.roles, "true_label": pa.array(truth.true_labels, pa.int64())}
        pq.write_table(pa.table(columns), temporary / ROLES, compression="zstd")


def read_truth(folder: Path) -> Truth | None:
    """What the TRUTH folder knows about the poison, or None if it knows nothing.

    Raises:
        DataError: the folder is no TRUTH folder, or is malformed.
    """
    if not (folder / TRUTH).is_file():
        raise DataError(f"{folder}: no truth: {TRUTH} is missing; give a folder that `cbd poison` wrote")
    try:
        values = json.loads((folder / TRUTH).read_text())
        if values["attack"] is None:
            return None
        table = pq.read_table(folder / ROLES, columns=["sample_id", "role", "true_label"])
        ids, roles, labels = (table[name].to_pylist() for name in table.column_names)
        known = (str(values["attack"]), int(values["target_label"]), float(values["poison_rate"]), dict(values["trigger"]))
        source = values.get("source_label")
        mapping = str(values.get("mapping", "all-to-one"))
        return Truth(*known, ids, roles, labels, mapping, None if source is None else int(source))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"{folder}: malformed truth: {' '.join(str(error).split())}; write it again with `cbd poison`") from None
