"""One file per pipeline step: a plain typed function over paths, and under it the KFP component that calls it."""
