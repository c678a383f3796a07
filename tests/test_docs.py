"""What the documentation points at is there."""

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("*/*.md"), *PROJECT.glob("k8s/**/*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub does it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("layer", ["cbd", "components", "pipelines"])
def test_the_tree_names_every_file_and_no_other(layer: str) -> None:
    tree = (PROJECT / "docs" / "architecture.md").read_text().partition("## The tree")[2]
    told = set(re.findall(r"^  (\S+\.\w+) ", tree.partition(f"\n{layer}/")[2].partition("\n\n")[0], re.MULTILINE))
    folder = PROJECT / layer
    files = {path.relative_to(folder) for pattern in ("**/*.py", "**/*.j2", "**/*.css") for path in folder.glob(pattern)}
    assert told == {str(path) for path in files if "compiled" not in path.parts and str(path) != "__init__.py"}
