"""The production pipeline: one definition for the embedded runner and for a Kubeflow Pipelines cluster.

What shapes it, all tried on kfp 2.17.0:
* Conditions look only at unnamed outputs of deciding steps (a bool, a str of a fixed set): the local runner skips a bare condition on a
  named output without a word, and it evaluates conditions as text.
* An exit task gets no outputs of other tasks, so every step leaves a record under `records`, and the report checks there that the branch
  which the verdict demands really ran.
* Nothing outside an If can read an artifact from inside it. So `train_undefended` stands outside and does nothing unless it is asked to.
* A dict parameter turns ints into floats and holds no null, so each step checks its section again.
* Nothing is cached: KFP's cache looks at names and parameters, not at content, and a cached step would leave no record in this run.
* Only steps that a second time change nothing outside this run are retried: intake, decision, registration and report write lines to the
  log, which would count as second events. The version of a data set, and a canary's result, are there once whoever writes them again.
* A step gets the secrets that it uses, and no others.
"""

from kfp import dsl

from components.canary import canary_step
from components.decide import decide_step, refuse_step
from components.evaluate import evaluate_step
from components.ingest import ingest_step
from components.register import register_step
from components.report import report_step
from components.scan import scan_step
from components.train_confounder import train_confounder_step
from components.train_deconfounded import train_deconfounded_step
from components.train_undefended import train_undefended_step
from components.validate import validate_step
from components.version import version_step
from pipelines.overlays import DATA, KEY, MEASURING, SMALL, STORE, TRACKING, TRAINING, Needs, place, retried


def on_gpu(task: dsl.PipelineTask, *secrets: str, needs: Needs = TRAINING) -> dsl.PipelineTask:
    """The task, which trains or measures on a GPU and may do so again: it goes on from its checkpoint."""
    return retried(place(task, needs, *secrets))


@dsl.pipeline(name="retrain", description="From a delivery of untrusted images to a verdict, a model and evidence.")
def retrain(
    data: str,
    trusted: str,
    records: str,
    run_id: str,
    workspace: str,
    name: str,
    supplier: str,
    ingest: dict,
    validation: dict,
    model: dict,
    confounder: dict,
    deconfounded: dict,
    training: dict,
    canary: dict,
    gate: dict,
    poison: dict,
    limit: int = 0,
    truth: str = "",
    baseline: bool = False,
    again: bool = False,
    seed: int = 0,
    preset: str = "cbd",
):
    """Takes a delivery in, trains, attacks and measures a model, decides on it and registers it as the decision demands.

    Args:
        data: delivery; local path or s3://bucket/prefix.
        trusted: trusted set that does not come from the supplier.
        records: prefix under which every step leaves its record.
        run_id: names the run in the tracking server and in the decision.
        workspace: folder of the data registry, the tracking store, the audit log and the keys.
        name: name of the registered model, before the digest of its class list.
        supplier: who delivered the data.
        ingest: section of params.yaml.
        validation: section of params.yaml.
        model: section of params.yaml.
        confounder: section of params.yaml.
        deconfounded: section of params.yaml.
        training: section of params.yaml.
        canary: section of params.yaml.
        gate: section of params.yaml, the policy.
        poison: section of params.yaml; an attack makes the run a trial.
        limit: take in at most so many images; 0 is all.
        truth: folder with the ground truth of a poisoned delivery, for measuring only; empty is none.
        baseline: also train without defence on the same data.
        again: train although the data set would be one that was decided on before.
        seed: seed of every generator.
        preset: name of the preset that the sections came from.
    """
    run = {"records": records, "workspace": workspace, "run_id": run_id}
    report = place(report_step(**run), SMALL, KEY, TRACKING, STORE)
    with dsl.ExitHandler(report, name="run"):
        taken = place(
            ingest_step(
                data=data,
                trusted=trusted,
                supplier=supplier,
                limit=limit,
                truth_source=truth,
                again=again,
                name=name,
                seed=seed,
                params=ingest,
                poison=poison,
                **run,
            ),
            DATA,
            KEY,
            STORE,
        ).outputs
        with dsl.If(taken["Output"] == True, name="new"):  # noqa: E712 (an expression for KFP, not for Python)
            dataset = taken["dataset"]
            sets = {"dataset": dataset, "trusted_set": taken["trusted_set"]}
            checking = validate_step(records=records, workspace=workspace, params=validation, **sets)
            validated = retried(place(checking, DATA, KEY)).outputs
            judged = {"policy": gate, "validation": validated["validation"], **sets, **run}
            with dsl.If(validated["Output"] == True, name="usable"):  # noqa: E712
                committed = version_step(records=records, truth=taken["truth"], workspace=workspace, supplier=supplier, **sets)
                versioned = retried(place(committed, SMALL, KEY, STORE))
                common = {"dataset": dataset, "seed": seed, "preset": preset, "model_params": model, "training": training, **run}
                stages = {"confounder_params": confounder, "deconfounded_params": deconfounded}
                rehearsal = canary_step(canary_params=canary, trusted_set=sets["trusted_set"], **stages, **common)
                rehearsed = on_gpu(rehearsal, KEY, STORE).after(versioned)
                views = train_confounder_step(confounder_params=confounder, **common)
                caught = on_gpu(views, KEY, TRACKING, STORE).after(versioned).outputs["confounder"]
                second = train_deconfounded_step(deconfounded_params=deconfounded, confounder=caught, **common)
                trained = on_gpu(second, KEY, TRACKING, STORE).outputs
                plain = train_undefended_step(enabled=baseline, deconfounded_params=deconfounded, **common)
                undefended = on_gpu(plain, KEY, TRACKING, STORE).after(versioned)
                evaluated = on_gpu(
                    evaluate_step(
                        name=name,
                        seed=seed,
                        gate=gate,
                        truth=taken["truth"],
                        confounder=caught,
                        model=trained["model"],
                        evidence=trained["evidence"],
                        undefended=undefended.outputs["model"],
                        **sets,
                        **run,
                    ),
                    KEY,
                    TRACKING,
                    STORE,
                    needs=MEASURING,
                )
                found = {"confounder": caught, "model": trained["model"], "trusted_set": taken["trusted_set"]}
                scanning = scan_step(records=records, workspace=workspace, seed=seed, gate=gate, **found)
                searched = on_gpu(scanning, KEY, STORE, needs=MEASURING).after(evaluated)
                measured = {"evaluation": evaluated.outputs["evaluation"], "canary": rehearsed.outputs["canary"]}
                measured["scanned"] = searched.outputs["scanned"]
                decided = place(decide_step(model=trained["model"], **measured, **judged), SMALL, KEY, STORE).outputs
                registered = {
                    "name": name,
                    "revision": versioned.outputs["revision"],
                    "base": taken["base"],
                    "model": trained["model"],
                    "decision": decided["decision"],
                    "evidence": trained["evidence"],
                    **run,
                }
                with dsl.If(decided["Output"] == "PASS", name="passed"):
                    place(register_step(branch="promote", **registered), SMALL, KEY, TRACKING, STORE)
                with dsl.Elif(decided["Output"] == "REVIEW", name="to-review"):
                    place(register_step(branch="hold", **registered), SMALL, KEY, TRACKING, STORE)
                with dsl.Else(name="not-passed"):
                    place(register_step(branch="record", **registered), SMALL, KEY, TRACKING, STORE)
            with dsl.Else(name="unusable"):
                place(refuse_step(**judged), SMALL, KEY, STORE)
