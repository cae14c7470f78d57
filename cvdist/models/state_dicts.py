"""Takes state dicts that other tools wrote out of checkpoints, renames them, and fits them to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cvdist.errors import UserError

# Names of the weights in checkpoints of torchvision's references, timm and Lightning, the averaged ones first.
_ENTRIES = ("model_ema", "state_dict_ema", "state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.")  # of wrappers: DistributedDataParallel, Lightning, torchvision
_COUNTERS = ("num_batches_tracked", "n_averaged")  # that no computation here reads; older files have none
_SHOWN = 2  # names in a message


@dataclass(frozen=True)
class OpenedState:
    """Tensors by name, and a note for people on where they were and what was left out, if worth saying."""

    state: dict[str, Tensor]
    note: str = ""


def is_safetensors(path: Path) -> bool:
    """Return whether a file is of the format safetensors: the length of a header in JSON, and the header."""
    with path.open("rb") as file:
        return file.read(10)[8:] == b'{"'


def open_state(content: Any, source: str, *known: Iterable[str]) -> OpenedState:
    """Return the state dict in the content of a file, with the names of the network.

    Args:
        content: What the file holds.
        source: The file, for messages.
        known: Names that the network has. A prefix is taken off only where it leads to one of them.

    Raises:
        UserError: if the file holds no state dict.
    """
    names, notes = {name for some in known for name in some}, []
    if isinstance(content, dict) and not _is_state(content):
        entry = next((one for one in _ENTRIES if _is_state(content.get(one))), "")
        if entry:
            beside = ", ".join(str(key) for key in content if key != entry)
            notes.append(f"its entry {entry} (beside {beside[:60]})")
            content = content[entry]
    if not _is_state(content):
        kind = f"a dictionary of {', '.join(map(str, content))}"[:100] if isinstance(content, dict) else ""
        raise UserError(
            f"--weights {source} holds {kind or 'a ' + type(content).__name__}, not a state dict (tensors by "
            "name): save the model with torch.save(model.state_dict(), FILE)"
        )
    state = {_renamed(name, names): tensor for name, tensor in content.items()}
    return OpenedState(state, "; ".join(notes))


def fit(
    state: Mapping[str, Tensor],
    name: str,
    source: str,
    shapes: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    last_layer: bool,
) -> OpenedState:
    """Select the entries of `state` that a model takes over.

    Args:
        state: State dict of the file.
        name: Name of the model, for messages.
        source: The file, for messages.
        shapes: Shapes of the tensors of the library's whole network.
        model: A `TransferModel`.
        last_layer: Whether to include the last layer, for as many classes as the file has.

    Raises:
        UserError: with the first names that are missing, too many, or of another shape.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    head, last = f"{model.head_name}.", f"{model.last_layer}."
    # torchvision's file IMAGENET1K_FEATURES has a classifier that consists of NaN, which is none.
    ends = {
        key
        for key in state
        if key.startswith((head, "classifier.")) and key in (shapes.keys() | expected.keys())
    }
    if ends and not any(_is_finite(state[key]) for key in ends):
        state = {key: tensor for key, tensor in state.items() if key not in ends}
    state = _resized_positions(state, expected)
    wanted = {key for key in expected if not key.startswith(head) and not key.endswith(_COUNTERS)}
    missing = [key for key in expected if key in wanted and key not in state]
    known = shapes.keys() | expected.keys()
    unknown = [
        key for key in state if key not in known and not key.startswith(head) and not key.endswith(_COUNTERS)
    ]
    other = [
        key for key in expected if key in wanted and key in state and tuple(state[key].shape) != expected[key]
    ]
    problems = []
    if missing:
        problems.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing in the file")
    if unknown:
        problems.append(f"the model has no {_some(unknown)}")
    if other:
        theirs, ours = _size(state[other[0]].shape), _size(expected[other[0]])
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        problems.append(f"{other[0]} is {theirs} in the file and {ours} in the model{more}")
    if problems:
        bare = missing and all(key.startswith("classifier.") for key in missing)
        hint = ". The file has no classifier: use --features-at maps" if bare else ""
        raise UserError(f"--weights {source} is not of {name}: {'; '.join(problems)}{hint}")
    taken = {key: state[key] for key in expected if key in state and not key.startswith(head)}
    hidden = [key for key in expected if key.startswith(head) and not key.startswith(last)]
    has_hidden = all(key in state and tuple(state[key].shape) == expected[key] for key in hidden)
    if has_hidden:
        taken |= {key: state[key] for key in hidden}
    note = _left_out(state, taken.keys(), last)
    if last_layer and has_hidden and f"{last}weight" in state:
        taken |= _last_layer(state, last, expected, name, source)
    for key, tensor in taken.items():
        if not _is_finite(tensor):
            raise UserError(f"--weights {source} is damaged: {key} has values that are not finite")
    return OpenedState({key: tensor.to(model.state_dict()[key].dtype) for key, tensor in taken.items()}, note)


def has_head(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Return whether a state dict has the head of `model`, a `TransferModel`, with any number of classes."""
    head, last = f"{model.head_name}.", f"{model.last_layer}."
    expected = {key: tensor.shape for key, tensor in model.state_dict().items() if key.startswith(head)}
    found = {key: tensor.shape for key, tensor in state.items() if key.startswith(head)}
    return found.keys() == expected.keys() and all(
        found[key][1:] == shape[1:] and (key.startswith(last) or found[key] == shape)
        for key, shape in expected.items()
    )


def has_backbone(state: Mapping[str, Tensor], model: nn.Module) -> bool:
    """Return whether a state dict has all layers in front of the head of `model`, a `TransferModel`."""
    return all(
        key in state or key.startswith(f"{model.head_name}.") or key.endswith(_COUNTERS)
        for key in model.state_dict()
    )


def _is_state(content: Any) -> bool:
    is_filled = isinstance(content, Mapping) and bool(content)
    return is_filled and all(isinstance(one, Tensor) for one in content.values())


def _renamed(name: str, known: set[str]) -> str:
    """Return `name` without the prefixes of wrappers, where the network has no such name."""
    shorter = name
    while shorter not in known:
        plain = shorter.replace("_orig_mod.", "")
        prefix = next((one for one in _PREFIXES if plain.startswith(one)), "")
        if plain == shorter and not prefix:
            return name if shorter.endswith(_COUNTERS) else shorter
        shorter = plain.removeprefix(prefix)
    return shorter


def _last_layer(
    state: Mapping[str, Tensor], last: str, expected: Mapping[str, tuple[int, ...]], name: str, source: str
) -> dict[str, Tensor]:
    """Return the weights of the file's last layer, by name.

    Raises:
        UserError: if it does not fit the model, with any number of classes.
    """
    taken = {}
    for key, shape in expected.items():
        if key.startswith(last):
            theirs = tuple(state[key].shape) if key in state else ()
            if theirs[1:] != shape[1:] or not theirs or theirs[0] != len(state[f"{last}weight"]):
                raise UserError(
                    f"--weights {source} is not of {name}: {key} is {_size(theirs)} in the file, and the "
                    f"model's has {_size(shape[1:]) or 'no'} inputs"
                )
            taken[key] = state[key]
    return taken


def _left_out(state: Mapping[str, Tensor], taken: Iterable[str], last: str) -> str:
    """Return in a few words which layers of the file the model does not take."""
    rest = [key for key in state if key not in set(taken) and not key.endswith(_COUNTERS)]
    if not rest:
        return ""
    classes = len(state[f"{last}weight"]) if f"{last}weight" in state else 0
    if classes and all(key.startswith(last) for key in rest):
        return f"without its last layer, of {classes:,} classes"
    layers = sorted({re.sub(r"\.[^.]+$", "", key) for key in rest})
    return f"without {_some(layers)}, which the model's head has not"


def _resized_positions(
    state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Tensor]:
    """Interpolate the positions of a vision transformer of torchvision for pictures of another size."""
    key, patches = "encoder.pos_embedding", "conv_proj.weight"
    theirs, ours = state.get(key), expected.get(key)
    if theirs is None or ours is None or patches not in state or theirs.ndim != 3 or theirs.shape[1] == ours[1]:
        return state
    from torchvision.models.vision_transformer import interpolate_embeddings

    patch = state[patches].shape[-1]
    side = patch * round((ours[1] - 1) ** 0.5)
    return dict(interpolate_embeddings(side, patch, {**state}))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_finite(tensor: Tensor) -> bool:
    # The sum keeps a NaN or an infinity, and needs no second tensor of that size.
    return bool(tensor.float().sum().isfinite())


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
