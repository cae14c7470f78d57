"""Tensors of a checkpoint that are split over workers: each worker's shards are in a file of its own.

No worker gathers what the others have. `part-R-of-N.safetensors` is worker R's (a format without code), and the
`.json` beside it, written after it, has its SHA-256 and says which rows of which tensor it holds. `state.pt`
has a mark in each such tensor's place. When they are read, shards are joined along the dimension that they were
cut along, or as much of them as a worker needs: how many workers wrote them does not matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvdist.distributed.tensor_shard import TensorShard
from cvdist.storage import file_digest

PREFIX = "part-"  # of the names of files
_MARK = "cvdist.parts"

TensorShardOf = Callable[[str, tuple[int, ...]], TensorShard | None]
"""From a tensor's path in the state, and the shape of the tensor or of its shard, to this worker's shard of it.
None for a tensor that every worker has whole."""


@dataclass(frozen=True)
class Pieces:
    """A tensor that lies in several files.

    Attributes:
        path: Path of the tensor in the state, such as `model/classifier.0.weight`.
        dim: The dimension that it is split along. Its indices are called rows here.
        pieces: (First row, one past the last row, file) for each file, in the order of their rows.
    """

    path: str
    dim: int
    pieces: tuple[tuple[int, int, Path], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        with safe_open(self.pieces[0][2], framework="pt") as file:
            shape = list(file.get_slice(self.path).get_shape())
        shape[self.dim] = self.pieces[-1][1]
        return tuple(shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop`."""
        found = []
        for number, (first, end, name) in enumerate(self.pieces):
            low, high = max(start, first), min(stop, end)
            if low < high or (start == stop and not number):
                low, high = (low, high) if low < high else (first, first)
                with safe_open(name, framework="pt") as file:
                    piece = file.get_slice(self.path)
                    rows = slice(low - first, high - first)
                    found.append(piece[(slice(None),) * self.dim + (rows,)])
        return torch.cat(found, self.dim)

    def whole(self) -> Tensor:
        """Read all rows."""
        return self.read(0, self.pieces[-1][1])


def names(count: int, rank: int) -> tuple[str, str]:
    """Return the names of the two files of worker `rank` of `count`: tensors, and their description."""
    stem = f"{PREFIX}{rank:05}-of-{count:05}"
    return f"{stem}.safetensors", f"{stem}.json"


def map_leaves(function: Callable[[str, Any], Any], state: Any, path: str = "") -> Any:
    """Replace each value in `state` but dictionaries, lists and tuples by `function(path, value)`.

    A path is, for example, `optimizer/state/0`. A mark of a split tensor counts as one value.
    """
    if not isinstance(state, dict | list | tuple) or (isinstance(state, dict) and _MARK in state):
        return function(path, state)
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = {key: map_leaves(function, value, f"{path}/{key}" if path else str(key)) for key, value in items}
    return found if isinstance(state, dict) else type(state)(found.values())


def separate(state: Any, slice_of: TensorShardOf) -> tuple[Any, dict[str, tuple[Tensor, TensorShard]]]:
    """Return `state` with a mark in the place of each split tensor, and those tensors by their paths."""
    found: dict[str, tuple[Tensor, TensorShard]] = {}

    def marked(path: str, value: Any) -> Any:
        part = slice_of(path, tuple(value.shape)) if isinstance(value, Tensor) else None
        if part is None:
            return value
        found[path] = value, part
        return {_MARK: part.dim}

    return map_leaves(marked, state), found


def write(folder: Path, rank: int, count: int, tensors: dict[str, tuple[Tensor, TensorShard]]) -> None:
    """Write the two files of worker `rank` of `count` into `folder`.

    Raises:
        OSError: If the disk can't take them.
    """
    data, receipt = names(count, rank)
    save_file({path: tensor.contiguous() for path, (tensor, _) in tensors.items()}, folder / data)
    rows = {path: [part.start, part.stop] for path, (_, part) in tensors.items()}
    (folder / receipt).write_text(json.dumps({"sha256": file_digest(folder / data), "rows": rows}))


def join(state: Any, folder: Path, count: int) -> Any:
    """Return `state` with `Pieces` in the place of each mark, from the files of `count` workers in `folder`.

    Raises:
        ValueError: If a file is not what was written, or a row is missing.
        OSError: If a file is missing.
    """
    rows: dict[str, list[tuple[int, int, Path]]] = {}
    for rank in range(count):
        data, receipt = (folder / name for name in names(count, rank))
        written = json.loads(receipt.read_text())
        if file_digest(data) != written["sha256"]:
            raise ValueError(f"{data.name} is not what was written")
        for path, (start, stop) in written["rows"].items():
            rows.setdefault(str(path), []).append((int(start), int(stop), data))

    def joined(path: str, value: Any) -> Any:
        return _pieces(path, int(value[_MARK]), rows.get(path, [])) if isinstance(value, dict) else value

    return map_leaves(joined, state)


def _pieces(path: str, dim: int, rows: list[tuple[int, int, Path]]) -> Pieces:
    pieces = sorted(rows, key=lambda piece: piece[0])
    ends = [0, *(stop for _, stop, _ in pieces)]
    if not pieces or [start for start, _, _ in pieces] != ends[:-1]:
        raise ValueError(f"rows of {path} are missing")
    for start, stop, name in pieces:
        with safe_open(name, framework="pt") as file:
            shape = file.get_slice(path).get_shape()
        if shape[dim] != stop - start:
            raise ValueError(f"{name.name} has other rows of {path} than it says")
    return Pieces(path, dim, tuple(pieces))


def take_shards(state: Any, slice_of: TensorShardOf, device: str | torch.device) -> Any:
    """Return `state` as this worker needs it: its shards of split tensors on `device`, and whole others."""

    def taken(path: str, value: Any) -> Any:
        if not isinstance(value, Pieces | Tensor):
            return value
        part = slice_of(path, tuple(value.shape))
        if isinstance(value, Pieces):
            return (value.read(part.start, part.stop) if part is not None else value.whole()).to(device)
        return part.of(value).clone(memory_format=torch.contiguous_format) if part is not None else value

    return map_leaves(taken, state)


def whole(state: Any, device: str | torch.device) -> Any:
    """Return `state` with all tensors whole."""
    return take_shards(state, lambda path, shape: None, device)


def slices_by_path(slices: Mapping[str, TensorShard], parameters: Sequence[str]) -> TensorShardOf:
    """Return a function from a path to this worker's shard, in a state of `model`, `ema` and `optimizer`.

    Args:
        slices: This worker's shard of each split parameter, by the parameter's name.
        parameters: Names of the parameters in the optimizer's order: its buffers are split as they are.
    """

    def slice_of(path: str, shape: tuple[int, ...]) -> TensorShard | None:
        group, _, rest = path.partition("/")
        if group == "optimizer":
            found = rest.split("/")
            number = int(found[1]) if len(found) == 3 and found[0] == "state" else len(parameters)
            # A checkpoint may have trained more layers than this run: that is for its reader to say.
            name = parameters[number] if number < len(parameters) else ""
        else:
            name = rest.removeprefix("module.") if group == "ema" else rest if group == "model" else ""
        part = slices.get(name)
        return part if part is not None and shape in (part.shape, part.local_shape) else None

    return slice_of
