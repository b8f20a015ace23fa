"""States that somebody made to do harm, sealed as they should be: an error, and nothing else."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import averaged
from torch import nn

import swaft
from swaft.averaging.state import KIND
from swaft.errors import StateError
from swaft.storage import Manifest, Spec, seal, write_tensors

pytestmark = pytest.mark.unit

CASES = 500
RULES = {"swa": swaft.SWA(start=0), "lawa": swaft.LAWA(start=0, last=2)}
JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 7, 1 << 40, 1 << 62, 10**400, 1.5, "", "swa", "../../etc/passwd", "\x00", "🦆",
    [], [[]], [-1], [1 << 62, 1 << 62], {}, {"0": True}, {"99999999": True}, {"-1": False}, {"0": "x"},
]  # fmt: skip


def start():
    torch.manual_seed(0)
    return averaged(nn.Linear(3, 4), steps=3, rule=RULES)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[Any]]:
    """Content of the manifest, vectors and fragments of a state as it should be."""
    from safetensors import safe_open

    folder = tmp_path_factory.mktemp("genuine") / "state"
    averager = start()
    averager.save_state(folder)
    averager.close()
    content = json.loads((folder / "manifest.json").read_text())["content"]
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        fragments = json.loads(file.metadata()["fragments"])
    return content, vectors, fragments


def write(folder: Path, content: Any, vectors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Seal a folder as `save_state` does, with any content."""
    folder.mkdir(parents=True)
    specs = {name: Spec.of(vector) for name, vector in vectors.items()}
    file = folder / "rank-00000.safetensors"
    record = write_tensors(file, specs, lambda name: [vectors[name]], metadata=metadata)
    seal(folder, Manifest(KIND, {"rank-00000.safetensors": record}, content))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def spoilt(value: Any, draw: random.Random) -> Any:
    """A copy with a place replaced, deleted, doubled or renamed."""
    value = copy.deepcopy(value)
    *way, last = draw.choice([place for place in places(value) if place])
    holder = value
    for key in way:
        holder = holder[key]
    kind = draw.choice(["replace", "replace", "delete", "double", "rename"])
    if kind == "delete":
        del holder[last]
    elif kind == "double" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[last]))
    elif kind == "rename" and isinstance(holder, dict):
        holder[str(draw.choice(JUNK))] = holder.pop(last)
    else:
        holder[last] = draw.choice(JUNK)
    return value


def test_whatever_a_state_says_it_is_opened_or_refused(genuine, tmp_path):
    content, vectors, fragments = genuine
    refused = 0
    averager = start()
    for seed in range(CASES):
        draw = random.Random(seed)
        which = draw.choice(["content", "content", "fragments", "vectors", "text"])
        new_content, new_fragments, new_vectors = content, fragments, dict(vectors)
        metadata = {"fragments": json.dumps(fragments)}
        if which == "content":
            new_content = spoilt(content, draw)
        elif which == "fragments":
            new_fragments = spoilt(fragments, draw)
            metadata = {"fragments": json.dumps(new_fragments)}
        elif which == "text":
            text = draw.choice(["", "[", "null", "[[1]]", '{"a":1}', "[" * 5000, '[["weight", 0, 1e400]]'])
            metadata = draw.choice([{}, {"fragments": text}])
        else:
            name = draw.choice(sorted(new_vectors))
            new_vectors[name] = draw.choice(
                [torch.zeros(0), torch.zeros(3), torch.zeros(15, dtype=torch.int64), torch.zeros(1, 15)]
            )
        folder = tmp_path / str(seed)
        write(folder, new_content, new_vectors, metadata)
        tracemalloc.start()
        try:
            averager.load_state(folder, same_weights=False)
        except StateError as error:
            refused += 1
            assert str(folder) in str(error), (seed, which, error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < 20_000_000, (seed, which)
    assert refused > CASES // 2
    averager.load_state(write_back(genuine, tmp_path), same_weights=False)
    assert averager.count("swa") == 4


def write_back(genuine, tmp_path: Path) -> Path:
    content, vectors, fragments = genuine
    write(tmp_path / "genuine", content, vectors, {"fragments": json.dumps(fragments)})
    return tmp_path / "genuine"


def test_a_state_that_claims_a_billion_members_is_opened_or_refused_at_once(genuine, tmp_path):
    content, vectors, fragments = genuine
    for rule in content["rules"]:
        spoilt_content = copy.deepcopy(content)
        spoilt_content["rules"][content["rules"].index(rule)]["count"] = 1 << 30
        folder = tmp_path / rule["name"]
        write(folder, spoilt_content, vectors, {"fragments": json.dumps(fragments)})
        begun = time.process_time()
        with contextlib.suppress(StateError):
            start().load_state(folder, same_weights=False)
        assert time.process_time() - begun < 10


@pytest.mark.parametrize("name", ["../escaped.safetensors", "/etc/passwd", "a/../../b", "link"])
def test_a_state_that_leads_out_of_its_folder_is_not_followed(genuine, tmp_path, name):
    folder = write_back(genuine, tmp_path)
    (folder / "link").symlink_to("/etc/passwd")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: manifest["files"]["rank-00000.safetensors"]}
    raw = json.dumps(manifest).encode()

    (folder / "manifest.json").write_bytes(raw)
    (folder / "COMPLETE").write_text(hashlib.sha256(raw).hexdigest() + "\n")
    with pytest.raises(StateError):
        start().load_state(folder, same_weights=False)
