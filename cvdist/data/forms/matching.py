"""Finds the file that a name in a table means: a path, with or without a suffix, or the end of a path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cvdist.data.formats import format_by_name
from cvdist.data.forms.files import parents_of
from cvdist.data.forms.found import role

_SUFFIX = r"(?s)\.[^./]*$"
_NONE, _SEVERAL = -1, -2  # instead of a file's number


@dataclass(frozen=True)
class Matches:
    """The files that names mean.

    Attributes:
        files: number of the file that each name means, int64; null for none.
        unclear: number of names that may mean several files.
        example: the first of these names, and two files that it may mean.
    """

    files: pa.Array
    unclear: int = 0
    example: tuple[str, str, str] = ("", "", "")


def match(names: pa.Array, paths: pa.Array) -> Matches:
    """Find which file each name means.

    A name means the file with that path. If there is none, it means the file whose path is the name with or
    without a picture's suffix, where the case of the suffix and the kind of slashes do not count. If there is
    none either, it means the only file whose path ends with the name; of several, the only one in a folder
    `train`.

    Args:
        names: names of pictures, with or without suffix; null for none.
        paths: paths of the files, each once.
    """
    found = np.array(pc.index_in(names, value_set=paths).cast(pa.int64()).fill_null(_NONE))
    stems = pc.replace_substring_regex(paths, _SUFFIX, "")
    whole = pc.binary_join_element_wise(stems, _lower_suffix(paths).cast(pa.string()), "")
    names = pc.replace_substring(names, "\\", "/")
    suffix = _lower_suffix(names)
    bare = pa.array([not format_by_name(f"x{one}") for one in suffix.dictionary.to_pylist()], pa.bool_())
    bare = bare.take(suffix.indices)
    lowered = pc.binary_join_element_wise(
        pc.replace_substring_regex(names, _SUFFIX, ""), suffix.cast(pa.string()), ""
    )
    names = pc.if_else(bare, names, lowered)
    parents = parents_of(paths)
    training = ["train" in map(role, one.split("/")) for one in parents.dictionary.to_pylist()]
    preferred = np.array(pa.array(training, pa.bool_()).take(parents.indices), dtype=bool)
    depths = np.array(pc.count_substring(names, "/").fill_null(0)) + 1
    example = ("", "", "")
    for of, keys in ((~np.array(bare, dtype=bool), whole), (np.array(bare, dtype=bool), stems)):
        for depth in (0, *np.unique(depths[of & (found == _NONE)]).tolist()):
            rows = (of & (found == _NONE) & ((depth == 0) | (depths == depth))).nonzero()[0]
            if not len(rows):
                continue
            ends = _last(keys, depth) if depth else keys
            wanted = names.take(pa.array(rows))
            found[rows] = numbers = _only(wanted, ends, preferred)
            if (numbers == _SEVERAL).any() and not example[0]:
                one = wanted[int((numbers == _SEVERAL).argmax())].as_py()
                example = (one, *paths.filter(pc.equal(ends, one))[:2].to_pylist())
    return Matches(pa.array(found, pa.int64(), mask=found < 0), int((found == _SEVERAL).sum()), example)


def _lower_suffix(paths: pa.Array) -> pa.DictionaryArray:
    """Return the suffixes of paths in lower case, empty where there are none."""
    found = pc.extract_regex(paths, r"(?s)(?P<suffix>\.[^./]*)?$").field(0)
    return pc.ascii_lower(found).fill_null("").dictionary_encode()


def _last(paths: pa.Array, parts: int) -> pa.Array:
    """Return the last `parts` parts of each path; null for shorter paths."""
    return pc.extract_regex(paths, rf"(?s)(?:^|/)(?P<last>(?:[^/]+/){{{parts - 1}}}[^/]+)$").field(0)


def _only(names: pa.Array, keys: pa.Array, preferred: np.ndarray) -> np.ndarray:
    """Return the number of the only key that equals each name, or of the only preferred one of several.

    It is `_NONE` if no key equals the name, and `_SEVERAL` if several do.
    """
    encoded = keys.dictionary_encode()
    count = len(encoded.dictionary)
    indices = np.array(encoded.indices.fill_null(count))

    def once(among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first = np.full(count + 1, _NONE)
        first[indices[among]] = among
        return np.bincount(indices[among], minlength=count + 1) == 1, first

    (alone, first), (alone_there, first_there) = once(np.arange(len(keys))), once(preferred.nonzero()[0])
    chosen = np.where(alone, first, np.where(alone_there, first_there, _SEVERAL))
    chosen[count] = _NONE
    return chosen[np.array(pc.index_in(names, value_set=encoded.dictionary).fill_null(count))]
