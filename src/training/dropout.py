"""Dropout masks as a function of (seed, step, sample), so that resumed and redistributed runs drop the same units."""

import numpy as np
from mindspore import Tensor

from src.dataset.batches import rank_batch
from src.utils.config import Config

_BITS = 16


class DropoutMasks:
    """Masks of one rank's forward batches.

    Sample k of a step's global batch draws from its own stream of a Philox generator (Salmon et al. 2011) keyed by
    (seed, step), whatever rank has it.

    Args:
        width: number of units per sample that may be dropped.
        rank, size: the rank has every ``size``-th sample of the global batch, beginning with the ``rank``-th.
    """

    def __init__(self, width: int, config: Config, rank: int, size: int) -> None:
        self._width, self._seed, self._probability = width, config.seed, config.dropout
        self._batch, self._rank, self._size = rank_batch(config, size), rank, size

    def __call__(self, step: int, part: int) -> Tensor:
        """(B, width) uint8 Tensor, 1 where a unit is kept, for forward batch ``part`` of ``step``."""
        first = part * self._batch
        return Tensor(np.stack([self._row(step, (first + slot) * self._size + self._rank) for slot in range(self._batch)]))

    def _row(self, step: int, sample: int) -> np.ndarray:
        # The second key word's top bits keep these streams apart from those of samples and of the order of an epoch.
        stream = np.random.Philox(key=np.array([self._seed, 2 ** 62 + step], np.uint64),
                                  counter=np.array([0, sample, 0, 0], np.uint64))
        draws = stream.random_raw(-(-self._width * _BITS // 64)).view(np.uint16)[:self._width]
        return (draws >= round(self._probability * 2 ** _BITS)).astype(np.uint8)
