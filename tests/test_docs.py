"""The docs cannot lie about what can be checked: keys, commands, exit codes, files they link to."""

import re
from pathlib import Path

import pytest
import typer
from pydantic import BaseModel

from livery import cli
from livery.nouns import PluginSpec, Recipe
from livery.nouns.recipe import SECTIONS
from livery.nouns.recipe_file import toml_value
from livery.nouns.reference import recipe_page
from livery.nouns.tuning import SORTS
from livery.studio import Studio

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # pyright: ignore[reportAttributeAccessIssue]
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), ROOT / "recipes" / "starter" / "README.md"]


def test_the_page_of_recipe_keys_is_what_the_nouns_say() -> None:
    assert (DOCS / "recipes.md").read_text() == recipe_page(), "write it again with: make docs"


@pytest.mark.parametrize("noun", [Recipe, *SECTIONS.values(), *SORTS, PluginSpec])
def test_every_recipe_key_is_documented_with_its_meaning_and_default(noun: type[BaseModel]) -> None:
    page = recipe_page()
    for key, field in noun.model_fields.items():
        assert field.description, f"{noun.__name__}.{key} says nothing of itself"
        if key not in SECTIONS:
            default = f"`{toml_value(field.default)}`" if isinstance(field.default, int | float | str) else ""
            assert re.search(rf"^\| `{key}` \|.*\| {re.escape(default)}", page, re.MULTILINE), key
        else:
            assert f"\n## `[{key}]`\n" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert f"| `livery {command}" in (DOCS / "cli.md").read_text()


def test_every_use_case_has_a_command() -> None:
    methods = {name for name, value in vars(Studio).items() if callable(value) and not name.startswith("_")}
    named = {"report" if name == "write_report" else name.replace("_", "-") for name in methods}
    assert named == set(COMMANDS)


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
