"""One file per pipeline step: a plain typed function over paths, and under it the KFP component that calls it."""

STEPS = (
    "ingest",
    "validate",
    "version",
    "canary",
    "train_confounder",
    "train_deconfounded",
    "train_undefended",
    "evaluate",
    "scan",
    "decide",
    "register",
    "report",
)
"""The pipeline's steps in the order in which they run."""
