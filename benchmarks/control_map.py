"""Writes docs/control-map.md from docs/control-map.yaml: which file of an exported run answers which control.

.venv/bin/python benchmarks/control_map.py
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent.parent / "docs"


def render(values: dict[str, Any]) -> str:
    """The page, as Markdown."""
    lines = ["# Control map", "", "<!-- made by benchmarks/control_map.py from control-map.yaml -->", ""]
    lines += [values["disclaimer"], "", f"**{values['not_reread'].partition('. ')[0]}.** {values['not_reread'].partition('. ')[2]}", ""]
    lines += ["Files are those of `cbd audit export` (see [evidence](evidence.md)); `canary.json` is there where a canary was trained.", ""]
    for framework in values["frameworks"]:
        lines += [f"## {framework['name']}", "", f"Edition: {framework['edition']}.", ""]
        lines += ["| control | about | question | answered in | not answered |", "|---|---|---|---|---|"]
        for control in framework["controls"]:
            files = ", ".join(f"`{name}`" for name in control["files"])
            lines.append(f"| {control['id']} | {control['title']} | {control['question']} | {files} | {control['gap']} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Writes the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    (DOCS / "control-map.md").write_text(render(yaml.safe_load((DOCS / "control-map.yaml").read_text())))


if __name__ == "__main__":
    main()
