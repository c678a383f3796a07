"""Wiring: the pipelines, the local runner and the command line. Nothing is computed here."""
