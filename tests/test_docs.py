"""The docs cannot lie about what can be checked: keys, commands, exit codes, files they link to."""

import re
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from livery import cli
from livery.nouns import Recipe, TunerSpec
from livery.studio import Studio

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # pyright: ignore[reportAttributeAccessIssue]
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), ROOT / "recipes" / "starter" / "README.md"]


@pytest.mark.parametrize(
    ("noun", "key"), [(noun, key) for noun in (Recipe, TunerSpec) for key in noun.model_fields]
)
def test_every_recipe_key_is_documented_with_its_default(noun: type[BaseModel], key: str) -> None:
    text = (DOCS / "recipes.md").read_text()
    section = text.split(f"### `{key}`\n", 1)
    assert len(section) == 2, f"docs/recipes.md lacks a heading for {key}"
    default = noun.model_fields[key].default
    if isinstance(default, int | float | str) and default != "":
        assert section[1].strip().startswith(f"Default: {default}.")


def test_docs_name_no_recipe_key_that_is_gone() -> None:
    named = set(re.findall(r"^### `(\w+)`", (DOCS / "recipes.md").read_text(), re.MULTILINE))
    assert named == {*Recipe.model_fields, *TunerSpec.model_fields}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert f"| `livery {command}" in (DOCS / "cli.md").read_text()


def test_every_use_case_has_a_command() -> None:
    methods = {name for name, value in vars(Studio).items() if callable(value) and not name.startswith("_")}
    assert {"report" if name == "write_report" else name for name in methods} == set(COMMANDS)


def test_every_room_is_in_the_architecture() -> None:
    text = (DOCS / "architecture.md").read_text()
    rooms = [path for path in (ROOT / "src" / "livery").iterdir() if not path.name.startswith(("_", "."))]
    names = [f"{path.name}/" if path.is_dir() else path.name for path in rooms if path.name != "py.typed"]
    assert len(names) > 10
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text())
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
