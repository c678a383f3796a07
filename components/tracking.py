"""MLflow, behind one module: the model registry here, runs and live curves from `tracking_runs`, the store from `tracking_store`.

No pickle is written or loaded, and nothing fetched is used before our own signature and digests are verified.
"""

import filecmp
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd.audit import LOG
from cbd.bundle import CARD, WEIGHTS, read_card
from cbd.config import canonical_json
from cbd.decision import DECISION
from cbd.errors import ConfigError, DataError, naming
from cbd.files import locked, replacing
from cbd.heads import walk
from cbd.keys import load_public_key
from cbd.model_signature import MODEL_SIGNATURE, SIGNED_FILES
from cbd.signed_model import check_model, check_verdict, copy_signed
from components.decision import check_decision, find_file, find_signers
from components.standing import Move, demanded, holder, read_moves, withdrawn
from components.tracking_runs import LiveCurves, close_run, log_run, open_run, plain
from components.tracking_store import LOCK, check_reachable, client, ignoring, made, shown, sqlite_file, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "LiveCurves",
    "champion_bundle",
    "check_reachable",
    "close_run",
    "drop_alias",
    "fetch_model",
    "find_aliases",
    "find_version",
    "log_run",
    "open_run",
    "register_bundle",
    "registered_name",
    "set_alias",
    "tracking_uri",
]

FILES = (*SIGNED_FILES, MODEL_SIGNATURE)
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")


def registered_name(name: str, class_names: Sequence[str]) -> str:
    """The name in MLflow's registry: models of different classes never share one; raises ConfigError for a name MLflow cannot hold."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", name):
        raise ConfigError(f"model name {name!r}: expected letters, digits, '_', '.' and '-'; give another --name")
    return f"{name}-{hashlib.sha256(canonical_json(list(class_names))).hexdigest()[:8]}"


def find_version(workspace: Path, name: str, tags: Mapping[str, str]) -> str | None:
    """The version of `name` with the same model and decision digests, if there is one."""
    with client(workspace) as mlflow:
        found = _find_version(mlflow, name, tags)
    return str(found.version) if found else None


def register_bundle(bundle: Path, decision: Path, *, workspace: Path, name: str, tags: Mapping[str, str]) -> str:
    """The version of `name` that holds the bundle and its signed decision; needs the tag `cbd.run_id`. Sets no alias.

    One bundle with one decision is one version, also where a server that was away had made it, or half of it, before it could say so.

    Raises:
        DataError: the signature of both is missing, or anything would not verify when it is fetched.
        EnvironmentFault: MLflow is out of reach.
    """
    with tempfile.TemporaryDirectory() as staging, client(workspace) as mlflow:
        sources = {Path(staging) / file: find_file(bundle if file in (WEIGHTS, CARD) else decision, file) for file in FILES}
        for copy, source in sources.items():
            shutil.copyfile(source, copy)
        with naming({copy: str(source) for copy, source in sources.items()} | {Path(staging): str(bundle)}):
            _verify_bundle(Path(staging), workspace)
        run = open_run(workspace, tags["cbd.run_id"])
        experiment = mlflow.get_run(run).info.experiment_id
        about: dict[str, Any] = {"name": name, "source_run_id": run, "tags": dict(tags), "model_type": "safetensors bundle"}
        model = made(lambda: _find_model(mlflow, experiment, name, tags), lambda: mlflow.create_logged_model(experiment, **about))
        mlflow.log_model_artifacts(model.model_id, staging)
        mlflow.finalize_logged_model(model.model_id, "READY")
        with ignoring("RESOURCE_ALREADY_EXISTS"):
            mlflow.create_registered_model(name)
        about = {"run_id": run, "tags": dict(tags), "model_id": model.model_id}
        version = made(
            lambda: _find_version(mlflow, name, tags), lambda: mlflow.create_model_version(name, model.artifact_location, **about)
        )
        mlflow.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version.version}])})
    return str(version.version)


def set_alias(workspace: Path, name: str, alias: str, version: str) -> None:
    """Points `alias` of the registered model to `version`."""
    with client(workspace) as mlflow:
        mlflow.set_registered_model_alias(name, alias, version)


def drop_alias(workspace: Path, name: str, alias: str) -> None:
    """Takes `alias` off the registered model, if it is there."""
    with client(workspace) as mlflow, ignoring("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
        mlflow.delete_registered_model_alias(name, alias)


def find_aliases(workspace: Path) -> dict[tuple[str, str], str]:
    """Which version stands behind each (name, alias) in MLflow, whoever put it there; nothing where there is no store yet."""
    if not _has_store(workspace):
        return {}
    with client(workspace) as mlflow:
        models = mlflow.search_registered_models(max_results=1000)
        return {(model.name, alias): str(version) for model in models for alias, version in model.aliases.items()}


def champion_bundle(workspace: Path, name: str, class_names: Sequence[str]) -> tuple[Path, str] | None:
    """The champion's verified bundle folder and its version; None where there is no champion yet.

    Raises:
        DataError: the champion is not what its signed decision says.
        EnvironmentFault: MLflow is out of reach.
    """
    if not _has_store(workspace):
        return None
    full_name = registered_name(name, class_names)
    with client(workspace) as mlflow:
        version = _aliased_version(mlflow, full_name, "champion")
    told = holder(read_moves(workspace, full_name), "champion")
    if version is None and told is not None:
        raise DataError(
            f"models:/{full_name}@champion: no such alias, {LOG} last set version {told}: it was removed; {_mend(full_name, told)}"
        )
    return (fetch_model(f"models:/{full_name}@champion", workspace), version) if version else None


def fetch_model(uri: str, workspace: Path | str) -> Path:
    """The folder of a verified bundle.

    From the registry (`models:/<name>@<alias>` or `models:/<name>/<version>`) the bundle must be the one that its signed decision names,
    an alias must be where the workspace's log last put it, and `champion` needs a PASS, `candidate` a REVIEW. A folder is checked
    against its own card, and against the signed decision where one lies in it.

    Raises:
        DataError: no such model, or anything is not what the signed decision says.
        EnvironmentFault: MLflow is out of reach.
    """
    place = Path(workspace)
    if not uri.startswith("models:/"):
        folder = Path(uri)
        read_card(folder)
        if (folder / DECISION).exists():
            _verify_bundle(folder, place)
        return folder
    match = _MODEL_URI.fullmatch(uri)
    if not match:
        raise DataError(f"{uri!r}: expected models:/<name>@<alias> or models:/<name>/<version>")
    if not _has_store(place):
        raise DataError(f"{uri}: {shown(tracking_uri(place))} holds no model yet; give the workspace that registered it")
    return _fetch_version(uri, match["name"], match["alias"], match["version"], place)


def _find_version(mlflow: "MlflowClient", name: str, tags: Mapping[str, str]) -> "ModelVersion | None":
    versions = mlflow.search_model_versions(f"name = '{plain(name)}'", max_results=1000)
    return next((version for version in versions if _same_digests(version.tags, tags)), None)


def _find_model(mlflow: "MlflowClient", experiment: str, name: str, tags: Mapping[str, str]) -> "LoggedModel | None":
    wanted = f"name = '{plain(name)}' AND tags.`cbd.decision_digest` = '{plain(tags['cbd.decision_digest'])}'"
    models = mlflow.search_logged_models([experiment], wanted)
    return next((model for model in models if _same_digests(model.tags, tags)), None)


def _same_digests(found: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    return all(found.get(key) == tags[key] for key in ("cbd.model_digest", "cbd.decision_digest"))


def _fetch_version(uri: str, name: str, alias: str | None, version: str | None, workspace: Path) -> Path:
    from mlflow.artifacts import download_artifacts

    with client(workspace) as mlflow, tempfile.TemporaryDirectory() as staging:
        if alias:
            version = _aliased_version(mlflow, name, alias)
        source = _source(mlflow, name, version) if version else None
        if version is None or source is None:
            raise DataError(f"{uri}: no such model in {shown(tracking_uri(workspace))}; look at its aliases and versions there")
        moves = read_moves(workspace, name)
        if alias:
            _check_alias(moves, name, alias, version)
        fetched = Path(download_artifacts(artifact_uri=source, dst_path=staging, tracking_uri=tracking_uri(workspace)))
        staged = copy_signed(fetched, Path(staging) / "bundle", told=f"{uri} in the registry")
        with naming({staged: f"{uri} in the registry"}):
            digest = _verify_bundle(staged, workspace, alias, demanded(moves, alias) if alias else None)
        _check_registered(moves, version, digest, uri)
        target = workspace / "fetched" / digest
        with locked(workspace / LOCK):
            if not _same(target, staged):
                with replacing(target) as temporary:
                    shutil.copytree(staged, temporary)
    return target


def _verify_bundle(folder: Path, workspace: Path, alias: str | None = None, worst: str | None = None) -> str:
    """The decision's digest, after checking all that `cbd.load` does, and that the workspace's log names the decision.

    Behind an alias its verdict must be what the alias demands, or `worst`, which an override allows.
    """
    signers = find_signers(walk(workspace))
    digest = check_decision(folder, signers, key=load_public_key(workspace)).digest
    signed = check_model(folder, [signers["decision", digest]])
    if alias:
        check_verdict(signed, alias, told=str(folder), worst=worst)
    return digest


def _check_alias(moves: Sequence[Move], name: str, alias: str, version: str) -> None:
    told, fallen = holder(moves, alias), withdrawn(moves, version)
    if told == version:
        return
    over = [move["expires"] for move in moves if move.get("expired") and move["version"] == version]
    why = f" (version {version}: {fallen['event']}, {fallen['reason']:.200})" if fallen else ""
    why = f" (version {version}: its override expired on {over[-1]})" if over else why
    raise DataError(
        f"models:/{name}@{alias} is version {version}, {LOG} last set {told or 'none'}{why}: the alias was moved; {_mend(name, told)}"
    )


def _mend(name: str, version: str | None) -> str:
    again = f"set it again with: cbd rollback {name} --to {version} --reason WHY" if version else "take it off with: cbd retest --demote"
    return f"run the pipeline, or {again}"


def _check_registered(moves: Sequence[Move], version: str, digest: str, uri: str) -> None:
    """Raises if the log says that this version was registered with another decision."""
    told = {move["decision_digest"] for move in moves if move["event"] == "register" and str(move.get("version")) == version}
    if told and digest not in told:
        raise DataError(f"{uri}: its decision is {digest[:12]}, {LOG} registered it with {min(told)[:12]}; it was replaced, restore it")


def _same(target: Path, fetched: Path) -> bool:
    return all((target / name).is_file() and filecmp.cmp(target / name, fetched / name, shallow=False) for name in FILES)


def _aliased_version(mlflow: "MlflowClient", name: str, alias: str) -> str | None:
    """Which version stands behind an alias. The model is searched for first: a server with users refuses one that is not there."""
    if mlflow.search_registered_models(f"name = '{plain(name)}'"):
        with ignoring("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return str(mlflow.get_model_version_by_alias(name, alias).version)
    return None


def _source(mlflow: "MlflowClient", name: str, version: str) -> str | None:
    found = mlflow.search_model_versions(f"name = '{plain(name)}'", max_results=1000)
    there = any(str(each.version) == version for each in found)
    return str(mlflow.get_model_version_download_uri(name, version)) if there else None


def _has_store(workspace: Path) -> bool:
    file = sqlite_file(tracking_uri(workspace))
    return file is None or file.exists()
