"""Studio: every use case of livery, one method each. Doors parse, call a method, and show its events.

Methods import the rooms they need when they are called, so a door that only prints help stays light.
"""

from __future__ import annotations

import datetime
import io
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from livery.files import write_bytes
from livery.nouns import (
    Adapter,
    AdapterCard,
    Dataset,
    Drawn,
    Estimate,
    Estimated,
    Evaluated,
    Event,
    Ingested,
    LiveryError,
    Made,
    Note,
    Noun,
    Photo,
    Progress,
    Rates,
    Recipe,
    Report,
    Run,
    Step,
    Suite,
    Trained,
    Written,
    read_recipe,
    recipe_toml,
    sha256_of,
    with_trigger,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from livery.doctor import Finding
    from livery.evaluate.embedder import ClipEmbedder
    from livery.evaluate.run import Tools
    from livery.generate.engine import Engine
    from livery.kohya import Imported
    from livery.models.backbone import Backbone
    from livery.presets import Preset
    from livery.store import Store
    from livery.train.cache_folder import CacheState
    from livery.tuners.making import Held

DEMO_ALIAS = "demo"


class Studio:
    """A workspace and everything that can be done in it."""

    def __init__(self, store: Store, *, device: str = "auto", allow_network: bool = False) -> None:
        """`device` is a torch device or "auto"; hub ids are fetched only when `allow_network`."""
        self.store = store
        self._device, self._allow_network = device, allow_network
        self._loaded: tuple[str, Backbone] | None = None
        self._loaded_sha256 = ""

    # ------------------------------------------------------------------------- data

    def ingest(
        self,
        source: Path,
        *,
        name: str | None = None,
        background: str = "#ffffff",
        max_pixels: int | None = None,
        require_captions: bool = False,
        validation: float = 0.0,
        seed: int = 0,
        licence: str | None = None,
        attribution: str | None = None,
        masks: Literal["ignore", "alpha", "files"] = "ignore",
    ) -> Iterator[Event]:
        """A folder or zip of pictures becomes a Dataset; the last event is Ingested."""
        from livery.data.ingest import MAX_PIXELS, ingest

        events = ingest(
            source,
            self.store.put_blob,
            name=name,
            background=background,
            max_pixels=max_pixels or MAX_PIXELS,
            require_captions=require_captions,
            validation=validation,
            seed=seed,
            licence=licence,
            attribution=attribution,
            masks=masks,
        )
        for event in events:
            if isinstance(event, Ingested):
                self.store.put(event.dataset)
            yield event

    def show(self, reference: str) -> Noun:
        """The noun with this id, beginning of an id, or alias."""
        return self.store.find(reference)

    def list(
        self, kind: Literal["Dataset", "Estimate", "Adapter", "Run", "Suite", "Report"]
    ) -> tuple[Noun, ...]:
        """All nouns of one kind, newest first."""
        kinds: dict[str, type[Noun]] = {
            noun.__name__: noun for noun in (Dataset, Estimate, Adapter, Run, Suite, Report)
        }
        return self.store.list(kinds[kind])

    # ------------------------------------------------------------------------- train

    def estimate(
        self, recipe: Recipe, data: str, *, probe: bool = False, price: float | None = None
    ) -> Iterator[Event]:
        """What training this recipe on this Dataset will take; the last event is Estimated.

        `probe` measures 20 steps of it; `price` is what an hour of this machine costs, in any currency.
        Runs of the same kind that were estimated before they were done correct the numbers.
        """
        from livery.train.estimate import Probe, estimate

        dataset = self.store.get(Dataset, data)
        recipe = recipe.fitted(sum(not photo.prior for photo in dataset.split("train")))
        backbone = self._backbone(recipe.base, recipe.family)
        measured: Probe | None = None
        if probe:
            from livery.train.probe import probe as probing

            for event in probing(recipe, backbone, dataset, self._pixels, self.store.root / "cache"):
                if isinstance(event, Probe):
                    measured = event
                else:
                    yield event
            backbone = self._backbone(recipe.base, recipe.family)
        found = estimate(
            recipe, backbone, dataset, earlier=self._earlier(), probe=measured, price_per_hour=price
        )
        self.store.put(found)
        yield Estimated(estimate=found)

    def train(
        self,
        recipe: Recipe,
        data: str,
        *,
        resume: bool = True,
        max_hours: float | None = None,
        max_cost: float | None = None,
        price: float | None = None,
    ) -> Iterator[Event]:
        """A recipe and a Dataset become an Adapter; the last event is Trained.

        The same recipe on the same data and base is the same run: it goes on where it stopped. Started by
        `torchrun`, the processes share each batch, and the first alone tells Trained. With
        `max_hours` or `max_cost` it is estimated first, and a run above them raises LiveryError; `price` is
        what an hour of this machine costs.
        """
        from livery.train.estimate import compared, refuse
        from livery.train.loop import train
        from livery.train.parallel import peers
        from livery.tuners.tuner import build

        dataset = self.store.get(Dataset, data)
        recipe = recipe.fitted(sum(not photo.prior for photo in dataset.split("train")))
        for spec in recipe.tuners:
            build(spec)  # a kind that nobody registered is refused before any weight is read
        if max_hours is not None or max_cost is not None:
            for event in self.estimate(recipe, data, price=price):
                yield event
                if isinstance(event, Estimated):
                    refuse(event.estimate, max_hours, max_cost)
        backbone = self._backbone(recipe.base, recipe.family)
        yield from (Note(text=note) for note in backbone.notes)
        run_id = sha256_of({"recipe": recipe.id, "dataset": dataset.id, "base": backbone.sha256})
        with peers(backbone.device) as group:
            for event in train(
                recipe,
                backbone,
                dataset,
                pixels=self._pixels,
                folder=self.store.run_folder(run_id),
                cache=self.store.root / "cache",
                put_blob=self.store.put_blob,
                draw=self._sampler(backbone),
                resume=resume,
                peers=group,
            ):
                if isinstance(event, Trained):
                    self.store.put(event.adapter)
                    self.store.put(event.run)
                    if estimated := self._estimates().get((event.run.recipe.id, event.run.dataset)):
                        yield Note(text=compared(estimated, event.run))
                yield event
                if isinstance(event, Step):
                    yield Progress(stage="train", done=event.step, total=recipe.steps)

    def find_rate(self, recipe: Recipe, data: str, *, plot: Path | None = None) -> Iterator[Event]:
        """Try growing learning rates for a recipe on a Dataset; the last events are Rates and, with `plot`,
        the SVG picture that was written.
        """
        from livery.train.rate_finder import chart, find_rate

        dataset = self.store.get(Dataset, data)
        backbone = self._backbone(recipe.base, recipe.family)
        for event in find_rate(
            recipe, backbone, dataset, pixels=self._pixels, cache=self.store.root / "cache"
        ):
            yield event
            if plot and isinstance(event, Rates):
                write_bytes(plot, chart(event).encode())
                yield Written(what="curve", path=str(plot))

    # ------------------------------------------------------------------------- files of other tools

    def export(
        self,
        adapter: str,
        path: Path,
        *,
        format: str = "livery",  # noqa: A002, as everybody calls it
        rank: int | None = None,
        dtype: str = "fp32",
        fold_alpha: bool = False,
        tags: bool = False,
    ) -> Iterator[Event]:
        """An adapter as a file for another tool, read back and compared before it gets its name.

        "livery" copies the file as it is, which diffusers reads too where it is a LoRA. `rank` brings other
        kinds to plain LoRA; `tags` tells the counts of caption tags. The last event is Written.
        """
        found = self.store.get(Adapter, adapter)
        if format == "livery":
            if path.suffix != ".safetensors":
                raise LiveryError(f"{path}: format livery writes a file that ends in .safetensors; name one")
            write_bytes(path, self.store.read_blob(found.sha256))
            yield Written(what="adapter", path=str(path))
            return
        from livery.tuners.export import Style, export_adapter

        held = self._held(found)
        counts = self._tags(found) if tags else None
        style = Style(rank=rank, dtype=dtype, fold_alpha=fold_alpha, date=today(), tags=counts)
        base = self._backbone(found.card.recipe.base, found.card.family)
        yield from export_adapter(path, held.card, held.state, base, format, style)

    def import_adapter(
        self, path: Path, *, base: str = "starter", word: str = "", rank: int | None = None
    ) -> Iterator[Event]:
        """A LoRA, LoHa, LoKr or Textual Inversion file of any tool becomes an Adapter of this base.

        `word` is what a Textual Inversion file teaches, by default its name; `rank` makes a plain LoRA of
        another kind. The last event is Made.
        """
        from livery.tuners.importing import import_adapter

        backbone = self._backbone(base)
        card, state, content = import_adapter(path, backbone, base=base, word=word, rank=rank)
        strange = "".join(f", {name}" for name in content.unmatched[:5])
        yield Note(
            level="warning" if content.unmatched else "info",
            text=f"{content.matched} tensors matched, {len(content.unmatched)} not{strange}",
        )
        yield from [content.reduced] if content.reduced else []
        yield self._keep_adapter(card, state)

    def merge(
        self,
        adapters: Sequence[str],
        *,
        weights: Sequence[float] = (),
        rank: int | None = None,
        into: Path | None = None,
        dtype: str = "fp32",
    ) -> Iterator[Event]:
        """Adapters of one base, each times its weight, as one; the last event is Made.

        Exactly, or at a given `rank`. With `into` instead as a model of their own: a checkpoint file, or a
        diffusers folder; the last event is Written.
        """
        from livery.tuners.export import words_left
        from livery.tuners.making import check_bases, merge_adapters
        from livery.tuners.merging import write_merged

        strengths = list(weights) or [1.0] * len(adapters)
        if not adapters or len(strengths) != len(adapters):
            raise LiveryError(f"{len(adapters)} adapters and {len(strengths)} weights: give one for each")
        held = [self._held(self.store.get(Adapter, each)) for each in adapters]
        base = held[0].card.recipe.base
        backbone = self._backbone(base, held[0].card.family)
        items = list(zip(held, strengths, strict=True))
        if into is not None:
            check_bases(held, backbone)
            for each in held:
                yield from words_left(each.state)
            yield from write_merged(into, backbone, [(each.layers, w) for each, w in items], dtype)
            return
        card, state, report = merge_adapters(items, backbone, base, rank)
        yield from [report] if report else []
        yield self._keep_adapter(card, state)

    def extract(
        self, tuned: str, *, base: str = "starter", rank: int = 16, towers: bool = True
    ) -> Iterator[Event]:
        """What a fine-tuned model learnt over its base, as a LoRA of this rank; the last event is Made."""
        from livery.models.load import load_backbone
        from livery.tuners.making import extract_adapter

        backbone = self._backbone(base)
        other = load_backbone(tuned, backbone.family, self._place(), self._allow_network)
        card, state, report = extract_adapter(other, tuned, backbone, base, rank, towers=towers)
        yield from [report] if report else []
        yield self._keep_adapter(card, state)

    def resize(self, adapter: str, rank: int) -> Iterator[Event]:
        """An adapter at a lower rank, as plain LoRA, and how much each layer kept; the last event is Made."""
        from livery.tuners.making import resize_adapter

        held = self._held(self.store.get(Adapter, adapter))
        base = held.card.recipe.base
        card, state, report = resize_adapter(held, self._backbone(base, held.card.family), base, rank)
        yield from [report] if report else []
        yield self._keep_adapter(card, state)

    # ------------------------------------------------------------------------- caches

    def cache(self, *, clear: bool = False, limit: str | None = None) -> CacheState:
        """What the encodings of pictures and captions take on disk; `limit` ("20G") holds from now on.

        Entries unused for longest go first. Whatever went is made again when a run needs it.
        """
        from livery.train import cache_folder

        folder = self.store.root / "cache"
        if limit is not None:
            cache_folder.set_limit(folder, cache_folder.size_of(limit))
        before = cache_folder.look(folder)
        if clear:
            cache_folder.clear(folder)
        elif limit is not None:
            cache_folder.shrink(folder, before.limit)
        after = cache_folder.look(folder)
        return after.model_copy(update={"freed": before.bytes - after.bytes})

    # ------------------------------------------------------------------------- generate

    def generate(
        self,
        prompts: Sequence[str],
        *,
        adapter: str | None = None,
        base: str | None = None,
        count: int = 1,
        seed: int = 0,
        negative: str = "",
        steps: int | None = None,
        guidance: float | None = None,
        trigger: bool = True,
        folder: Path | None = None,
    ) -> Iterator[Event]:
        """`count` pictures per prompt, with seeds from `seed` on; each is Drawn.

        With an adapter the base is the one it was trained on, and its trigger words are added where a
        prompt lacks them, unless `trigger` is False: to see what became of the class. Pictures also go into
        `folder` as PNG files that name their origin.
        """
        from livery.generate.engine import GUIDANCE, STEPS, Engine, png_bytes

        found = self.store.get(Adapter, adapter) if adapter else None
        recipe = found.card.recipe if found else None
        engine = Engine(self._backbone(base or (recipe.base if recipe else "starter")))
        yield from (Note(text=note) for note in engine.backbone.notes)
        rows = [
            (with_trigger(p, recipe.trigger if recipe and trigger else ""), seed + n)
            for p in prompts
            for n in range(count)
        ]
        origin = {"software": "livery", "adapter": found.id if found else "", "base": engine.backbone.sha256}
        with self._attached(engine, found):
            images = engine.generate(
                [prompt for prompt, _ in rows],
                [number for _, number in rows],
                negative=negative,
                steps=steps or STEPS,
                guidance=GUIDANCE if guidance is None else guidance,
            )
            for index, ((prompt, number), image) in enumerate(zip(rows, images, strict=True)):
                png = png_bytes(image, {**origin, "prompt": prompt, "seed": str(number)})
                sha256 = self.store.put_blob(png)
                yield Drawn(prompt=prompt, seed=number, adapter=found.id if found else None, sha256=sha256)
                if folder:
                    path = folder / f"{index:04d}-{slug(prompt)}-{number}.png"
                    write_bytes(path, png)
                    yield Written(what="picture", path=str(path))

    # ------------------------------------------------------------------------- evaluate

    def evaluate(
        self,
        adapter: str,
        *,
        suite: Path | None = None,
        judge: str = "starter",
        quick: bool = False,
        title: str | None = None,
    ) -> Iterator[Event]:
        """An Adapter on a suite, against its base with the best prompt; the last event is Evaluated.

        Without a suite, the held-out photos of the adapter's dataset are asked. `quick` asks a few.
        """
        from livery.evaluate import run as evaluation
        from livery.evaluate.embedder import load_embedder
        from livery.evaluate.suite import derive_suite, read_suite

        found = self.store.get(Adapter, adapter)
        dataset = self._dataset_of(found)
        asked = read_suite(suite, self._put_picture) if suite else derive_suite(dataset)
        asked = evaluation.quick(asked) if quick else asked
        self.store.put(asked)
        embedder = load_embedder(judge)
        run = self._run_of(found)
        subject = evaluation.Subject(
            title=title or f"{dataset.name}: does it draw like the team?",
            base_sha256=found.card.base_sha256,
            adapter=found.id,
            dataset=dataset.id,
            run=run.id if run else None,
            trigger=found.card.recipe.trigger,
            train_photos=tuple(photo.sha256 for photo in dataset.split("train")),
        )
        tools = self._evaluation_tools(found, embedder)
        for event in evaluation.evaluate(asked, subject, tools):
            if isinstance(event, Evaluated):
                reliability = embedder.card.reliability
                report = self._with_page(event.report, asked, dataset, run, reliability)
                self.store.put(report)
                event = Evaluated(report=report)
            yield event

    def write_report(self, report: str, folder: Path) -> Iterator[Written]:
        """The page of a report and its pictures, as files to open and to send."""
        found = self.store.get(Report, report)
        if found.html is None:
            raise LiveryError(f"report {found.id[:12]} has no page: evaluate again")
        write_bytes(folder / "report.html", self.store.read_blob(found.html))
        for picture in found.pictures:
            name = f"{slug(picture.concept or picture.prompt)}-{picture.seed}.png"
            write_bytes(folder / "pictures" / picture.arm / name, self.store.read_blob(picture.sha256))
        yield Written(what="report", path=str(folder / "report.html"))
        yield Written(what="pictures", path=str(folder / "pictures"))

    # ------------------------------------------------------------------------- the whole way

    def demo(self, folder: Path, *, quick: bool = False) -> Iterator[Event]:
        """The main job on the sample brand that ships: ingest, train, evaluate, report.

        `quick` trains less and asks less: it shows that everything works, not how well.
        """
        from livery.starter import DEMO_RECIPE, brand_folder

        brand = brand_folder()
        yield Note(text="1 of 3: reading 60 OpenMoji pictures; the built-in model has never seen this brand")
        dataset: Dataset | None = None
        for event in self.ingest(brand / "photos", name="OpenMoji", require_captions=True):
            dataset = event.dataset if isinstance(event, Ingested) else dataset
            yield event
        assert dataset is not None, "ingest ends with Ingested or raises"
        recipe = read_recipe(DEMO_RECIPE)
        if quick:
            recipe = recipe.model_copy(update={"steps": 40, "validate_every": 20})
        yield Note(text=f"2 of 3: training a LoRA on its 40 training pictures, {recipe.steps} steps")
        adapter: Adapter | None = None
        for event in self.train(recipe, dataset.id):
            adapter = event.adapter if isinstance(event, Trained) else adapter
            yield event
        if adapter is None:
            return
        self.store.alias(DEMO_ALIAS, adapter.id)
        yield Note(
            text="3 of 3: asking base and tuned model for things that the brand drew, and they did not see"
        )
        title = "OpenMoji, learned from 40 pictures"
        for event in self.evaluate(adapter.id, suite=brand / "suite.toml", quick=quick, title=title):
            yield event
            if isinstance(event, Evaluated):
                yield from self.write_report(event.report.id, folder)

    def import_recipe(
        self, source: Path, path: Path, *, family: str | None = None, alpha_as_rank: bool = False
    ) -> Imported:
        """A kohya configuration as a recipe file at `path`, with what became of each of its keys."""
        from livery.kohya import import_recipe

        if path.exists():
            raise LiveryError(f"{path} is there already: name another file for the recipe")
        found = import_recipe(source, family=family, alpha_as_rank=alpha_as_rank)
        head = f"# Made from {source.name} by `livery import-recipe`; what is not here has livery's defaults."
        write_bytes(path, recipe_toml(found.recipe, head).encode())
        return found

    def presets(self, name: str | None = None) -> tuple[Preset, ...]:
        """The recipes that ship, one per family and method, or the one of this name."""
        from livery import presets

        return tuple(presets.describe(each) for each in ([name] if name else presets.names()))

    def doctor(self, model: str | None = None, rank: int = 16) -> tuple[Finding, ...]:
        """What this machine has, and what follows for the user.

        Or, when a family or one of its models is named, a dry run: parameters of the real parts, and the size
        of a LoRA of this rank.
        """
        from livery.doctor import dry_run, examine

        return tuple(examine(self.store.root) if model is None else dry_run(model, rank))

    # ------------------------------------------------------------------------- inside

    def _backbone(self, base: str, family: str | None = None) -> Backbone:
        """The base model, kept for the next call: loading is slow.

        One whose weights a memory plan has rounded has another hash than when it was loaded: it is read anew.
        """
        if self._loaded is None or self._loaded[0] != base or self._loaded[1].sha256 != self._loaded_sha256:
            from livery.models.load import load_backbone

            self._loaded = None  # let go of the other base before this one takes its memory
            backbone = load_backbone(base, family, self._place(), self._allow_network)
            self._loaded, self._loaded_sha256 = (base, backbone), backbone.sha256
        return self._loaded[1]

    def _estimates(self) -> dict[tuple[str, str], Estimate]:
        """The newest estimate of each (recipe, dataset)."""
        found = reversed(self.store.list(Estimate))
        return {(one.recipe, one.dataset): one for one in found}

    def _earlier(self) -> Sequence[tuple[Estimate, Run]]:
        """Estimates and the runs that followed, newest first."""
        known = self._estimates()
        runs = [run for run in self.store.list(Run) if (run.recipe.id, run.dataset) in known]
        return [(known[run.recipe.id, run.dataset], run) for run in runs]

    def _place(self) -> str:
        """The device; of several processes on one host, each has a card of its own."""
        if self._device not in ("auto", "cuda"):
            return self._device
        import torch

        from livery.train.parallel import local_rank

        if self._device == "auto" and not torch.cuda.is_available():
            return "cpu"
        card = local_rank()
        return "cuda" if card is None else f"cuda:{card}"

    def _pixels(self, photo: Photo) -> Image:
        return self._picture(photo.sha256)

    def _picture(self, sha256: str) -> Image:
        from PIL import Image

        return Image.open(io.BytesIO(self.store.read_blob(sha256))).convert("RGB")

    def _put_picture(self, path: Path) -> str:
        """A picture of a suite goes the way of every other: cleaned, on white."""
        from livery.data.decode import clean
        from livery.data.ingest import MAX_PIXELS
        from livery.data.source import Unreadable

        try:
            return self.store.put_blob(clean(path.read_bytes(), (255, 255, 255), MAX_PIXELS).png)
        except Unreadable as error:
            raise LiveryError(f"{path}: {error}") from error

    def _sampler(self, backbone: Backbone) -> Callable[[Sequence[str], Sequence[int]], Iterator[Image]]:
        from livery.generate.engine import Engine

        return Engine(backbone).generate

    @contextmanager
    def _attached(self, engine: Engine, adapter: Adapter | None) -> Generator[None]:
        if adapter is None:
            yield
            return
        with engine.adapter(self.store.blob_path(adapter.sha256)):
            yield

    def _evaluation_tools(self, adapter: Adapter, embedder: ClipEmbedder) -> Tools:
        """What evaluation works with; its engine draws with the adapter attached or without."""
        from livery.evaluate.run import Tools
        from livery.generate.engine import GUIDANCE, STEPS, Engine

        engine = Engine(self._backbone(adapter.card.recipe.base, adapter.card.family))

        def generate(model: str, prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[Image]:
            with self._attached(engine, adapter if model == "tuned" else None):
                yield from engine.generate(prompts, seeds)

        return Tools(
            embedder=embedder,
            generate=generate,
            read_picture=self._picture,
            put_blob=self.store.put_blob,
            memory=self.store.root / "drawn",
            drawing=f"dpm++ sampler, {STEPS} steps, guidance {GUIDANCE:g}",
        )

    def _with_page(
        self,
        report: Report,
        suite: Suite,
        dataset: Dataset,
        run: Run | None,
        reliability: Mapping[str, float],
    ) -> Report:
        from livery.evaluate.report import render

        page = render(
            report,
            run=run,
            recipe=run.recipe if run else None,
            dataset=dataset,
            suite=suite,
            pictures=self.store.read_blob,
            reliability=reliability,
        )
        return report.model_copy(update={"html": self.store.put_blob(page.encode())})

    def _held(self, adapter: Adapter) -> Held:
        """An adapter with its tensors."""
        from livery.tuners.adapter_file import read_adapter
        from livery.tuners.making import Held

        _, state = read_adapter(self.store.blob_path(adapter.sha256))
        return Held(adapter.id[:12], adapter.card, state)

    def _keep_adapter(self, card: AdapterCard, state: Mapping[str, Tensor]) -> Made:
        from livery.tuners.adapter_file import adapter_bytes

        adapter = Adapter(sha256=self.store.put_blob(adapter_bytes(card, state)), card=card)
        self.store.put(adapter)
        return Made(adapter=adapter)

    def _tags(self, adapter: Adapter) -> dict[str, int]:
        """How often each tag stands in the captions that an adapter was trained on."""
        separator = adapter.card.recipe.captions.separator
        photos = self._dataset_of(adapter).split("train")
        tags = [tag.strip() for p in photos for caption in p.captions for tag in caption.split(separator)]
        return dict(Counter(filter(None, tags)))

    def _dataset_of(self, adapter: Adapter) -> Dataset:
        if adapter.card.dataset is None:
            raise LiveryError(
                f"adapter {adapter.id[:12]} was not trained here ({adapter.card.origin}), so it has no "
                "dataset to be compared with: evaluate an adapter that livery trained"
            )
        return self.store.get(Dataset, adapter.card.dataset)

    def _run_of(self, adapter: Adapter) -> Run | None:
        """The newest run that made this adapter: its file, as an id of an older livery is not today's."""
        runs = self.store.list(Run)
        made_it = (run for run in runs if self.store.get(Adapter, run.adapter).sha256 == adapter.sha256)
        return next(made_it, None)


def choose_recipe(path: Path | None, preset: str | None, base: str | None) -> Recipe:
    """The recipe of a file or of a preset, or the default one; `base` overrides its base."""
    from livery import presets

    if path and preset:
        raise LiveryError(f"{path} and preset '{preset}': name one of them, a run has one recipe")
    chosen = read_recipe(path) if path else presets.read(preset) if preset else Recipe()
    return chosen.model_copy(update={"base": base}) if base else chosen


def slug(text: str) -> str:
    """Lower-case letters, digits and dashes, at most 40: safe in any file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"


def today() -> str:
    """The date, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
