"""LoRA on the tiny model: exact to attach, exact to detach, and honest about wrong targets."""

import pytest
import torch
from torch import Tensor, nn

from livery.models.sd1 import SD1
from livery.nouns import LiveryError, LowRankSpec
from livery.tuners.lowrank import LowRank
from livery.tuners.tuner import Attached, attach_all, build


@pytest.fixture
def tiny() -> SD1:
    return SD1.tiny()


def answer(backbone: SD1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        return backbone.predict(noisy, torch.tensor([10, 800]), backbone.encode_prompts(["a cat", ""]))


def disturb(attached: Attached, seed: int = 1) -> None:
    """Give every LoRA weight a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    attached.load({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in attached.state().items()})


def anatomy(model: nn.Module) -> list[tuple[str, type, int]]:
    return [(name, type(module), id(module)) for name, module in model.named_modules()]


def test_attach_changes_nothing_bit_for_bit(tiny: SD1):
    before = answer(tiny)
    attached = LowRank(rank=4).attach(tiny)
    assert torch.equal(answer(tiny), before)
    disturb(attached)
    assert not torch.allclose(answer(tiny), before, atol=1e-3)


def test_undo_restores_modules_weights_flags_and_attributes(tiny: SD1):
    before, weights = anatomy(tiny.denoiser), {n: t.clone() for n, t in tiny.denoiser.state_dict().items()}
    output, attributes = answer(tiny), set(vars(tiny.denoiser))
    attached = LowRank(rank=4).attach(tiny)
    disturb(attached)
    attached.undo()
    attached.undo()
    assert anatomy(tiny.denoiser) == before
    assert set(vars(tiny.denoiser)) == attributes
    now = tiny.denoiser.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], weights[name]) for name in weights)
    assert not any(param.requires_grad for param in tiny.denoiser.parameters())
    assert torch.equal(answer(tiny), output)


def test_what_another_tuner_trains_stays_trainable(tiny: SD1):
    tiny.denoiser.get_submodule("conv_in").requires_grad_(True)
    attached = LowRank(rank=2).attach(tiny)
    assert tiny.denoiser.get_parameter("conv_in.weight").requires_grad
    attached.undo()
    assert tiny.denoiser.get_parameter("conv_in.weight").requires_grad


def test_only_the_new_matrices_learn(tiny: SD1):
    attached = LowRank(rank=3).attach(tiny)
    learning = [param for param in tiny.denoiser.parameters() if param.requires_grad]
    assert {id(param) for param in learning} == {id(param) for param in attached.params.values()}
    assert len(attached.params) == 2 * 40
    down = attached.params["denoiser.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"]
    assert down.shape == (3, 64)


def test_state_is_a_float32_copy_under_the_same_names(tiny: SD1):
    attached = LowRank(rank=2).attach(tiny)
    state = attached.state()
    assert state.keys() == attached.params.keys()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = next(iter(state))
    state[name].fill_(7)
    assert not torch.equal(attached.params[name], state[name])


def test_state_loads_to_the_same_output(tiny: SD1):
    attached = LowRank(rank=4, alpha=3).attach(tiny)
    disturb(attached)
    output, state = answer(tiny), attached.state()
    attached.undo()
    again = LowRank(rank=4, alpha=3).attach(tiny, seed=99)
    again.load(state)
    assert torch.equal(answer(tiny), output)


def test_seeds_decide_the_start_and_leave_the_global_seed_alone(tiny: SD1):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    states = []
    for seed in (1, 1, 2):
        attached = LowRank(rank=2).attach(tiny, seed)
        states.append(attached.state())
        attached.undo()
    assert torch.equal(torch.rand(1), expected)
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


def test_alpha_is_the_strength_and_scale_turns_it(tiny: SD1):
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = tiny.denoiser.get_submodule(layer)
    x = torch.randn(1, 5, 64)
    plain = base(x)
    attached = LowRank(rank=4, alpha=2).attach(tiny)
    disturb(attached)
    down, up = (attached.params[f"denoiser.{layer}.lora_{side}.weight"] for side in "AB")
    for strength in (1.0, 0.5, 0.0):
        attached.scale(strength)
        wanted = plain + strength * (2 / 4) * x @ down.T @ up.T
        assert torch.allclose(tiny.denoiser.get_submodule(layer)(x), wanted, atol=1e-5)


def test_two_act_together_and_leave_in_any_order(tiny: SD1):
    base, weights = answer(tiny), anatomy(tiny.denoiser)
    first = LowRank(rank=2).attach(tiny)
    disturb(first, 1)
    only_first = answer(tiny)
    second = LowRank(rank=3, targets=r".*\.to_q").attach(tiny)
    assert torch.equal(answer(tiny), only_first)
    disturb(second, 2)
    assert not torch.allclose(answer(tiny), only_first, atol=1e-4)
    second.undo()
    assert torch.equal(answer(tiny), only_first)
    third = LowRank(rank=1, targets=r".*\.to_k").attach(tiny)
    disturb(third, 3)
    first.undo()
    assert not torch.equal(answer(tiny), base)
    third.undo()
    assert torch.equal(answer(tiny), base)
    assert anatomy(tiny.denoiser) == weights


def test_convolutions_can_be_targets(tiny: SD1):
    before = answer(tiny)
    attached = LowRank(rank=2, targets=r".*resnets\.\d+\.conv1").attach(tiny)
    assert attached.params["denoiser.mid_block.resnets.0.conv1.lora_A.weight"].shape == (2, 64, 3, 3)
    assert torch.equal(answer(tiny), before)
    disturb(attached)
    assert not torch.equal(answer(tiny), before)


def test_it_learns_under_autocast(tiny: SD1):
    attached = LowRank(rank=2).attach(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny.predict(torch.randn(1, 4, 16, 16), torch.tensor([5]), tiny.encode_prompts(["x"]))
        out.square().mean().backward()
    ups = [param for name, param in attached.params.items() if "lora_B" in name]
    assert all(param.grad is not None and param.grad.dtype == torch.float32 for param in ups)
    assert any(param.grad.abs().sum() > 0 for param in ups if param.grad is not None)


def test_names_are_matched_as_a_whole(tiny: SD1):
    with pytest.raises(
        LiveryError, match=r"'to_q' matches no layer; it must match whole names, and there are "
    ):
        LowRank(targets="to_q").attach(tiny)
    with pytest.raises(LiveryError, match="conv_in"):
        LowRank(targets="nothing").attach(tiny)
    with pytest.raises(LiveryError, match="is not a regular expression"):
        LowRank(targets="(").attach(tiny)
    assert not hasattr(tiny.denoiser, "peft_config")


def test_a_state_of_another_shape_is_refused_whole(tiny: SD1):
    state = LowRank(rank=2).attach(SD1.tiny()).state()
    attached = LowRank(rank=3).attach(tiny)
    before = attached.state()
    with pytest.raises(LiveryError, match="another rank or another base"):
        attached.load(state)
    first = next(iter(before))
    with pytest.raises(LiveryError, match=f"lacks 1 tensors, first {first}"):
        attached.load({name: tensor + 1 for name, tensor in before.items() if name != first})
    with pytest.raises(LiveryError, match="no place here, first stray"):
        attached.load({**before, "stray": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in attached.state().items())


def test_a_tuner_is_built_from_its_spec():
    tuner = build(LowRankSpec(kind="lora", rank=5, alpha=2.5, targets="x"))
    assert tuner == LowRank(rank=5, alpha=2.5, targets="x")
    assert tuner.touches == {"denoiser"}


def test_a_run_takes_exactly_one_tuner(tiny: SD1):
    with pytest.raises(LiveryError, match="2 are named, a run takes exactly one"):
        attach_all([LowRank(), LowRank()], tiny)
    with pytest.raises(LiveryError, match="0 are named"):
        attach_all([], tiny)
