"""What the neural processors share: loading of foreign networks, groups and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_specs.io.errors import UserError
from pipeline.render.processors import runtime

GPU_BATCH = 16


@contextmanager
def building(needs: str = "") -> Iterator[None]:
    """Build a network, whose first weights are not drawn from the caller's generator.

    Raises ``UserError`` saying what it ``needs`` where a package cannot be imported.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            yield
    except ImportError as error:
        raise UserError(needs) from error


def read_checkpoint(path: Path) -> Any:
    """Read a checkpoint, running no code in it. Raises ``OSError`` where it is damaged."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file, torch raises whatever comes
        raise OSError(f"{path} is damaged: {error}") from error


def load_weights(network: Any, state: Any, path: Path) -> None:
    """Load what was read from ``path``; what the network has not is left over.

    Raises ``OSError`` where the weights are another network's.
    """
    try:
        missing, _ = network.load_state_dict(state, strict=False)
    except Exception as error:  # of what is no dictionary of tensors, too
        raise OSError(f"{path} is of another network: {error}") from error
    if missing:
        raise OSError(f"{path} is of another network: it has no {', '.join(sorted(missing))}")


def groups(values: Sequence[float]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Each whole number among ``values`` with the places where it stands."""
    whole = np.array([int(value) for value in values])
    for value in np.unique(whole):
        yield int(value), np.flatnonzero(whole == value)


def batches(count: int, on_cpu: int = 1, on_gpu: int = GPU_BATCH) -> Iterator[slice]:
    """Slices of at most so many waves at once.

    On a CPU one wave at a time, unless said otherwise, so that a clip does not depend on its
    neighbours: in a batch the last bits of an LSTM are not those of a single wave.
    """
    size = on_cpu if runtime.current().device == "cpu" else on_gpu
    for start in range(0, count, size):
        yield slice(start, start + size)
