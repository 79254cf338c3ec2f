"""Every test here that takes `family` and `tuner` runs for each pair, and fills a column of one table.

    @pytest.mark.column("exports")
    def test_what_is_exported_is_read_back(base: Base, story: Story): ...

`base` is the family's tiny model (a test must leave it as it found it), `story` what a short training of the
tuner on it did. The table is printed at the end. A column that `COLUMNS` names must be full when the whole
folder has run: an empty cell fails the run. A cell that cannot be is skipped, and says why.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.matrix.cells import FAMILIES, TUNERS, Base, Story
from tests.matrix.table import Table

COLUMNS = [
    "attaching changes nothing",
    "learns",
    "strength 0 is the base",
    "saves and reloads",
    "detaches bit for bit",
    "resumes bit for bit",
    "resumes after kill -9",
    "exports and comes back",
    "diffusers draws the same",
]
TABLE = pytest.StashKey[Table]()
PARTIAL = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "column(name): a property in the table of families and tuners")
    rows = [(family, tuner) for family in FAMILIES for tuner in TUNERS]
    config.stash[TABLE] = Table(rows, list(COLUMNS))
    config.stash[PARTIAL] = any(".py" in argument for argument in config.args)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What a pair shares is made once, whatever the order."""
    if {"family", "tuner"} <= set(metafunc.fixturenames):
        metafunc.parametrize("family", FAMILIES, scope="session")
        metafunc.parametrize("tuner", list(TUNERS), scope="session")


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items[:1]:
        item.config.stash[PARTIAL] = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report: pytest.TestReport = yield
    marker, callspec = item.get_closest_marker("column"), getattr(item, "callspec", None)
    if marker and callspec and (report.when == "call" or report.outcome != "passed"):
        table, column = item.config.stash[TABLE], marker.args[0]
        if column not in table.columns:
            table.columns.append(column)
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        family, tuner = callspec.params["family"], callspec.params["tuner"]
        table.record(family, tuner, column, report.outcome, reason.removeprefix("Skipped: "))
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    table = session.config.stash[TABLE]
    whole = table.cells and not session.config.stash[PARTIAL] and not session.config.option.collectonly
    if whole and table.empty() and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if not table.cells:
        return
    terminalreporter.section("family x tuner x property")
    for line in table.lines():
        terminalreporter.write_line(line)
    if not config.stash[PARTIAL]:
        for family, tuner, column in table.empty():
            terminalreporter.write_line(f"EMPTY {family}, {tuner}: {column}", red=True)


@pytest.fixture(scope="session")
def _bases() -> dict[str, Base]:
    return {}


@pytest.fixture
def base(family: str, _bases: dict[str, Base]) -> Iterator[Base]:
    """The family's tiny model. A test that leaves it changed fails, and the next one gets a new one."""
    if family not in _bases:
        _bases[family] = Base.of(family)
    yield _bases[family]
    if not _bases[family].untouched():
        del _bases[family]
        pytest.fail("the base is not what it was before the test")


@pytest.fixture(scope="session")
def _stories() -> dict[tuple[str, str], Story]:
    return {}


@pytest.fixture
def story(family: str, tuner: str, base: Base, _stories: dict[tuple[str, str], Story]) -> Story:
    """A short training of this tuner on this family, done once."""
    if (family, tuner) not in _stories:
        _stories[family, tuner] = Story.of(base, TUNERS[tuner](base.backbone))
    return _stories[family, tuner]
