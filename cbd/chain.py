"""The attestations of a run as a chain: each names what the one before made, and the last one the decision."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cbd.attest import PROVENANCE, SUMMARY, TEST_RESULT, Statement, digests_in, unseal
from cbd.decision import DECISION, SignedDecision
from cbd.errors import DataError
from cbd.keys import PublicKey

BOM = "bom.cdx.json"
KINDS = {
    "validate": TEST_RESULT,
    "version": PROVENANCE,
    "canary": PROVENANCE,
    "train_confounder": PROVENANCE,
    "train_deconfounded": PROVENANCE,
    "train_undefended": PROVENANCE,
    "evaluate": TEST_RESULT,
    "scan": TEST_RESULT,
    "decide": SUMMARY,
}
"""Which steps attest, and with which predicate."""
ON_DEMAND = "train_undefended"
"""Attests where it ran, which no decision tells; `decide` names its attestation then."""


class Chain(NamedTuple):
    """The attestations of a run, each signed by a trusted key."""

    folder: Path
    signed: SignedDecision
    statements: dict[str, Statement]
    """By step."""
    envelopes: dict[str, str]
    """By file name, the SHA-256 of its bytes."""
    bom: str | None
    """SHA-256 of the bill of materials."""


def steps_of(digests: Mapping[str, Any]) -> tuple[str, ...]:
    """Which steps attested in a run whose decision has these digests, but `ON_DEMAND`; few, where validation stopped it."""
    if digests["model"] is None:
        return ("validate", "decide")
    return tuple(step for step in KINDS if step != ON_DEMAND and (step != "canary" or digests["canary"] is not None))


def read_chain(folder: Path, signed: SignedDecision, keys: Sequence[PublicKey], *, bom: str | None) -> Chain:
    """The attestations in a folder that a run with this decision must have.

    Raises:
        DataError: one is missing, malformed, or not signed by one of the keys.
    """
    statements, envelopes = {}, {}
    asked = (ON_DEMAND,) if (folder / f"{ON_DEMAND}.json").is_file() else ()
    for step in (*asked, *steps_of(signed.content["digests"])):
        path = folder / f"{step}.json"
        if not path.is_file() or path.is_symlink():
            raise DataError(f"{path}: missing; expected the attestation of step {step}, restore it")
        data = path.read_bytes()
        statements[step], envelopes[path.name] = unseal(data, keys, told=str(path)), sha256(data).hexdigest()
    return Chain(folder, signed, statements, envelopes, bom)


def check_chain(chain: Chain) -> None:
    """Checks that each attestation is of this run, and names what the one before made.

    Raises:
        DataError: names the first that does not.
    """
    content, digests = chain.signed.content, chain.signed.content["digests"]
    for step, statement in chain.statements.items():
        path, found = chain.folder / f"{step}.json", _run_of(statement["predicate"])
        match(path, statement["predicateType"], KINDS[step], what="predicate type")
        match(path, found, content["run_id"], what="run")
    summed = chain.statements["decide"]
    subjects = {DECISION: chain.signed.digest, "dataset": digests["data"], "model": digests["model"], BOM: chain.bom}
    _match_all(chain, "decide", summed["subject"], subjects)
    _match_all(chain, "decide", [summed["predicate"].get("policy")], {"urn:cbd:policy": content["policy_sha256"]})
    match(chain.folder / "decide.json", summed["predicate"].get("cbd_verdict"), content["verdict"], what="verdict")
    inputs = {name: digest for name, digest in chain.envelopes.items() if name != "decide.json"}
    if (found := digests_in(summed["predicate"].get("inputAttestations"))) != inputs:
        name = min(set(found.items()) ^ set(inputs.items()))[0]
        raise DataError(f"{chain.folder / name}: not the attestation that the verdict was given on; restore it")
    _check_measured(chain, "validate", {"dataset": digests["data"], "validation.json": digests["validation"]}, {})
    if digests["model"] is not None:
        _check_training(chain)


def match(path: Path, found: Any, expected: Any, *, what: str = "SHA-256") -> None:
    """Raises DataError, which names the file, unless both are the same."""
    if found != expected:
        told, wanted = (str(value)[: 12 if len(str(value)) == 64 else 80] for value in (found, expected))
        raise DataError(f"{path}: {what} is {told}, expected {wanted}: altered, or of another run; restore it")


def _check_training(chain: Chain) -> None:
    digests, stated = chain.signed.content["digests"], chain.statements
    of_set = {"trusted set": digests["trusted"]}
    _match_all(chain, "version", stated["version"]["subject"], {"dataset": digests["data"], **of_set})
    confounder = digests_in(stated["train_confounder"]["subject"]).get("model")
    _match_all(chain, "train_confounder", _materials(stated["train_confounder"]), {"dataset": digests["data"]})
    _match_all(chain, "train_deconfounded", stated["train_deconfounded"]["subject"], {"model": digests["model"]})
    used = {"dataset": digests["data"], "confounder": confounder}
    _match_all(chain, "train_deconfounded", _materials(stated["train_deconfounded"]), used)
    if ON_DEMAND in stated:
        _match_all(chain, ON_DEMAND, _materials(stated[ON_DEMAND]), {"dataset": digests["data"]})
    if "canary" in stated:
        _match_all(chain, "canary", stated["canary"]["subject"], {"canary.json": digests["canary"]})
        _match_all(chain, "canary", _materials(stated["canary"]), of_set)
    for step, file in (("evaluate", "evaluation"), ("scan", "scan")):
        subjects = {"model": digests["model"], f"{file}.json": digests[file]}
        _check_measured(chain, step, subjects, {"policy": chain.signed.content["policy_sha256"]})


def _check_measured(chain: Chain, step: str, subjects: Mapping[str, Any], configuration: Mapping[str, Any]) -> None:
    """Raises unless a step measured these, on the trusted set."""
    stated, wanted = chain.statements[step], {"trusted set": chain.signed.content["digests"]["trusted"], **configuration}
    _match_all(chain, step, stated["subject"], subjects)
    _match_all(chain, step, stated["predicate"].get("configuration"), wanted)


def _match_all(chain: Chain, step: str, listed: Any, expected: Mapping[str, Any]) -> None:
    """Raises unless the resources that a statement lists have the expected digests; None is not looked for."""
    found = digests_in(listed)
    for name, digest in expected.items():
        if digest is not None:
            match(chain.folder / f"{step}.json", found.get(name), digest, what=name)


def _materials(statement: Statement) -> Any:
    definition = statement["predicate"].get("buildDefinition")
    return definition.get("resolvedDependencies") if isinstance(definition, dict) else None


def _run_of(predicate: Mapping[str, Any]) -> Any:
    details = predicate.get("runDetails")
    metadata = details.get("metadata") if isinstance(details, dict) else None
    return metadata.get("invocationId") if isinstance(metadata, dict) else predicate.get("cbd_invocationId")
