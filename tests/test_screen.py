"""What a terminal shows of a run."""

from livery.nouns import Recipe, Run, Step, Validation
from livery.screen import curves


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
