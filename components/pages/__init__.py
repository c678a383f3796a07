"""The report's page: templates and style, and the modules that turn a run into what they show."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from cbd.config import Gate, check_section
from cbd.errors import CbdError, DataError
from cbd.gate import spent
from components.pages.text import clip, visible
from components.summary import Run

View = dict[str, Any]
HERE = Path(__file__).parent
MOST_ATTEMPTS = 50
"""Beyond it no float tells the confidence from 1."""

# What reading a missing, damaged or altered artifact can raise. A page with a gap is worth more than no page.
_FAULTS = (CbdError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, pa.ArrowException)


def render(view: View, template: str = "page.html.j2") -> str:
    """The page as one string: everything escaped, nothing loaded from elsewhere."""
    return _template(template).render(view, style=Markup((HERE / "style.css").read_text()))


def measured(build: Callable[[Run], View], run: Run) -> View:
    """What `build` shows of the run, or `{"missing": why}` if its artifacts are missing or damaged."""
    try:
        return {"missing": None} | build(run)
    except CbdError as error:
        return {"missing": clip(str(error), 300)}
    except _FAULTS as error:
        return {"missing": f"an artifact is damaged ({type(error).__name__}: {error})"[:300]}


def absent(run: Run, step: str, thing: str) -> DataError:
    """The reason why a measurement is not there, in terms of the step that should have made it."""
    if step not in run.records:
        return DataError(f"the step {step} never ran")
    if step in run.stopped:
        return DataError(f"the step {step} did not end well")
    return DataError(f"the step {step} left no {thing} that can be read")


def judged_by(run: Run) -> Gate:
    """The policy of the decision at the confidence of its attempt; where nothing was decided, the defaults at 95 %."""
    if not run.decision:
        return Gate(min_clean_accuracy=0)
    policy, attempt = check_section(Gate, run.decision["policy"], name="gate"), run.decision["attempt"]["number"]
    if not isinstance(attempt, int) or not 1 <= attempt <= MOST_ATTEMPTS:
        raise DataError(f"the decision names attempt {clip(attempt, 40)}, expected one from 1 to {MOST_ATTEMPTS}")
    return spent(policy, attempt)


@functools.cache
def _template(name: str) -> Template:
    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, finalize=visible, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)
