"""The engine on the tiny SD 1.x model: seeds rule, batches do not, adapters come and go."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from PIL import Image

from livery.generate.engine import FLOW_SAMPLERS, SAMPLERS, Engine, png_bytes
from livery.models.noise import Flow
from livery.models.parts import DiffusersBackbone
from livery.models.sd1 import SD1
from livery.models.sd3 import SD3
from livery.models.sdxl import SDXL
from livery.nouns import AdapterCard, LiveryError, LowRankSpec, Recipe
from livery.tuners.adapter_file import write_adapter
from livery.tuners.tuner import attach_all, build

FAMILIES: dict[str, Callable[[], DiffusersBackbone]] = {
    "sd1": SD1.tiny,
    "sd2": lambda: SD1.tiny(prediction="v_prediction"),
    "sdxl": SDXL.tiny,
    "sd3": SD3.tiny,
}
LEVELS = 2
"""Of 255: what rounding in other batch shapes may change in fp32."""


@pytest.fixture(scope="module")
def base() -> SD1:
    return SD1.tiny()


@pytest.fixture(scope="module")
def engine(base: SD1) -> Engine:
    return Engine(base, "fp32")


@pytest.fixture(scope="module")
def adapter(base: SD1, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose second matrices are no longer zero, so that it changes what is drawn."""
    recipe = Recipe(tuners=(LowRankSpec(rank=2),))
    attached = attach_all([build(spec) for spec in recipe.tuners], base)
    state = {name: t + 0.3 * ("lora_B" in name) for name, t in attached.state().items()}
    attached.undo()
    card = AdapterCard(
        recipe=recipe,
        family=base.family,
        base_sha256=base.sha256,
        dataset="0" * 64,
        livery_version="0",
        step=1,
    )
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    write_adapter(path, card, state)
    return path


def draw(engine: Engine, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> np.ndarray:
    """-> [n, side, side, 3] levels."""
    images = engine.generate(prompts, seeds, **{"steps": 3, **options})
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_a_picture_does_not_hang_on_its_batch(engine: Engine):
    prompts, seeds = ["a", "b", "a", "c", "b"], [1, 2, 3, 4, 1]
    alone = draw(engine, prompts, seeds, batch_size=1)
    for size in (2, 5):
        assert apart(alone, draw(engine, prompts, seeds, batch_size=size)) <= LEVELS
    backwards = draw(engine, prompts[::-1], seeds[::-1], batch_size=3)[::-1]
    assert apart(alone, backwards) <= LEVELS
    assert apart(alone[0], alone[2]) > 20 * LEVELS, "other seeds must draw other pictures"


def test_the_same_call_gives_the_same_bits(engine: Engine):
    assert apart(draw(engine, ["a"] * 3, range(3)), draw(engine, ["a"] * 3, range(3))) == 0


def test_it_draws_what_diffusers_own_pipeline_draws(engine: Engine, base: SD1):
    """The reference encodes, guides, samples and decodes by itself, from the prompt's text."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    pipeline: Any = base.pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    reference = pipeline(
        prompt=["a cat"],
        negative_prompt=["dull"],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(7)],
    ).images[0]
    ours = draw(engine, ["a cat"], [7], negative="dull", steps=4, guidance=3.0)[0]
    assert apart(ours, np.asarray(reference, dtype=np.int16)) <= 1


@pytest.mark.parametrize("negative", ["", "dull"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn_as_its_own_pipeline_draws_it(family: str, negative: str):
    """Two steps of the family's own Euler, from the prompt's text, with its scheduler as it comes."""
    base = FAMILIES[family]()
    pipeline: Any = base.pipeline()
    if not isinstance(base.noise, Flow):
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    # SD3's pipeline reads 256 tokens of T5 unless it is told, the tiny T5 has 24.
    length = {"max_sequence_length": 24} if isinstance(base, SD3) else {}
    reference = pipeline(
        prompt=["a cat"],
        negative_prompt=[negative] if negative else None,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(7)],
        **length,
    ).images[0]
    engine = Engine(base, "fp32")
    ours = draw(engine, ["a cat"], [7], negative=negative, steps=2, guidance=3.0, sampler="euler")[0]
    assert apart(ours, np.asarray(reference, dtype=np.int16)) <= 1
    other = draw(engine, ["a cat"], [7], negative="red", steps=2, guidance=3.0, sampler="euler")[0]
    assert apart(ours, other) > 1


def test_rectified_flow_has_samplers_of_its_own_that_agree():
    engine = Engine(SD3.tiny(t5=False), "fp32")
    exact = draw(engine, ["a"], [1], steps=80, sampler="euler")
    for sampler in FLOW_SAMPLERS:
        errors = [abs(draw(engine, ["a"], [1], steps=n, sampler=sampler) - exact).mean() for n in (4, 16)]
        assert errors[1] < errors[0] / 2 < 2
    for sampler in SAMPLERS.keys() - FLOW_SAMPLERS:
        with pytest.raises(LiveryError, match=f"sampler '{sampler}' is not one for rectified flow"):
            draw(engine, ["a"], [1], sampler=sampler)


def test_each_distinct_prompt_is_encoded_once(engine: Engine, base: SD1, monkeypatch: pytest.MonkeyPatch):
    encoded: list[str] = []
    encode = base.encode_prompts

    def counted(prompts: Sequence[str]) -> Any:
        encoded.extend(prompts)
        return encode(prompts)

    monkeypatch.setattr(base, "encode_prompts", counted)
    draw(engine, ["a", "b", "a", "a"], range(4), batch_size=2, steps=1)
    assert sorted(encoded) == ["", "a", "b"]


@pytest.mark.parametrize("option", [{"guidance": 1.0}, {"negative": "b"}, {"steps": 5}, {"sampler": "euler"}])
def test_every_option_has_an_effect(option: dict[str, Any], engine: Engine):
    assert apart(draw(engine, ["a"], [0]), draw(engine, ["a"], [0], **option)) > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_pictures_of_the_base_s_size(sampler: str, engine: Engine, base: SD1):
    pictures = draw(engine, ["a", "b"], [0, 1], sampler=sampler)
    assert pictures.shape == (2, base.resolution, base.resolution, 3)
    assert pictures.std() > 1


def test_an_adapter_acts_inside_the_with_and_leaves_no_trace(engine: Engine, base: SD1, adapter: Path):
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    plain = draw(engine, ["a"], [0])
    with engine.adapter(adapter):
        tuned = draw(engine, ["a"], [0])
    with engine.adapter(adapter, strength=0):
        assert apart(draw(engine, ["a"], [0]), plain) == 0
    assert apart(plain, tuned) > 10
    assert apart(draw(engine, ["a"], [0]), plain) == 0
    after = base.denoiser.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_an_adapter_is_detached_when_drawing_fails(engine: Engine, base: SD1, adapter: Path):
    names = set(base.denoiser.state_dict())
    with pytest.raises(ZeroDivisionError), engine.adapter(adapter):
        raise ZeroDivisionError
    assert set(base.denoiser.state_dict()) == names


def test_an_adapter_of_another_base_is_refused(adapter: Path):
    with (
        pytest.raises(LiveryError, match=r"a\.safetensors: made for the base"),
        Engine(SD1.tiny(1)).adapter(adapter),
    ):
        pass


def test_bf16_stays_near_fp32(engine: Engine, base: SD1):
    exact, rough = draw(engine, ["a"] * 2, [0, 1]), draw(Engine(base, "bf16"), ["a"] * 2, [0, 1])
    assert 0 < np.abs(exact - rough).mean() < 4


def test_wrong_calls_are_refused_in_a_sentence(engine: Engine):
    with pytest.raises(LiveryError, match="2 prompts but 1 seeds"):
        draw(engine, ["a", "b"], [0])
    with pytest.raises(LiveryError, match="sampler 'magic' is not known"):
        draw(engine, ["a"], [0], sampler="magic")


def test_png_bytes_tell_what_made_them_and_are_always_the_same():
    image = Image.effect_noise((8, 8), 90).convert("RGB")
    told = {"prompt": "a café, 日本", "seed": "7", "adapter": "ab" * 32}
    content = png_bytes(image, told)
    assert content == png_bytes(image, dict(reversed(told.items())))
    with Image.open(io.BytesIO(content)) as read:
        assert read.info | told == read.info
        assert read.convert("RGB").tobytes() == image.tobytes()
