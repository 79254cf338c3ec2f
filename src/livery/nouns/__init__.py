"""The nouns of livery: frozen values that every room shares. No room, no torch.

Each noun is a frozen pydantic value. An unknown key is refused with the nearest known key
named. The id of a noun is the SHA-256 of its canonical JSON, so equal content has one id.
"""

from livery.nouns.base import (
    LiveryError,
    Noun,
    Sha256,
    Share,
    Split,
    first_problem,
    sha256_of,
    unknown_key,
)
from livery.nouns.evaluation import (
    Difference,
    Interval,
    Match,
    Picture,
    Question,
    Report,
    Score,
    Suite,
)
from livery.nouns.events import (
    Checked,
    Drawn,
    Estimated,
    Evaluated,
    Event,
    Ingested,
    Made,
    Note,
    Progress,
    Rates,
    Reduced,
    Refused,
    Trained,
    Written,
)
from livery.nouns.pictures import Dataset, Photo
from livery.nouns.recipe import (
    CaptionsSpec,
    LossSpec,
    MemorySpec,
    NoiseSpec,
    OptimizerSpec,
    PicturesSpec,
    PriorSpec,
    Recipe,
    StopSpec,
)
from livery.nouns.recipe_file import read_recipe, recipe_toml
from livery.nouns.training import (
    Adapter,
    AdapterCard,
    Estimate,
    Run,
    Sample,
    Saved,
    Step,
    Validation,
    with_trigger,
)
from livery.nouns.tuning import FullSpec, LowRankSpec, PluginSpec, TokensSpec, TunerSpec

STORED: dict[str, type[Noun]] = {
    noun.__name__: noun for noun in (Dataset, Estimate, Adapter, Run, Suite, Report)
}
"""The nouns that the store keeps, by name."""

__all__ = [
    "STORED",
    "Adapter",
    "AdapterCard",
    "CaptionsSpec",
    "Checked",
    "Dataset",
    "Difference",
    "Drawn",
    "Estimate",
    "Estimated",
    "Evaluated",
    "Event",
    "FullSpec",
    "Ingested",
    "Interval",
    "LiveryError",
    "LossSpec",
    "LowRankSpec",
    "Made",
    "Match",
    "MemorySpec",
    "NoiseSpec",
    "Note",
    "Noun",
    "OptimizerSpec",
    "Photo",
    "Picture",
    "PicturesSpec",
    "PluginSpec",
    "PriorSpec",
    "Progress",
    "Question",
    "Rates",
    "Recipe",
    "Reduced",
    "Refused",
    "Report",
    "Run",
    "Sample",
    "Saved",
    "Score",
    "Sha256",
    "Share",
    "Split",
    "Step",
    "StopSpec",
    "Suite",
    "TokensSpec",
    "Trained",
    "TunerSpec",
    "Validation",
    "Written",
    "first_problem",
    "read_recipe",
    "recipe_toml",
    "sha256_of",
    "unknown_key",
    "with_trigger",
]
