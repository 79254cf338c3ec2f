"""The built-in base model, its judge and its sample brand: folders beside this file.

`base/` and `judge/` hold weights; `openmoji/` holds the brand's pictures and its suite.
"""

from importlib.resources import files
from pathlib import Path

_HERE = Path(str(files("livery") / "starter"))

DEMO_RECIPE = _HERE / "demo.toml"


def brand_folder() -> Path:
    """The sample brand: an imagefolder in `photos/`, `suite.toml`, the truth, the attribution."""
    return _HERE / "openmoji"
