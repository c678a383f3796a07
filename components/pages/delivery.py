"""The data: the most suspicious images, what was delivered and refused, and how the classes are filled."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from cbd.dataset import read_images, read_info
from cbd.images import Refused, decode
from components.charts import bar
from components.pages import View, absent
from components.pages.measures import evidence, truth
from components.pages.text import clip, count, number, of, percent, size
from components.summary import Run
from components.train_deconfounded import GALLERY, SHOWN

ROWS = 200
CLASSES = 60
SIDE = 96
"""Longest side of a picture on the page, in its own pixels; a smaller picture is kept as it is."""
MAX_PIXELS = 50_000_000
PATTERN = re.compile(r"pattern-[0-9]{1,4}\.png")


def gallery(run: Run) -> View:
    """The most suspicious training images by rank, with what was claimed and what the deconfounded model sees."""
    table, folder = evidence(run), _dataset(run)
    names = _labels(folder)
    order = np.argsort(table["rank"], kind="stable")[:SHOWN]
    pictures = _pictures(run, folder, [str(table["sample_id"][i]) for i in order])
    known = truth(run)
    roles = dict(zip(known.sample_ids, known.roles, strict=True)) if known else {}
    cards = []
    for place, i in enumerate(order, 1):
        row = {name: values[i] for name, values in table.items()}
        role = roles.get(row["sample_id"])
        cards.append(_card(row, names, picture=picture(pictures.get(row["sample_id"])), role=role) | {"place": place})
    return {"cards": cards, "suspects": of(int(table["suspect"].sum()), len(table["rank"])), "roles": _hits(cards)}


def _pictures(run: Run, dataset: Path, sample_ids: list[str]) -> dict[str, bytes]:
    """The original bytes by sample id: from the gallery beside the evidence; from the data set where an older version wrote none."""
    path = run.path("train_deconfounded", "evidence", GALLERY)
    if path is None or not path.is_file():
        return read_images(dataset, sample_ids)
    table = pq.read_table(path)
    return dict(zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True))


def patterns(run: Run) -> View:
    """The patterns that images of one class share, each with its picture."""
    shown = []
    for pattern in run.separation.get("patterns") or []:
        name = str(pattern["image"])
        path = run.path("train_confounder", "confounder", name) if PATTERN.fullmatch(name) else None
        told = {"class_name": pattern["class_name"], "num_images": count(pattern["num_images"]), "gap": number(pattern["gap"])}
        told |= {"transfer": percent(pattern["transfer"]), "contradiction": percent(pattern["contradiction"])}
        shown.append(told | {"picture": picture(path.read_bytes() if path and path.is_file() else None)})
    return {"shown": shown}


def picture(data: bytes | None) -> str | None:
    """A data URI with the image as a small PNG; None if it cannot be decoded."""
    if data is None:
        return None
    try:
        image = Image.fromarray(decode(data, max_pixels=MAX_PIXELS).pixels)
    except Refused:
        return None
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def totals(run: Run) -> View:
    """What became of every delivered file: accepted, a duplicate, or in the quarantine; and what it was added to."""
    ingest = run.outputs("ingest")
    if not ingest:
        raise absent(run, "ingest", "count")
    delivered = int(ingest["delivered"])
    parts = [(name, int(ingest[name])) for name in ("accepted", "duplicates", "quarantined")]
    rows = [{"name": name, "style": name, "count": count(n), "share": percent(n / max(delivered, 1))} for name, n in parts]
    trusted = {key: ingest.get(f"trusted_{key}") for key in ("images", "removed")}
    told = {"trusted": count(trusted["images"]), "removed": count(trusted["removed"]), "has_trusted": trusted["images"] is not None}
    told |= {name: count(ingest[name]) if ingest.get(name) else None for name in ("known", "released", "left_out")}
    told |= {"union": count(ingest.get("num_images")), "grown": (ingest.get("num_images") or 0) > int(ingest["accepted"])}
    balanced = sum(n for _, n in parts) == delivered
    return {"rows": rows, "delivered": count(delivered), "svg": bar(parts, total=max(delivered, 1)), "balanced": balanced} | told


def quarantine(run: Run) -> View:
    """The refused files with the reason of each: the first of them, and how many more there are."""
    path = run.path("ingest", "quarantine", "quarantine.parquet")
    if path is None or not path.is_file():
        raise absent(run, "ingest", "quarantine")
    with pq.ParquetFile(path) as file:
        num_rows = file.metadata.num_rows
        columns = ["reason", "original_path", "label_name", "num_bytes", "detail"]
        rows = [row for batch in file.iter_batches(batch_size=ROWS, columns=columns) for row in batch.to_pylist()][:ROWS]
        reasons = file.read(columns=["reason"])["reason"].value_counts().to_pylist()
    shown = [
        {name: clip(row[name], 160) if row[name] is not None else None for name in columns} | {"size": size(row["num_bytes"])}
        for row in rows
    ]
    ordered = sorted(reasons, key=lambda pair: (-pair["counts"], str(pair["values"])))
    counts = [{"reason": clip(pair["values"]), "count": count(pair["counts"])} for pair in ordered]
    return {
        "rows": shown,
        "count": count(num_rows),
        "more": count(num_rows - len(rows)) if num_rows > len(rows) else None,
        "reasons": counts,
    }


def classes(run: Run) -> View:
    """Images per class in the accepted data set, and the clean accuracy on each where it was measured."""
    info = read_info(_dataset(run))
    largest = max(info.class_counts, default=0) or 1
    per_class = {row["class_name"]: row for row in run.evaluation.get("per_class") or []}
    rows = []
    for name, n in list(zip(info.class_names, info.class_counts, strict=True))[:CLASSES]:
        found = per_class.get(name, {})
        drawn = bar([("accepted", n)], total=largest)
        rows.append(
            {
                "name": clip(name, 60),
                "count": count(n),
                "svg": drawn,
                "rate": percent(found.get("rate")),
                "of": of(found.get("k"), found.get("n")),
            }
        )
    sizes = ", ".join(f"{clip(side, 20)}: {count(n)}" for side, n in list(info.image_sizes.items())[:6])
    return {"rows": rows, "more": max(0, len(info.class_names) - CLASSES), "sizes": sizes, "supplier": clip(info.supplier)}


def _dataset(run: Run) -> Path:
    path = run.path("ingest", "dataset")
    if path is None or not path.is_dir():
        raise absent(run, "ingest", "data set")
    return path


def _labels(folder: Path) -> tuple[str, ...]:
    return tuple(clip(name, 28) for name in read_info(folder).class_names)


def _card(row: dict[str, Any], names: tuple[str, ...], *, picture: str | None, role: str | None) -> View:
    given, predicted = names[row["label"]], names[row["predicted"]]
    return {
        "picture": picture,
        "given": given,
        "predicted": predicted,
        "differs": row["label"] != row["predicted"],
        "loss": number(float(row["confounder_loss"])),
        "weight": number(round(float(row["sample_weight"]), 3)),
        "suspect": bool(row["suspect"]),
        "role": role,
    }


def _hits(cards: list[View]) -> str | None:
    known = [card["role"] for card in cards if card["role"]]
    return of(known.count("poison"), len(known)) if known else None
