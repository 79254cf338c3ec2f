"""livery teaches Stable Diffusion a team's visual identity."""

__version__ = "0.1.0"
