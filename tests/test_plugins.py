import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from livery import plugins
from livery.nouns import LiveryError
from livery.plugins import Register, Registry


class Sample:
    """What somebody else's package may offer."""

    @plugins.hook
    def register_tuners(self, register: Register) -> None:
        register("stamp", "json:dumps")
        register("broken", "json:nothing_there")
        register("missing", "no_such_package:Tuner")

    @plugins.hook
    def register_metrics(self, register: Register) -> None:
        register("redness", max)


@pytest.fixture
def sample() -> Iterator[None]:
    plugin = Sample()
    plugins.manager().register(plugin)
    yield
    plugins.manager().unregister(plugin)


def test_what_ships_is_registered_like_any_other() -> None:
    assert "sd1" in plugins.families()
    assert "lora" in plugins.tuners()


@pytest.mark.usefixtures("sample")
def test_a_plug_in_adds_by_path_and_by_value() -> None:
    import json

    assert plugins.tuners()["stamp"] is json.dumps
    assert plugins.metrics()["redness"] is max
    assert list(plugins.tuners()) == sorted(plugins.tuners())
    assert len(plugins.metrics()) == 1


def test_an_unregistered_plug_in_is_gone() -> None:
    assert "stamp" not in plugins.tuners()


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(LiveryError, match=r"no tuner is called 'lorra': did you mean 'lora'\?"):
        plugins.tuners()["lorra"]
    with pytest.raises(LiveryError, match="no family is called 'zzz': there are sd1"):
        plugins.families()["zzz"]
    with pytest.raises(LiveryError, match="install a plug-in"):
        Registry("captioner")["blip"]


@pytest.mark.usefixtures("sample")
@pytest.mark.parametrize("name", ["broken", "missing"])
def test_a_broken_path_is_named(name: str) -> None:
    with pytest.raises(LiveryError, match=f"the tuner '{name}' cannot be loaded from"):
        plugins.tuners()[name]


def test_a_name_can_be_taken_once() -> None:
    registry = Registry("tuner")
    registry.register("stamp", max)
    with pytest.raises(LiveryError, match="two plug-ins register the tuner 'stamp'"):
        registry.register("stamp", min)


def test_a_package_that_fails_to_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        metadata = {"name": "bad"}  # noqa: RUF012
        entry_points = (EntryPoint(name="bad", value="no_such_package", group="livery"),)

    monkeypatch.setattr("importlib.metadata.distributions", lambda: [Distribution()])
    with pytest.raises(LiveryError, match="no_such_package"):
        plugins.manager.__wrapped__()


def test_looking_at_names_imports_no_torch() -> None:
    code = (
        "import sys; from livery import plugins; list(plugins.families()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_everything_that_ships_can_be_imported() -> None:
    for registry in (plugins.families(), plugins.tuners(), plugins.metrics()):
        assert all(registry[name] for name in registry)
