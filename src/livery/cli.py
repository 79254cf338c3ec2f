"""The command line: parse, call one Studio method, show its events. No rule lives here."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from livery.nouns import Evaluated, Event, LiveryError, Note, Noun, Written
from livery.screen import (
    Screen,
    cache_table,
    card,
    findings_table,
    imported_table,
    nouns_table,
    presets_table,
)
from livery.studio import Studio, choose_recipe

EXIT_ERROR, EXIT_NOT_PASSED, EXIT_INTERRUPTED = 1, 3, 130

app = typer.Typer(
    name="livery",
    help="Teach Stable Diffusion a team's own visual identity, and prove that it learned it.",
    epilog="Exit codes: 0 done; 1 something to mend, said in one line; 2 wrong usage; "
    "3 evaluated, and --require-pass was not met; 130 interrupted (the work can go on from there).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Workspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace", "-w", help="Folder that holds everything. \\[default: LIVERY_HOME or .livery]"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON event per line, for scripts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
Network = Annotated[bool, typer.Option("--allow-network", help="Let a hub id be downloaded.")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A TOML file. \\[default: a LoRA on the starter]")]
Data = Annotated[str, typer.Option(help="The Dataset: id, beginning of an id, or alias.")]
Preset = Annotated[str | None, typer.Option(help="Instead of a file: one of `livery presets`.")]
Base = Annotated[
    str | None,
    typer.Option(help="starter, a diffusers folder, a .safetensors file, or a hub id; overrides the recipe."),
]
Masks = Literal["ignore", "alpha", "files"]
Format = Literal["livery", "diffusers", "kohya", "embedding", "learned_embeds", "checkpoint", "folder"]
Dtype = Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Of the tensors in the file.")]
MaxHours = Annotated[
    float | None, typer.Option(min=0, help="Estimate first, and refuse a run that would take longer.")
]
MaxCost = Annotated[
    float | None, typer.Option(min=0, help="Estimate first, and refuse a run that would cost more.")
]
Price = Annotated[
    float | None,
    typer.Option(min=0, help="Of an hour of this machine. \\[default: a usual rent of its card]"),
]
Kind = Literal["Dataset", "Estimate", "Adapter", "Run", "Suite", "Report"]


@app.command()
def ingest(
    source: Annotated[Path, typer.Argument(help="A folder or zip: pictures with captions beside them.")],
    name: Annotated[str | None, typer.Option(help="Name of the dataset. \\[default: the folder's]")] = None,
    background: Annotated[str, typer.Option(help="Colour that transparency is laid on.")] = "#ffffff",
    validation: Annotated[float, typer.Option(help="Share of the pictures to hold out.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Chooses which are held out.")] = 0,
    require_captions: Annotated[
        bool, typer.Option("--require-captions", help="Refuse pictures without a caption.")
    ] = False,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse larger pictures. \\[default: 64 million]")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of pictures that name none.")] = None,
    attribution: Annotated[str | None, typer.Option(help="Whom to credit, likewise.")] = None,
    masks: Annotated[
        Masks, typer.Option(help="Where masks come from: transparency, or cat-masklabel.png beside cat.jpg.")
    ] = "ignore",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Read a folder or zip of pictures into a Dataset."""
    events = _studio(workspace).ingest(
        source,
        name=name,
        background=background,
        validation=validation,
        seed=seed,
        require_captions=require_captions,
        max_pixels=max_pixels,
        licence=licence,
        attribution=attribution,
        masks=masks,
    )
    _show(events, as_json)


@app.command()
def show(
    reference: Annotated[str, typer.Argument(help="An id, its first 4 or more digits, or an alias.")],
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Show what a Dataset, Adapter, Run, Suite or Report is."""
    noun = _studio(workspace).show(reference)
    _print(noun, as_json)


@app.command("list")
def list_nouns(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """List the Datasets, Adapters, Runs, Suites or Reports of the workspace, newest first."""
    nouns = _studio(workspace).list(kind)
    if as_json:
        for noun in nouns:
            _print(noun, as_json)
    else:
        Console().print(nouns_table(nouns))


@app.command()
def train(
    recipe: RecipeFile = None,
    data: Data = ...,  # pyright: ignore[reportArgumentType]
    preset: Preset = None,
    base: Base = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the last checkpoint, or begin again.")
    ] = True,
    max_hours: MaxHours = None,
    max_cost: MaxCost = None,
    price: Price = None,
    processes: Annotated[
        int, typer.Option(min=1, help="On this host, one per card; they share each batch.")
    ] = 1,
    device: Device = "auto",
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Train an Adapter on a Dataset. The same recipe on the same data goes on where it stopped."""
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        _become_several(processes)
    chosen = choose_recipe(recipe, preset, base)
    studio = _studio(workspace, device, allow_network)
    events = studio.train(chosen, data, resume=resume, max_hours=max_hours, max_cost=max_cost, price=price)
    _show(events, as_json)


@app.command()
def estimate(
    recipe: RecipeFile = None,
    data: Data = ...,  # pyright: ignore[reportArgumentType]
    preset: Preset = None,
    base: Base = None,
    probe: Annotated[bool, typer.Option("--probe", help="Measure 20 steps of the run first.")] = False,
    price: Price = None,
    device: Device = "auto",
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training will take before it begins: memory, time, disk, energy, money."""
    studio = _studio(workspace, device, allow_network)
    _show(studio.estimate(choose_recipe(recipe, preset, base), data, probe=probe, price=price), as_json)


@app.command("find-rate")
def find_rate(
    recipe: RecipeFile = None,
    data: Data = ...,  # pyright: ignore[reportArgumentType]
    preset: Preset = None,
    base: Base = None,
    plot: Annotated[Path | None, typer.Option(help="An SVG picture of the curve, written here.")] = None,
    device: Device = "auto",
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Suggest a learning rate: 120 steps of growing rates, judged on held-out photos."""
    studio = _studio(workspace, device, allow_network)
    _show(studio.find_rate(choose_recipe(recipe, preset, base), data, plot=plot), as_json)


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; several are fine.")],
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="Id or alias.")] = None,
    base: Annotated[str | None, typer.Option(help="Without an adapter. \\[default: starter]")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; the next ones count up.")] = 0,
    negative: Annotated[str, typer.Option(help="What the pictures should not show.")] = "",
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps. \\[default: 20]")] = None,
    guidance: Annotated[float | None, typer.Option(min=1, help="How strictly to follow the prompt.")] = None,
    trigger: Annotated[
        bool,
        typer.Option("--trigger/--no-trigger", help="Add the adapter's trigger where a prompt lacks it."),
    ] = True,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where the PNG files go.")] = Path("pictures"),
    device: Device = "auto",
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Draw pictures with an adapter, or with its base alone."""
    events = _studio(workspace, device, allow_network).generate(
        prompts,
        adapter=adapter,
        base=base,
        count=count,
        seed=seed,
        negative=negative,
        steps=steps,
        guidance=guidance,
        trigger=trigger,
        folder=folder,
    )
    _show(events, as_json)


@app.command()
def evaluate(
    adapter: Annotated[str, typer.Argument(help="Id or alias.")],
    suite: Annotated[Path | None, typer.Option(help="A TOML file. \\[default: the held-out photos]")] = None,
    judge: Annotated[str, typer.Option(help="starter, or a folder with a CLIP model.")] = "starter",
    quick: Annotated[bool, typer.Option("--quick", help="Ask a few questions only.")] = False,
    require_pass: Annotated[
        bool, typer.Option("--require-pass", help="Exit with 3 unless tuning beats prompting.")
    ] = False,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where report.html goes.")] = Path("report"),
    device: Device = "auto",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Ask whether an adapter draws like the team: against its base with the best prompt."""
    studio = _studio(workspace, device)
    last = _show(studio.evaluate(adapter, suite=suite, judge=judge, quick=quick), as_json)
    assert isinstance(last, Evaluated)
    _show(studio.write_report(last.report.id, folder), as_json)
    if require_pass and not last.report.passed:
        raise typer.Exit(EXIT_NOT_PASSED)


@app.command()
def report(
    reference: Annotated[str, typer.Argument(help="Id of a Report.")],
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where report.html goes.")] = Path("report"),
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Write the page and the pictures of a Report again."""
    _show(_studio(workspace).write_report(reference, folder), as_json)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="Id or alias.")],
    path: Annotated[Path, typer.Argument(help="The file to write; for some formats a folder.")],
    form: Annotated[Format, typer.Option("--format", "-f", help="See docs/formats.md.")] = "livery",
    rank: Annotated[
        int | None, typer.Option(min=1, help="First bring every layer to plain LoRA of this rank.")
    ] = None,
    dtype: Dtype = "fp32",
    fold_alpha: Annotated[
        bool, typer.Option("--fold-alpha", help="diffusers: for readers that ignore alpha.")
    ] = False,
    tags: Annotated[bool, typer.Option("--tags", help="Tell how often each caption tag occurs.")] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter for another tool; the file is read back and compared."""
    events = _studio(workspace).export(
        adapter, path, format=form, rank=rank, dtype=dtype, fold_alpha=fold_alpha, tags=tags
    )
    _show(events, as_json)


@app.command("import-adapter")
def import_adapter(
    path: Annotated[Path, typer.Argument(help="A LoRA, LoHa, LoKr or Textual Inversion file.")],
    base: Annotated[str, typer.Option(help="The base model it was made for.")] = "starter",
    word: Annotated[str, typer.Option(help="Textual Inversion: the new word. \\[default: the name]")] = "",
    rank: Annotated[int | None, typer.Option(min=1, help="Make it a plain LoRA of this rank.")] = None,
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Read another tool's adapter file into an Adapter."""
    studio = _studio(workspace, allow_network=allow_network)
    _show(studio.import_adapter(path, base=base, word=word, rank=rank), as_json)


@app.command()
def merge(
    adapters: Annotated[list[str], typer.Argument(help="Ids or aliases, of one base.")],
    weights: Annotated[
        list[float] | None, typer.Option("--weight", help="One for each adapter, in order. \\[default: 1]")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the result. \\[default: exact]")] = None,
    into: Annotated[
        Path | None, typer.Option(help="Write a model: a .safetensors checkpoint, or a diffusers folder.")
    ] = None,
    dtype: Dtype = "fp32",
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Add adapters up into one, or into their base's own weights."""
    events = _studio(workspace).merge(adapters, weights=weights or (), rank=rank, into=into, dtype=dtype)
    _show(events, as_json)


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model: a folder, a file, or a hub id.")],
    base: Annotated[str, typer.Option(help="The model it was made from.")] = "starter",
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 16,
    towers: Annotated[
        bool, typer.Option("--towers/--no-towers", help="Also what the text encoders learnt.")
    ] = True,
    allow_network: Network = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Take what a fine-tuned model learnt over its base as a LoRA."""
    studio = _studio(workspace, allow_network=allow_network)
    _show(studio.extract(tuned, base=base, rank=rank, towers=towers), as_json)


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(help="Id or alias.")],
    rank: Annotated[int, typer.Option(min=1, help="The new rank.")] = ...,  # pyright: ignore[reportArgumentType]
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter to a lower rank, and say how much each layer keeps."""
    _show(_studio(workspace).resize(adapter, rank), as_json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where report and pictures go.")] = Path("demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Show that it works, not how well.")] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """The whole way in minutes: 40 OpenMoji pictures become a model that draws like them."""
    _show(_studio(workspace).demo(folder, quick=quick), as_json)


@app.command("import-recipe")
def import_recipe(
    source: Annotated[Path, typer.Argument(help="sd-scripts' TOML, or the JSON that kohya_ss saves.")],
    path: Annotated[Path, typer.Option("--out", "-o", help="The recipe to write.")] = Path("recipe.toml"),
    family: Annotated[
        str | None, typer.Option(help="sd1, sdxl or sd3. \\[default: read from the file]")
    ] = None,
    alpha_as_rank: Annotated[
        bool, typer.Option("--alpha-as-rank", help="Put alpha / rank into the learning rates.")
    ] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Turn a configuration of kohya's trainers into a recipe, and say what became of each key."""
    found = _studio(workspace).import_recipe(source, path, family=family, alpha_as_rank=alpha_as_rank)
    if as_json:
        _print(found, as_json)
    else:
        Console().print(imported_table(found))
        warnings = [Note(level="warning", text=text) for text in found.recipe.warnings()]
        _show([*warnings, Written(what="recipe", path=str(path))], as_json)


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="Print this one's file. \\[default: list all]")] = None,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that ship, or print one: livery presets sdxl-lora > recipe.toml."""
    found = _studio(workspace).presets(name)
    if as_json:
        for preset in found:
            _print(preset, as_json)
    elif name:
        sys.stdout.write(found[0].text)
    else:
        Console().print(presets_table(found))


@app.command()
def cache(
    limit: Annotated[str | None, typer.Option(help="What it may take from now on: 500M, 20G.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Empty it; runs fill it again.")] = False,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Show, bound or empty the cache of encoded pictures and captions."""
    state = _studio(workspace).cache(clear=clear, limit=limit)
    if as_json:
        _print(state, as_json)
    else:
        Console().print(cache_table(state))


@app.command()
def doctor(
    family: Annotated[
        str | None,
        typer.Option(help="Instead: the size of real models. sd1, sdxl, sd3, or one such as sd3.5-large."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="With --family: rank of the LoRA to count.")] = 16,
    workspace: Workspace = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has, and what follows; with --family, what a model has and needs."""
    findings = _studio(workspace).doctor(family, rank)
    if as_json:
        for finding in findings:
            _print(finding, as_json)
    else:
        Console().print(findings_table(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(EXIT_ERROR)


def _studio(workspace: Path | None, device: str = "auto", allow_network: bool = False) -> Studio:
    from livery.store import Store, default_root  # SQLAlchemy is slow to import, and help needs none

    return Studio(Store(workspace or default_root()), device=device, allow_network=allow_network)


def _become_several(processes: int) -> None:
    """Run this same command in several processes through `torchrun`; does not return."""
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *starter, "-m", "livery", *sys.argv[1:]])


def _show(events: Iterable[Event], as_json: bool) -> Event | None:
    """Print the events as they come; the last one is returned. Of several processes only the first prints."""
    last: Event | None = None
    if os.environ.get("RANK", "0") != "0":
        last_of_all = deque(events, maxlen=1)
        return last_of_all[0] if last_of_all else None
    if as_json:
        for last in events:
            sys.stdout.write(last.model_dump_json() + "\n")
            sys.stdout.flush()
        return last
    with Screen() as screen:
        for last in events:
            screen.show(last)
    return last


def _print(noun: Noun, as_json: bool) -> None:
    if as_json:
        body = {"kind": type(noun).__name__, "id": noun.id, **noun.model_dump(mode="json")}
        sys.stdout.write(json.dumps(body, ensure_ascii=False) + "\n")
    else:
        Console().print(card(noun))


def main() -> None:
    """The `livery` command: errors are one line on standard error, never a traceback."""
    try:
        app()
    except LiveryError as error:
        Console(stderr=True).print(f"livery: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        Console(stderr=True).print("livery: interrupted; the same command goes on from here")
        sys.exit(EXIT_INTERRUPTED)
