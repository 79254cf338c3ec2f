"""What a terminal shows: events as progress bars and lines, nouns as cards and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from livery import nouns
from livery.nouns import Event, Noun

if TYPE_CHECKING:
    from livery.doctor import Finding
    from livery.kohya import Imported
    from livery.presets import Preset
    from livery.train.cache_folder import CacheState

MIB = 1 << 20
BLOCKS = "▁▂▃▄▅▆▇█"
STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


class Screen:
    """Shows a stream of events; on a terminal with bars, elsewhere as plain lines."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}
        self._detail = ""  # what the last step said, for the bar that follows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:
            self._progress.stop()

    def show(self, event: Event) -> None:
        match event:
            case nouns.Progress(stage=stage, done=done, total=total):
                self._bar(stage, done, total)
                self._detail = ""
            case nouns.Step(loss=loss):
                self._detail = f"loss {loss:.3f}"
            case nouns.Validation(step=step, loss=loss):
                seen = f", {event.train:.4f} on photos it learns from" if event.train is not None else ""
                self._line(f"  held-out loss {loss:.4f}{seen} at step {step}")
            case nouns.Note(text=text, level=level):
                self._line(escape(text), "yellow" if level == "warning" else "bold")
            case nouns.Refused(file=file, reason=reason):
                self._line(f"refused {escape(file)}: {escape(reason)}", "red")
            case nouns.Trained(adapter=adapter, run=run):
                for line in curves(run):
                    self._line(line)
                self._console.print(card(adapter))
            case (
                nouns.Estimated(estimate=noun)
                | nouns.Ingested(dataset=noun)
                | nouns.Made(adapter=noun)
                | nouns.Evaluated(report=noun)
            ):
                self._console.print(card(noun))
            case nouns.Rates(suggested=suggested):
                said = "no rate brought the loss down" if suggested is None else f"{suggested:g}"
                self._line(f"suggested learning_rate: [bold]{said}[/bold]")
            case nouns.Reduced():
                self._console.print(reduced_table(event))
            case nouns.Checked():
                self._line(checked_line(event), "yellow" if event.unmatched else "")
            case nouns.Written(what=what, path=path):
                self._line(f"{what}: [bold]{escape(path)}[/bold]")
            case nouns.Sample() | nouns.Saved() | nouns.Drawn():
                pass  # the files themselves are named by Written

    def _bar(self, stage: str, done: int, total: int) -> None:
        if not self._tasks:
            self._progress.start()  # not before: without a bar it leaves an empty line
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(escape(stage), total=total or None, detail="")
        self._progress.update(self._tasks[stage], completed=done, total=total or None, detail=self._detail)

    def _line(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, highlight=False)


def curves(run: nouns.Run) -> Iterable[str]:
    """Both curves of a run as a line of blocks each, on one scale, and below them where the kept step is."""
    looks = run.validations
    if len(looks) < 2:
        return
    trained = [look.train for look in looks if look.train is not None]
    known = [look.loss for look in looks] + trained
    low, high = min(known), max(known)
    held_out = [look.loss for look in looks]
    named = [("held out", held_out)] + ([("learned from", trained)] if len(trained) == len(looks) else [])
    for name, values in named:
        bars = "".join(BLOCKS[round((value - low) / ((high - low) or 1) * 7)] for value in values)
        yield f"  {name:>12} {bars}  {values[0]:.4f} -> {values[-1]:.4f}"
    if place := next((i for i, look in enumerate(looks) if look.step == run.chosen_step), None):
        yield f"  {'kept':>12} {' ' * place}^ step {run.chosen_step}"


def card(noun: Noun) -> RenderableType:
    """One noun as a small table, the id first."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row(type(noun).__name__, f"[bold]{noun.id[:12]}[/bold]")
    for name, value in _rows(noun):
        if value:
            table.add_row(name, escape(value))
    return table


def _rows(noun: Noun) -> Iterable[tuple[str, str]]:
    match noun:
        case nouns.Dataset():
            yield "name", noun.name
            counts = [(split, len(noun.split(split))) for split in ("train", "validation", "test")]
            yield "photos", ", ".join(f"{count} {split}" for split, count in counts if count)
            yield "captioned", f"{sum(bool(photo.captions) for photo in noun.photos)} of {len(noun.photos)}"
            yield "licences", _listed({photo.licence or "not said" for photo in noun.photos})
            yield "attribution", _listed({photo.attribution for photo in noun.photos} - {""})
            yield "notes", "; ".join(noun.notes)
        case nouns.Estimate():
            yield "device", noun.device
            held = f"{noun.peak_memory_bytes / 1e9:.2f} GB, give or take {noun.memory_error:.0%}"
            yield "peak memory", held
            parts = sorted(noun.memory_parts.items(), key=lambda part: -part[1])
            yield "made of", ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts if size)
            yield "memory plan", noun.memory.summary
            yield (
                "time",
                f"{_time(noun.seconds)} ({noun.step_seconds:.3g} s a step), to {noun.time_error:.0%}",
            )
            yield "disk", f"{noun.disk_bytes / 1e6:.0f} MB"
            yield "energy", f"{noun.kilowatt_hours:.3g} kWh ({noun.watts_from})"
            cost = "not known: give --price" if noun.cost is None else f"{noun.cost:.2f}"
            yield "money", f"{cost} at {noun.price_per_hour:g} an hour" if noun.price_per_hour else cost
            known = f"{noun.probe_steps} measured steps" if noun.probe_steps else "a formula"
            yield "from", f"{known}, corrected by {noun.earlier_runs} runs" if noun.earlier_runs else known
        case nouns.Adapter(card=facts):
            yield "base", f"{facts.recipe.base} ({facts.family}, {facts.base_sha256[:12]})"
            yield "dataset", (facts.dataset or "not known")[:12]
            yield "origin", facts.origin
            yield "trigger", ", ".join(facts.trigger_words) or "none"
            yield "tuners", "; ".join(spec.summary for spec in facts.recipe.tuners)
            rows = facts.recipe.batch_size * facts.recipe.accumulate
            yield "steps", f"{facts.step} x {rows} rows" if facts.step else ""
            yield "licences", ", ".join(facts.licences)
            yield "attribution", ", ".join(facts.attributions)
        case nouns.Report():
            yield "title", noun.title
            yield "passed", "yes" if noun.passed else "no"
            yield "verdict", "\n".join(noun.verdict)
            yield "adapter", (noun.adapter or "")[:12]
            yield "judge", noun.embedder
        case nouns.Run():
            yield "adapter", noun.adapter[:12]
            yield "steps", str(len(noun.steps))
            yield "held-out loss", ", ".join(f"{look.loss:.4f} at {look.step}" for look in noun.validations)
            yield "took", f"{noun.seconds:.0f} s on {noun.device}"
            yield "peak memory", f"{noun.peak_memory_bytes / 1e9:.1f} GB"
        case nouns.Suite():
            yield "name", noun.name
            yield "asks", f"{len(noun.questions)} prompts x {len(noun.seeds)} seeds"
            yield "style prompts", str(len(noun.style_prompts))
        case _:
            yield "content", noun.model_dump_json()


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def _listed(values: set[str]) -> str:
    return ", ".join(sorted(values))


def checked_line(event: nouns.Checked) -> str:
    """What reading a file back found, in one line."""
    strange = ", ".join(event.unmatched[:3]) + (", ..." if len(event.unmatched) > 3 else "")
    return escape(
        f"read back: {event.matched} tensors matched, {len(event.unmatched)} not"
        + (f" ({strange})" if strange else "")
        + f"; largest difference {event.difference:.3g}, largest change {event.largest:.3g}"
    )


def reduced_table(event: nouns.Reduced) -> Table:
    """What a lower rank kept, the layer that lost most first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    table.add_column(f"kept at rank {event.rank}" if event.rank else "kept", justify="right")
    for name, share in sorted(event.layers.items(), key=lambda row: row[1])[:10]:
        table.add_row(escape(name), f"{share:.2%}")
    if len(event.layers) > 10:
        table.add_row(f"and {len(event.layers) - 10} layers that kept as much or more", "")
    if event.left_out:
        table.add_row(f"left out: {len(event.left_out)} parameters, first {escape(event.left_out[0])}", "")
    table.add_row(f"in total (relative error {(1 - event.kept) ** 0.5:.2%})", f"{event.kept:.2%}")
    return table


def nouns_table(found: Sequence[Noun]) -> Table:
    """Several nouns of one kind, one row each."""
    table = Table(box=None, pad_edge=False)
    for name in ("id", *([name for name, _ in list(_rows(found[0]))[:4]] if found else ())):
        table.add_column(name, overflow="fold")
    for noun in found:
        table.add_row(noun.id[:12], *(escape(value) for _, value in list(_rows(noun))[:4]))
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """What the doctor found."""
    table = Table(box=None, pad_edge=False)
    for name in ("what", "found", "means"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.what, f"[{STYLES[finding.level]}]{escape(finding.found)}[/]", escape(finding.means)
        )
    return table


def cache_table(state: CacheState) -> Table:
    """What a cache holds."""
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    for name in ("entries", "MiB"):
        table.add_column(name, justify="right")
    for share in state.shares:
        table.add_row(share.what, str(share.count), f"{share.bytes / MIB:.1f}")
    count = sum(share.count for share in state.shares)
    table.add_row("all", str(count), f"{state.bytes / MIB:.1f}", style="bold")
    table.add_row("limit", "", f"{state.limit / MIB:.1f}")
    if state.freed:
        table.add_row("freed", "", f"{state.freed / MIB:.1f}")
    return table


def presets_table(found: Sequence[Preset]) -> Table:
    """Presets by name, and when to use each."""
    table = Table(box=None, pad_edge=False)
    for name in ("preset", "when to use it"):
        table.add_column(name, overflow="fold")
    for preset in found:
        table.add_row(preset.name, escape(preset.about))
    return table


def imported_table(found: Imported) -> Table:
    """What became of each key of a configuration from elsewhere."""
    table = Table(box=None, pad_edge=False)
    for name in ("key", "value", "", "in the recipe", "why"):
        table.add_column(name, overflow="fold")
    styles = {"taken": "green", "changed": "yellow", "dropped": "red"}
    for row in found.keys:
        became = f"[{styles[row.became]}]{row.became}[/]"
        table.add_row(escape(row.key), escape(row.value), became, escape(row.ours), escape(row.why))
    table.add_row(f"and {found.idle} keys that are empty or off")
    return table
