"""Kill writers of a workspace at random moments and look at what they leave. Run by test_store.py.

Usage: python store_victim.py FOLDER WRITE KILLS. Prints a JSON object. It is a process of its own, so that
each victim is a cheap fork of a parent that has no threads, no open store and no torch.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from livery.nouns import Dataset, Photo
from livery.store import Store

CONTENT = 50_000  # bytes of a blob


def write_blob(store: Store, content: bytes) -> str:
    return store.put_blob(content)


def write_blob_from_file(store: Store, content: bytes) -> str:
    source = store.root.parent / f"source-{os.getpid()}"
    source.write_bytes(content)
    return store.put_blob(source)


def write_noun(store: Store, content: bytes) -> str:
    sha = store.put_blob(content)
    return store.put(Dataset(name=sha, photos=(Photo(sha256=sha, width=1, height=1),)))


def write_alias(store: Store, content: bytes) -> str:
    return store.alias("brand@prod", write_noun(store, content))


def open_workspace(store: Store, content: bytes) -> str:
    root = store.root.parent / f"new-{content[:8].hex()}"
    Store(root).close()
    return root.name


WRITES: dict[str, Callable[[Store, bytes], str]] = {
    "blob": write_blob,
    "blob_from_file": write_blob_from_file,
    "noun": write_noun,
    "alias": write_alias,
    "open": open_workspace,
}


def victim(root: Path, write: Callable[[Store, bytes], str], said: int) -> None:
    """Write for ever. Say how long a write takes, and then each result once it is promised to be kept."""
    store = Store(root)
    write(store, os.urandom(CONTENT))  # the first is slow: it opens connections and compiles queries
    start = time.perf_counter()
    first = write(store, os.urandom(CONTENT))
    os.write(said, f"{time.perf_counter() - start}\n{first}\n".encode())
    while True:
        os.write(said, f"{write(store, os.urandom(CONTENT))}\n".encode())


def kill_one(root: Path, write: Callable[[Store, bytes], str]) -> list[str]:
    """Fork a victim, kill -9 it at a random moment of its next writes, return what it said was kept."""
    heard, said = os.pipe()
    if not (pid := os.fork()):
        victim(root, write, said)
    os.close(said)
    with os.fdopen(heard, "rb") as pipe:
        seconds = float(pipe.readline())
        time.sleep(random.uniform(0, min(3 * seconds, 0.5)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return [line.decode().strip() for line in pipe.readlines() if line.endswith(b"\n")]


def look(root: Path, kind: str, kept: list[str]) -> list[str]:
    """What is wrong with the workspace, given what must be in it."""
    store = Store(root)
    wrong = list(store.verify())
    for name in kept:
        if kind == "open":
            wrong += [] if (root.parent / name / "index.sqlite").is_file() else [f"{name} is lost"]
        elif kind.startswith("blob"):
            store.read_blob(name)
        else:
            store.get(Dataset, name)
    if kind == "alias" and kept and store.find("brand@prod").id not in store.aliases().values():
        wrong.append("the alias points nowhere")
    store.close()
    for half_made in root.parent.glob("new-*"):  # a workspace whose making was cut short opens like any other
        with closing(Store(half_made)) as new:
            wrong += list(new.verify())
        shutil.rmtree(half_made)
    return wrong


def main() -> None:
    folder, kind, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    random.seed(kind)
    wrong: list[str] = []
    kept = 0
    for turn in range(kills):
        root = folder / f"workspace-{turn // 10}"  # a fresh one now and then keeps the looking short
        lines = kill_one(root, WRITES[kind])
        kept += len(lines)
        wrong += look(root, kind, lines)
    halves = sum(1 for _ in folder.glob("*/tmp/*"))
    print(json.dumps({"kept": kept, "wrong": wrong, "halves": halves, "torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
