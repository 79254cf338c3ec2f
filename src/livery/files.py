"""Writing a file so that a kill at any point leaves either the old content or the new, never half."""

import os
import uuid
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Under a temporary name, flushed to disk, then renamed; folders are made as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
