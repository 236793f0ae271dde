"""Links between files of the repository lead somewhere, headings included."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "benchmarks/*.md", "docs/*.md", "docs/api/*.md")
    for path in ROOT.glob(pattern)
)


def without_code(text):
    return re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """Names that GitHub gives to headings, and those that MyST is told with ``(name)=``."""
    headings = re.findall(r"^#+ +(.+?) *$", without_code(text), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*names, *re.findall(r"^\(([\w-]+)\)=$", text, flags=re.MULTILINE)}


def has_heading(path, heading):
    """Only pages have headings to link to; without one, the file is enough."""
    if not heading or path.suffix != ".md":
        return True
    return heading in anchors(path.read_text(encoding="utf-8"))


def links(text):
    """Targets within the repository, images included."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def test_readme_and_guides_are_among_the_files():
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "docs/index.md"} <= set(FILES)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("## What `tl.x()` does, and why", "what-tlx-does-and-why"),
        ("(published-figures)=\n", "published-figures"),
    ],
)
def test_names_of_headings(text, name):
    assert name in anchors(text)


def test_headings_within_code_are_none():
    assert anchors("```bash\n# a comment\n```\n") == set()


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_files_and_headings(name):
    path = ROOT / name
    broken = []
    for target in links(path.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or not has_heading(there, heading):
            broken.append(target)
    assert broken == []
