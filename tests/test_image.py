"""What can be told of the images without an engine; `make image-test` runs them."""

import re
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
DOCKERFILES = ("Dockerfile", "mlflow/Dockerfile")


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    final = text[text.rindex("\nFROM ") :]
    rules = {
        "a base that is not given": not re.findall(r"^FROM (?!\$\{BASE\}|packages AS )", text, re.MULTILINE),
        "no numeric user": re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.MULTILINE),
        "an install without hashes": all(
            "--require-hashes" in line or "--no-deps" in line for line in _commands(text) if re.search(r"pip install", line)
        ),
        "packages of the last stage": re.findall(r"apt-get install -y -qq --no-install-recommends ([^&]*?) &&", final) in ([], ["git"]),
        "no commit": 'org.opencontainers.image.revision="${COMMIT}"' in final,
        "something from the network": not re.search(r"\b(curl|wget|ADD|git clone)\b", text),
        "a cache outside of /tmp": "/opt/mlflow" in text or "DVC_SITE_CACHE_DIR=/tmp/" in final,
        "no path to the driver": "/opt/mlflow" in text or "LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 " in final,
        "a secret": not re.search(r"(?i)(password|secret|token)\s*=", text),
    }
    return [name for name, holds in rules.items() if not holds]


def _commands(text: str) -> list[str]:
    return re.split(r"&&|\n(?! )", text.replace("\\\n", " "))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_keeps_the_rules(name: str) -> None:
    assert faults((PROJECT / name).read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("FROM ${BASE}\n", "FROM python:3.11\n", "a base that is not given"),
        ("USER 10001:10001", "USER root", "no numeric user"),
        ("--require-hashes ", "", "an install without hashes"),
        ("recommends git", "recommends git gcc", "packages of the last stage"),
        ("${COMMIT}", "unknown", "no commit"),
        ("COPY . .", "ADD https://example.org/x .", "something from the network"),
        ("USER=cbd", "TOKEN=abc", "a secret"),
        ("nvidia/lib64", "cuda/lib64", "no path to the driver"),
        ("DVC_SITE_CACHE_DIR", "OTHER", "a cache outside of /tmp"),
    ],
)
def test_each_rule_is_seen_broken(old: str, new: str, told: str) -> None:
    text = (PROJECT / "Dockerfile").read_text()
    assert old in text and faults(text.replace(old, new)) == [told]


def test_the_image_holds_what_the_code_reads_and_no_more() -> None:
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored and {"cbd", "components", "pipelines", "params.yaml", "data/suites", "requirements.lock"} <= sent
    assert not sent & {".git", ".venv", "tests", "mlflow"}, "mlflow/ beside the packages would hide the package of that name"


def test_the_tracking_servers_lock_has_what_it_asks_for_in_the_pipelines_versions() -> None:
    pins = {
        name: dict(re.findall(r"^([\w.-]+)==(\S+)", (PROJECT / name).read_text(), re.MULTILINE))
        for name in ("requirements.lock", "mlflow/requirements.lock")
    }
    server = pins["mlflow/requirements.lock"]
    assert {"mlflow", "boto3", "psycopg2-binary", "flask-wtf"} <= set(server)
    shared = set(server) & set(pins["requirements.lock"])
    assert {name: server[name] for name in shared} == {name: pins["requirements.lock"][name] for name in shared}


def test_an_image_without_a_base_is_refused_with_the_fix() -> None:
    done = subprocess.run(["make", "image", "BASE="], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode and "@sha256:" in done.stdout
