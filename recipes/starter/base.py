"""The starter's text encoder and UNet, trained together on cached latents of captioned scenes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.starter import fit, vae
from recipes.starter.emoji import concepts, drawings
from recipes.starter.recipe import StarterRecipe
from recipes.starter.scenes import Captions, Scene, paint, pair, several, single


def bank(recipe: StarterRecipe) -> list[Scene]:
    """Every scene the base learns from, in a fixed order."""
    rng = random.Random(recipe.data.seed)
    count = len(concepts(recipe))
    scenes: list[Scene] = []
    for style in recipe.data.base_styles:
        for concept in range(count):
            scenes += [single(rng, concept, style) for _ in range(recipe.data.singles)]
            scenes += [several(rng, concept, style) for _ in range(recipe.data.counts)]
            others = [rng.randrange(count) for _ in range(recipe.data.pairs)]
            scenes += [pair(rng, concept, other, style) for other in others if other != concept]
    return scenes


@torch.no_grad()
def latents(recipe: StarterRecipe, scenes: list[Scene]) -> Tensor:
    """Scaled latents of every scene, float16 [N, C, h, w]; encoded once."""
    path = recipe.build / "scenes.safetensors"
    if not path.exists():
        encoder = vae.load(recipe.build / "vae")
        sets = {style: drawings(recipe, style) for style in recipe.data.base_styles}
        rows: list[Tensor] = []
        for start in range(0, len(scenes), 64):
            part = scenes[start : start + 64]
            pixels = torch.stack([paint(sets[s.style], s, recipe.data.size) for s in part])
            with fit.autocast():
                mean = encoder.encode(pixels.to(fit.device()).float() / 127.5 - 1).latent_dist.mean
            rows.append((mean.float() * encoder.config["scaling_factor"]).half().cpu())
            if start % 6400 == 0:
                print(f"encoded {start}/{len(scenes)} scenes", flush=True)
        fit.write({"latents": torch.cat(rows)}, path)
    return load_file(path)["latents"]


def tokenizer(recipe: StarterRecipe, scenes: list[Scene]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format, learned from the captions themselves."""
    folder = recipe.build / "tokenizer"
    if not folder.exists():
        captions, rng = Captions(concepts(recipe)), random.Random(recipe.base.seed)
        texts = [captions.caption(rng, scene) for scene in scenes]
        special = ["<|startoftext|>", "<|endoftext|>"]
        seed = CLIPTokenizer(
            vocab={token: index for index, token in enumerate(special)},
            merges=[],
            model_max_length=recipe.base.text_length,
        )
        learned = seed.train_new_from_iterator(texts, recipe.base.vocabulary)
        learned.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


class Generator(nn.Module):
    """The two parts that train together."""

    def __init__(self, recipe: StarterRecipe, words: CLIPTokenizer) -> None:
        super().__init__()
        torch.manual_seed(recipe.base.seed)
        channels = recipe.base.unet_channels
        bos, eos = cast(int, words.bos_token_id), cast(int, words.eos_token_id)
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=recipe.base.text_width,
                intermediate_size=4 * recipe.base.text_width,
                num_hidden_layers=recipe.base.text_layers,
                num_attention_heads=4,
                max_position_embeddings=recipe.base.text_length,
                bos_token_id=bos,
                eos_token_id=eos,
                pad_token_id=eos,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=recipe.data.size // 2 ** (len(recipe.vae.channels) - 1),
            in_channels=recipe.vae.latent_channels,
            out_channels=recipe.vae.latent_channels,
            block_out_channels=tuple(channels),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (len(channels) - 1),
            up_block_types=("CrossAttnUpBlock2D",) * (len(channels) - 1) + ("UpBlock2D",),
            cross_attention_dim=recipe.base.text_width,
            attention_head_dim=4,  # diffusers' old name for the number of heads
            norm_num_groups=16,
        )
        if fit.device().type == "cpu":
            self.unet.set_attn_processor(AttnProcessor())  # faster than SDPA at this size

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        tokens = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, t, tokens).sample


def started(recipe: StarterRecipe, model: Generator) -> Generator:
    """With the weights that `unpack` left, where there are some."""
    folder = recipe.build / "model"
    if folder.exists():
        for part, kind in {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}.items():
            weights: Any = kind.from_pretrained(folder / part, torch_dtype=torch.float32)
            getattr(model, part).load_state_dict(weights.state_dict())
    return model


def scheduler() -> Any:
    """Stable Diffusion's schedule with v-prediction, rescaled to end in pure noise.

    On latents this small the usual end still shows silhouettes, which the model would then read out of the
    noise instead of the words (Lin et al. 2023, arXiv:2305.08891).
    """
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def train(recipe: StarterRecipe) -> None:
    scenes = bank(recipe)
    clean, words = latents(recipe, scenes), tokenizer(recipe, scenes)
    captions, law = Captions(concepts(recipe)), scheduler()
    model = started(recipe, Generator(recipe, words))
    settings = recipe.base
    job = fit.Fit(
        "base",
        model,
        recipe.build,
        steps=settings.steps,
        peak=settings.learning_rate,
        warmup=settings.warmup,
        ema=settings.ema,
    )
    last = int(law.config["num_train_timesteps"])

    def loss_of(step: int) -> Tensor:
        rng = random.Random(settings.seed * 1_000_003 + step)
        draw = fit.generator(settings.seed, step)
        rows = torch.randint(len(scenes), (settings.batch,), generator=draw)
        texts = [
            "" if rng.random() < settings.caption_dropout else captions.caption(rng, scenes[row])
            for row in rows.tolist()
        ]
        ids = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = clean[rows].float()
        noise = torch.randn(x.shape, generator=draw)
        t = torch.randint(last, (len(rows),), generator=draw)
        late = last - 1 - torch.randint(int(settings.late * last), (len(rows),), generator=draw)
        t = torch.where(torch.rand(len(rows), generator=draw) < settings.late_share, late, t)
        noisy, target = law.add_noise(x, noise, t), law.get_velocity(x, noise, t)
        place = fit.device()
        with fit.autocast():
            guess = model(noisy.to(place), t.to(place), ids.to(place))
        return functional.mse_loss(guess.float(), target.to(place))

    for step, loss in job.run(loss_of):
        print(f"base {step}/{job.steps} loss {loss:.4f} {job.seconds:.0f} s", flush=True)
    model.load_state_dict(job.average)
    save(recipe, model, words, law)


def save(recipe: StarterRecipe, model: Generator, words: CLIPTokenizer, law: Any) -> None:
    """Write a diffusers folder in half precision; `pack` adds the autoencoder as it stands then."""
    folder = recipe.build / "model"
    for name, part in {"unet": model.unet, "text_encoder": model.text_encoder}.items():
        part.half().save_pretrained(folder / name)
    words.save_pretrained(folder / "tokenizer")
    law.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    Path(folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
