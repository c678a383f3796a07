"""The list of a run's suspects: what people go through and a supplier is told, kept as a version beside the data that it is about."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cbd.config import canonical_json
from cbd.errors import DataError
from cbd.files import replacing, sha256_file, write_json

INFO, TABLE = "suspects.json", "suspects.parquet"


class SuspectList(BaseModel):
    """`suspects.json`: what the table is about. No time stamps: same evidence, same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    run_id: str
    data_digest: str
    """Of the data set whose images are listed."""
    model_digest: str
    """Of the model that was trained without them."""
    num_images: int = Field(ge=0)
    """In the data set."""
    num_suspects: int = Field(ge=0)
    table_sha256: str

    @property
    def digest(self) -> str:
        """Of this description, which names the table's."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()


def suspect_ids(table: Path) -> list[str]:
    """Sample ids of the suspects in an evidence table, in its order."""
    import pyarrow.parquet as pq

    ids: list[str] = pq.read_table(table, columns=["sample_id"], filters=[("suspect", "==", True)])["sample_id"].to_pylist()
    return ids


def write_suspects(table: Path, out: Path, *, run_id: str, data_digest: str, model_digest: str) -> SuspectList:
    """Writes the suspects of an evidence table, the most suspicious first, with all of its columns, to the folder `out`."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    evidence = pq.read_table(table)
    chosen = evidence.filter(pc.field("suspect")).sort_by("rank")
    with replacing(out) as temporary:
        temporary.mkdir()
        pq.write_table(chosen, temporary / TABLE, compression="zstd")
        about: dict[str, Any] = {"run_id": run_id, "data_digest": data_digest, "model_digest": model_digest}
        counts = {"num_images": evidence.num_rows, "num_suspects": chosen.num_rows}
        info = SuspectList(**about, **counts, table_sha256=sha256_file(temporary / TABLE))
        write_json(temporary / INFO, info.model_dump())
    return info


def read_suspects(folder: Path) -> SuspectList:
    """The description of a list, after its table was verified; raises DataError if it is missing or altered."""
    try:
        info = SuspectList.model_validate_json((folder / INFO).read_bytes())
        found = sha256_file(folder / TABLE)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: is no list of suspects: {str(error).splitlines()[0]}; check the version out again") from None
    if found != info.table_sha256:
        raise DataError(f"{folder / TABLE}: altered: SHA-256 {found[:12]}, expected {info.table_sha256[:12]}; check the version out again")
    return info
