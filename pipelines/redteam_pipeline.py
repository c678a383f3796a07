"""The red team as a pipeline for a cluster: every trial of `pipelines.redteam` is a task of its own, and all share one folder.

First comes one model without poison for each seed; then, for each attack and seed, the poisoned copy and a model without defence on it;
then the models that are compared with these. What is in the folder already is not done again, by whatever task; so all may be retried.
Loops run over lists of plain values: a parameter may not hold more than 128 KiB, so the sections stand in another one, once a preset. KFP's
local runner (2.17) gives the item in place of every output of another task, so a loop reads none.
"""

from kfp import dsl

from pipelines.overlays import DATA, SMALL, STORE, TRAINING, place, retried
from pipelines.trials import table_step, take_in_step, trial_step

AT_ONCE = 4
"""Trials at the same time: as many GPUs are taken."""


@dsl.pipeline(name="redteam", description="The defence against known attacks: poison, train, measure; one row each, one table of all.")
def redteam(delivery: dict, out: str, seeds: list, undefended: list, defended: list, presets: dict, group_by: str = ""):
    """Trains and measures models on poisoned copies of clean data, with and without defence.

    Args:
        delivery: clean `data`, `trusted`, `limit` (take in at most so many images; 0 is all) and the section `ingest` of params.yaml.
        out: folder that all tasks share.
        seeds: trials without attack, one for each seed.
        undefended: trials without defence, one for each attack and seed.
        defended: trials with a defence.
        presets: sections of params.yaml by preset.
        group_by: regular expression on paths of trusted images, which groups them; empty is none.
    """
    about = {"out": out, "delivery": delivery}
    before = retried(place(take_in_step(**about), DATA, STORE))
    for name, trials in {"clean": seeds, "undefended": undefended, "defended": defended}.items():
        with dsl.ParallelFor(trials, name=name, parallelism=AT_ONCE) as trial:
            step = trial_step(trial=trial, presets=presets, group_by=group_by, **about)
            after = retried(place(step, TRAINING, STORE)).after(before)
        before = after
    retried(place(table_step(undefended=undefended, defended=defended, presets=presets, **about), SMALL, STORE)).after(before)
