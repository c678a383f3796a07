"""The readers of deliveries on bytes that nobody would write: each ends in files with reasons or in one line, and reads nothing else.

`CBD_FUZZ_EXAMPLES=10000` looks longer and at random; put what it finds into `tests/corpus`, where every file is tried as it is.
"""

import io
import json
import os
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from delivery_files import LIMITS, png, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbd.errors import DataError
from cbd.images import Refused, decode
from components.delivery import read_delivery

pytestmark = pytest.mark.slow

CORPUS = sorted((Path(__file__).parent / "corpus").iterdir())
fuzz = settings(
    database=None,
    max_examples=int(os.environ.get("CBD_FUZZ_EXAMPLES", "60")),
    deadline=None,
    derandomize="CBD_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
NAMES = st.text(st.characters(codec="utf-8"), max_size=20)


def check(files: dict[str, bytes]) -> None:
    """Reads a delivery of these files; every one that is told is read or has a reason, and nothing but DataError is raised."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "delivery"
        root.mkdir()
        for name, data in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        try:
            with read_delivery(str(root), name="delivery", limits=LIMITS) as delivery:
                told = list(delivery.files)
                assert len(told) == delivery.total
                assert all(file.refusal or (file.data is not None and file.label_name) for file in told)
                for file in told:
                    file.original_path.encode()
        except DataError as error:
            assert "\n" not in str(error)
        assert {path.name for path in Path(folder).iterdir()} == {"delivery"}


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with some of them changed, cut off or doubled."""

    def damage(changes: list[tuple[float, int]], keep: float) -> bytes:
        found = bytearray(data)
        for place, value in changes:
            found[int(place * (len(found) - 1))] = value
        return bytes(found[: int(keep * len(found))])

    places = st.tuples(st.floats(0, 1), st.integers(0, 255))
    return st.builds(damage, st.lists(places, max_size=8), st.one_of(st.just(1.0), st.floats(0, 1)))


def tarred(names: list[str]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(number % 3))
            archive.addfile(info, io.BytesIO(png(number % 3)))
    return file.getvalue()


def zipped(names: list[str]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(name or "x"), png(number % 3))
    return file.getvalue()


@fuzz
@given(st.one_of(st.binary(max_size=300), NAMES.map(str.encode), st.lists(st.lists(NAMES, max_size=3)).map(lambda rows: _csv(rows))))
def test_any_csv_manifest(content: bytes) -> None:
    check({"manifest.csv": content, "i/0.png": png(0)})


def _csv(rows: list[list[str]]) -> bytes:
    return "\n".join(["path,label", *(",".join(row) for row in rows)]).encode()


@fuzz
@given(
    st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.fixed_dictionaries({"path": NAMES | st.integers() | st.none(), "label": st.none() | st.booleans() | st.floats() | NAMES})
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    )
)
def test_any_json_lines_manifest(content: bytes) -> None:
    check({"manifest.jsonl": content, "i/0.png": png(0)})


@fuzz
@given(st.one_of(st.lists(NAMES, max_size=5).map(tarred), damaged(tarred(["a/0.png", "b/1.png", "c.cls"])), st.binary(max_size=600)))
def test_any_tar(content: bytes) -> None:
    check({"x.tar": content})


@fuzz
@given(st.one_of(st.lists(NAMES, max_size=5, unique=True).map(zipped), damaged(zipped(["a/0.png", "b/1.png"])), st.binary(max_size=600)))
def test_any_zip(content: bytes) -> None:
    check({"x.zip": content})


with tempfile.TemporaryDirectory() as _folder:
    _SHARD = write_parquet(Path(_folder) / "s.parquet", [(png(0), 0), (png(1), 1)], names=["a", "b"]).read_bytes()


@fuzz
@given(damaged(_SHARD))
def test_any_parquet(content: bytes) -> None:
    check({"s.parquet": content})


@fuzz
@given(damaged(png(0)))
def test_any_image(content: bytes) -> None:
    try:
        assert decode(content, max_pixels=10_000).pixels.shape[2] == 3
    except Refused as refusal:
        assert refusal.reason


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_every_file_of_the_corpus(path: Path) -> None:
    name = f"manifest{path.suffix}" if path.suffix in (".csv", ".jsonl") else path.name
    check({name: path.read_bytes(), **({"i/0.png": png(0)} if name.startswith("manifest") else {})})
