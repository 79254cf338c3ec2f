"""What a terminal shows of a run."""

import io

from rich.console import Console

from livery.nouns import Adapter, AdapterCard, Event, Made, Progress, Recipe, Run, Step, Validation, Written
from livery.screen import Screen, curves


def run(*looks: Validation, chosen: int | None = None) -> Run:
    return Run(
        recipe=Recipe(),
        dataset="0" * 64,
        base_sha256="0" * 64,
        adapter="0" * 64,
        steps=(Step(step=1, loss=1.0, learning_rate=0.1),),
        validations=looks,
        chosen_step=chosen,
        seconds=1,
        peak_memory_bytes=1,
        device="cpu",
    )


def test_both_curves_stand_on_one_scale_with_the_kept_step_below():
    looks = [(0, 1.0, 0.8), (10, 0.7, 0.4), (20, 0.9, 0.2)]
    held_out, trained, kept = curves(
        run(*(Validation(step=s, loss=loss, train=train) for s, loss, train in looks), chosen=10)
    )
    assert held_out == "      held out █▅▇  1.0000 -> 0.9000"
    assert trained == "  learned from ▆▃▁  0.8000 -> 0.2000"
    assert kept.index("^") == held_out.index("▅")
    assert kept.endswith("^ step 10")


def test_one_look_is_no_curve_and_a_flat_one_is_drawn():
    assert list(curves(run(Validation(step=0, loss=1.0)))) == []
    (line,) = curves(run(Validation(step=0, loss=1.0), Validation(step=1, loss=1.0)))
    assert "▁▁" in line


def shown(*events: Event) -> str:
    out = io.StringIO()
    with Screen(Console(file=out, width=80)) as screen:
        for event in events:
            screen.show(event)
    return out.getvalue()


def test_without_a_bar_there_is_no_empty_line():
    assert shown(Written(what="report", path="a.html")) == "report: a.html\n"
    assert "3/4" in shown(Progress(stage="train", done=3, total=4))


def test_a_card_has_no_rows_without_content():
    facts = AdapterCard(
        recipe=Recipe(), family="sd1", base_sha256="1" * 64, origin="merged", livery_version="0", step=0
    )
    told = shown(Made(adapter=Adapter(sha256="0" * 64, card=facts)))
    assert "origin" in told
    assert not {"steps", "licences", "attribution"} & set(told.split())
