"""The whole extension surface: five hooks. What ships with livery comes in through them too.

A plug-in is a package with an entry point in the group "livery" that names a module (or an object) with any
of these hooks:

    @livery.plugins.hook
    def register_tuners(register):
        register("mymethod", "mypackage.mymethod:MyTuner")

`register(name, thing)` takes the thing itself or, better, its import path "module:attribute": then nothing is
imported before somebody asks for that name, and `livery --help` stays instant.
"""

import difflib
import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, cast

import pluggy

from livery.nouns import LiveryError

Register = Callable[[str, object], None]

spec = pluggy.HookspecMarker("livery")
hook = pluggy.HookimplMarker("livery")


class Hooks:
    """Everything a plug-in can add."""

    @spec
    def register_families(self, register: Register) -> None:
        """register("sd1", Backbone subclass): a kind of base model that livery can read and tune."""

    @spec
    def register_tuners(self, register: Register) -> None:
        """register("lora", Tuner class): a way to change a base model."""

    @spec
    def register_metrics(self, register: Register) -> None:
        """register("fidelity", function): a question that evaluation asks of pictures."""

    @spec
    def register_captioners(self, register: Register) -> None:
        """register("blip", function): pictures to captions."""

    @spec
    def register_exporters(self, register: Register) -> None:
        """register("onnx", function): an adapter and its base to files for another program."""


class BuiltIn:
    """What ships with livery."""

    @hook
    def register_families(self, register: Register) -> None:
        register("sd1", "livery.models.sd1:SD1")
        register("sd3", "livery.models.sd3:SD3")
        register("sdxl", "livery.models.sdxl:SDXL")

    @hook
    def register_tuners(self, register: Register) -> None:
        for kind in ("lora", "loha", "lokr", "oft"):
            register(kind, "livery.tuners.lowrank:LowRank")
        register("full", "livery.tuners.full:Full")
        register("tokens", "livery.tuners.tokens:Tokens")


class Registry:
    """Things of one sort by name, each imported when it is first asked for."""

    def __init__(self, sort: str) -> None:
        self._sort = sort
        self._things: dict[str, object] = {}

    def register(self, name: str, thing: object) -> None:
        """Add a thing, or the import path "module:attribute" of one; LiveryError when the name is taken."""
        if name in self._things:
            raise LiveryError(f"two plug-ins register the {self._sort} '{name}': uninstall one of them")
        self._things[name] = thing

    def __getitem__(self, name: str) -> Any:
        """The thing of this name. Raises LiveryError with the nearest name, or when it cannot be imported."""
        if name not in self._things:
            raise LiveryError(f"no {self._sort} is called '{name}': {self._hint(name)}")
        thing = self._things[name]
        return self._imported(name, thing) if isinstance(thing, str) else thing

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __len__(self) -> int:
        return len(self._things)

    def _imported(self, name: str, path: str) -> object:
        module, _, attribute = path.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise LiveryError(f"the {self._sort} '{name}' cannot be loaded from {path}: {error}") from error

    def _hint(self, name: str) -> str:
        if near := difflib.get_close_matches(name, self._things, n=1, cutoff=0.5):
            return f"did you mean '{near[0]}'?"
        return f"there are {', '.join(self)}." if self._things else "install a plug-in that brings one."


@cache
def manager() -> pluggy.PluginManager:
    """The plug-ins of this process: what ships with livery, then every installed package that offers some."""
    plugins = pluggy.PluginManager("livery")
    plugins.add_hookspecs(Hooks)
    plugins.register(BuiltIn(), name="livery")
    try:
        plugins.load_setuptools_entrypoints("livery")
    except Exception as error:
        raise LiveryError(
            f"an installed plug-in cannot be loaded, update or uninstall it: {error}"
        ) from error
    plugins.check_pending()
    return plugins


def families() -> Registry:
    """Backbone classes by family name."""
    return _collect("family", "register_families")


def tuners() -> Registry:
    """Tuner classes by kind."""
    return _collect("tuner", "register_tuners")


def metrics() -> Registry:
    """Metric functions by name."""
    return _collect("metric", "register_metrics")


def captioners() -> Registry:
    """Captioner functions by name."""
    return _collect("captioner", "register_captioners")


def exporters() -> Registry:
    """Exporter functions by format."""
    return _collect("exporter", "register_exporters")


def _collect(sort: str, hook_name: str) -> Registry:
    registry = Registry(sort)
    call = cast(Callable[..., object], getattr(manager().hook, hook_name))
    call(register=registry.register)
    return registry
