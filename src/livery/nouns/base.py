"""What every noun shares: a frozen pydantic value whose id is the hash of its content."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

TAGS = frozenset({"low-rank", "full-weights", "new-words", "plug-in"})
"""Names of alternatives that pydantic puts into the path of an error, though no user wrote them."""


class LiveryError(Exception):
    """Something the user can mend: one sentence that names the file, key or value and what to do."""


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Split = Literal["train", "validation", "test"]


class Noun(BaseModel):
    """A frozen value with an id that is the hash of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        keys = [str(key) for key in cast(Mapping[Any, Any], data)]
        for key in keys:
            if key not in cls.model_fields:
                raise ValueError(unknown_key(key, list(cls.model_fields)))
        return cast(Any, data)

    @property
    def id(self) -> str:
        """SHA-256, hexadecimal, of the canonical JSON: sorted keys, no spaces."""
        return sha256_of(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> Self:
        """Build from a plain mapping; `where` (a file name) leads the error. Raises LiveryError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise LiveryError(f"{where}: {first_problem(error)}") from None


def sha256_of(value: Any) -> str:
    """SHA-256, hexadecimal, of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unknown_key(key: str, known: list[str]) -> str:
    """One sentence that refuses a key and names the nearest known one."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(known))}."
    return f"unknown key '{key}': {hint}"


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation error, as one line with the path of its key."""
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"] if str(part) not in TAGS)
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message
