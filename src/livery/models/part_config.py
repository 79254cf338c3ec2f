"""Parts of a base model as JSON, and what has no weights back from it: for the header of a single file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers

from livery.models import architectures, text
from livery.models.clip_vocabulary import clip_tokenizer, is_clip_vocabulary
from livery.nouns import LiveryError

TOKENIZERS = {"CLIPTokenizer": transformers.CLIPTokenizer, "T5Tokenizer": transformers.T5Tokenizer}
TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
)
UNSAID = frozenset({"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"})
"""Keys of transformers' configurations that describe files, not models."""
UNSAID_OF_WORDS = frozenset({"is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file"})
"""Keys of a tokenizer's configuration that tell where it was read."""


def described(part: Any, name: str) -> dict[str, Any]:
    """A part's configuration as JSON."""
    if name.startswith("tokenizer"):
        return words_of(part)
    kind = {"_class_name": type(part).__name__}
    if isinstance(part, transformers.PreTrainedModel):
        config = {key: value for key, value in part.config.to_diff_dict().items() if key not in UNSAID}
    else:
        config = dict(part.config)
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    return kind | json.loads(json.dumps(plain, default=list))


def words_of(tokenizer: Any) -> dict[str, Any]:
    """CLIP's words ship with livery; of other tokenizers the files are kept."""
    kind = {"_class_name": type(tokenizer).__name__}
    if isinstance(tokenizer, transformers.CLIPTokenizer) and is_clip_vocabulary(tokenizer):
        return kind | {"pad_token": tokenizer.pad_token, "model_max_length": tokenizer.model_max_length}
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        files = {name: (Path(place) / name) for name in TOKENIZER_FILES}
        content = {name: file.read_text("utf-8") for name, file in files.items() if file.is_file()}
    told: dict[str, Any] = json.loads(content["tokenizer_config.json"])
    kept = {key: value for key, value in told.items() if key not in UNSAID_OF_WORDS}
    return kind | {"files": content | {"tokenizer_config.json": json.dumps(kept)}}


def restored(path: Path, part: str, config: Mapping[str, Any]) -> Any:
    """The scheduler or tokenizer of a configuration; `path` leads errors.

    Raises LiveryError for classes and files that livery does not read.
    """
    if part == "scheduler":
        return architectures.build_other(config, part, str(path))
    kind = TOKENIZERS.get(str(config.get("_class_name")))
    if kind is None:
        raise LiveryError(f"{path}: {part} is of the class {config.get('_class_name')}; not one livery reads")
    if "files" not in config:
        return clip_tokenizer(config["pad_token"], config["model_max_length"])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / part
        folder.mkdir()
        for name, content in config["files"].items():
            if name not in TOKENIZER_FILES:
                raise LiveryError(f"{path}: {part} has a file {name}; not one livery reads")
            (folder / name).write_text(content, "utf-8")
        return text.read_tokenizer(kind, folder)
