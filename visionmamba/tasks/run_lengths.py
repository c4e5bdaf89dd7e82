"""Masks as COCO's run-length encoding, which pycocotools and faster-coco-eval read."""

from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class RunLengths(TypedDict):
    """A mask as COCO writes it into JSON."""

    size: list[int]
    """Height and width."""
    counts: str
    """Lengths of runs of 0 and 1 in turn, column after column, as COCO's compressed string."""


def encode_labels(labels: NDArray[np.uint8]) -> dict[int, RunLengths]:
    """Returns the mask of each label that occurs, in the order of the labels.

    Args:
        labels: (H, W), not empty.
    """
    line = labels.T.ravel()
    starts = np.flatnonzero(np.concatenate([[True], line[1:] != line[:-1]]))
    stops = np.append(starts[1:], line.size)
    owners = line[starts]
    masks: dict[int, RunLengths] = {}
    for label in np.unique(owners).tolist():
        is_own = owners == label
        edges = np.stack([starts[is_own], stops[is_own]], axis=1).ravel()
        if edges[-1] != line.size:
            edges = np.append(edges, line.size)
        counts = np.diff(edges, prepend=0)
        masks[label] = {"size": list(labels.shape), "counts": compress(counts)}
    return masks


def compress(counts: NDArray[np.int64]) -> str:
    """Returns numbers as COCO's text: from the fourth on, differences to the one before the last.

    Six bits a character, the lowest first: five of the number and one that says that more follow;
    the fifth bit of the last character is the sign.
    """
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    is_open = np.ones(rest.shape, bool)
    characters: list[NDArray[np.uint8]] = []
    is_written: list[NDArray[np.bool_]] = []
    while is_open.any():
        low = rest & 31
        rest >>= 5
        has_more = np.where(low & 16, rest != -1, rest != 0)
        characters.append((48 + low + 32 * has_more).astype(np.uint8))
        is_written.append(is_open)
        is_open = is_open & has_more
    table, written = np.stack(characters, axis=1), np.stack(is_written, axis=1)
    return table[written].tobytes().decode("ascii")
