"""The layouts of single-file checkpoints: where each part lies, and by which key map it is named there.

LDM for SD 1.x and 2.x (CompVis, Stability), SGM for SDXL (Stability's generative-models), and SD3's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from livery.models.key_maps import Config, Entry, KeyMap, clip, mmdit, openclip, t5, unet, vae
from livery.nouns import LiveryError


@dataclass(frozen=True)
class Layout:
    """Where each part lies in the file: its prefix and its map."""

    name: str
    family: str
    sign: str
    """A prefix that only files of this layout have."""
    parts: Mapping[str, tuple[str, KeyMap]]
    optional: frozenset[str] = frozenset()
    identities: frozenset[str] = frozenset()
    """Square matrices that may be missing: then nothing was projected."""
    markers: bool = False
    """Whether other tools read "v_pred" and "ztsnr", tensors without content, as a statement."""

    def entries(self, part: str, config: Config, names: Iterable[str]) -> list[Entry]:
        """The whole map of one part. Raises LiveryError when two names meet or one has no place."""
        prefix, key_map = self.parts[part]
        found = [Entry(prefix + e.theirs, e.ours, e.way) for e in key_map(config, names)]
        if len({entry.theirs for entry in found}) < len(found):
            raise LiveryError(f"{part}: two tensors have one name in the layout of {self.name} files")
        return found


DENOISER, AUTOENCODER = "model.diffusion_model.", ("first_stage_model.", vae)
SD3_TEXT = "text_encoders."

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="sd1",
            family="sd1",
            sign="cond_stage_model.transformer.",
            parts={
                "unet": (DENOISER, unet),
                "vae": AUTOENCODER,
                "text_encoder": ("cond_stage_model.transformer.", clip),
            },
        ),
        Layout(
            name="sd2",
            family="sd1",
            sign="cond_stage_model.model.",
            parts={
                "unet": (DENOISER, unet),
                "vae": AUTOENCODER,
                "text_encoder": ("cond_stage_model.model.", openclip),
            },
        ),
        Layout(
            name="sdxl",
            family="sdxl",
            sign="conditioner.embedders.1.",
            parts={
                "unet": (DENOISER, unet),
                "vae": AUTOENCODER,
                "text_encoder": ("conditioner.embedders.0.transformer.", clip),
                "text_encoder_2": ("conditioner.embedders.1.model.", openclip),
            },
            markers=True,
        ),
        Layout(
            name="sd3",
            family="sd3",
            sign=f"{DENOISER}joint_blocks.",
            parts={
                "transformer": (DENOISER, mmdit),
                "vae": AUTOENCODER,
                "text_encoder": (f"{SD3_TEXT}clip_l.transformer.", clip),
                "text_encoder_2": (f"{SD3_TEXT}clip_g.transformer.", clip),
                "text_encoder_3": (f"{SD3_TEXT}t5xxl.transformer.", t5),
            },
            optional=frozenset({"text_encoder_3"}),
            identities=frozenset({f"{SD3_TEXT}clip_l.transformer.text_projection.weight"}),
        ),
    )
}

UNREAD = re.compile(
    r"model_ema\..*|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar"
    r"|lvlb_weights|scale_factor|global_step|epoch)$|denoiser\.sigmas$|v_pred$|ztsnr$"
    r"|.*\.(position_ids|logit_scale|attn_mask)$|first_stage_model\.(loss|model_ema)\..*"
    r"|cond_stage_model\.model\.(transformer\.resblocks\.\d+\..*|text_projection)$"
    r"|text_encoders\.t5xxl\.transformer\.encoder\.embed_tokens\.weight$"
)
"""Tensors that original files hold and no model needs: averages, schedules, counters; of SD 2.x's text
encoder the last layer and the projection, for the U-Net reads the layer before."""
