"""A pipeline of two steps and an exit handler, for tests of the embedded runner alone."""

from kfp import dsl

from components.records import kfp_component


@kfp_component
def ingest_step(records: str, deed: str, made: dsl.Output[dsl.Artifact]):
    """Does what `deed` says while its record is open."""
    import os
    import signal
    import sys
    import time
    from pathlib import Path

    from cbd.errors import DataError
    from components.records import progress, step

    with step(records, "ingest") as outputs:
        Path(made.path).write_text(deed)
        (Path(records) / "ingest.pid").write_text(str(os.getpid()))
        progress("ingest", 1, 2, "half \x1b[2J way")
        if deed == "bytes":
            sys.stdout.buffer.write(b"\xff\xfe no text\n")
            sys.stdout.flush()
        if deed == "fail":
            raise DataError("the delivery is empty; check the path")
        if deed == "crash":
            raise ZeroDivisionError("no one told me")
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "kill the runner":
            os.kill(os.getsid(0), signal.SIGKILL)
            time.sleep(60)
        if deed == "linger":
            time.sleep(0.5)
        if deed == "sleep":
            time.sleep(60)
        outputs["settings"] = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "MLFLOW_DISABLE_TELEMETRY", "TMPDIR")}


@kfp_component
def decide_step(records: str, made: dsl.Input[dsl.Artifact], verdict: str) -> str:
    """Says `verdict`."""
    from pathlib import Path

    from components.records import step

    with step(records, "decide") as outputs:
        outputs |= {"verdict": verdict, "made": Path(made.path).read_text()}
    return verdict


@kfp_component
def register_step(records: str, made: dsl.Input[dsl.Artifact], branch: str):
    """Says which branch ran."""
    from components.records import step

    with step(records, "register") as outputs:
        outputs["branch"] = branch


@kfp_component
def report_step(records: str, status: dsl.PipelineTaskFinalStatus):
    """Says how the pipeline ended."""
    from components.records import step

    with step(records, "report") as outputs:
        outputs["state"] = status.state


@dsl.pipeline(name="stub")
def stub(records: str, deed: str, verdict: str = "PASS"):
    """The shape of `retrain`, without its substance."""
    report = report_step(records=records)
    with dsl.ExitHandler(report):
        made = ingest_step(records=records, deed=deed).outputs["made"]
        decided = decide_step(records=records, made=made, verdict=verdict)
        with dsl.If(decided.output == "PASS"):
            register_step(records=records, made=made, branch="promote")
        with dsl.Elif(decided.output == "REVIEW"):
            register_step(records=records, made=made, branch="hold")
        with dsl.Else():
            register_step(records=records, made=made, branch="record")
