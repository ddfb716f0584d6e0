"""Memory of a program: bounds, and races between threads that no barrier orders."""

# mypy: disable-error-code="no-any-return"

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_GAP = 256  # bytes nobody owns between two tensors
_NOBODY = -1
_SEVERAL = -2  # of several warps
_ATOMIC = -3  # whoever it was: atomic operations are ordered among themselves, and nothing else with them
_OF_WARP = -16  # less the number of a warp: several threads of it


class OutOfBoundsError(Exception):
    """An address that no tensor owns, or one not aligned to the access."""


class RaceError(Exception):
    """Two threads at one address, one of them writing, without a barrier in between."""


class Memory:
    """Bytes from address 0 on, of which `own` hands out tensors; remembers who touched each 4 bytes since when.

    An access is ordered after those before the last barrier of the program, and after those of the same warp before
    its last warp barrier. Two stores of one value by one instruction are no race.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.bytes = np.full(size, 0xAB, np.uint8)  # poison
        self._owned = np.zeros(size // 4, bool)
        self._end = _GAP
        self._warp = np.arange(threads) // 32
        self._warp_epoch = np.zeros(threads // 32 or 1, np.int64)
        self._epoch = 1
        self._writer = np.full(size // 4, _NOBODY)
        self._reader = np.full(size // 4, _NOBODY)
        self._written = np.zeros((2, size // 4), np.int64)  # epoch of the program and of the warp
        self._read = np.zeros((2, size // 4), np.int64)

    def own(self, tensor: Array) -> int:
        """Copy a tensor in; its address."""
        address, size = self._end, tensor.nbytes
        self.bytes[address : address + size] = np.ascontiguousarray(tensor).view(np.uint8).reshape(-1)
        self._owned[address // 4 : -(-(address + size) // 4)] = True
        self._end = -(-(address + size + _GAP) // _GAP) * _GAP
        return address

    def own_all(self) -> None:
        self._owned[:] = True

    def tensor(self, address: int, like: Array) -> Array:
        """A copy of the tensor that `own` put at `address`."""
        return self.bytes[address : address + like.nbytes].view(like.dtype).reshape(like.shape).copy()

    def barrier(self) -> None:
        self._epoch += 1

    def warp_barrier(self, warps: Array) -> None:
        self._warp_epoch[warps] += 1

    def load(self, threads: Array, addresses: Array, size: int) -> Array:
        """Bytes [threads, size] at `addresses`."""
        words = self._words(addresses, size)
        if self._unordered(threads, words, self._writer, self._written).any():
            raise RaceError("loads what another thread has stored")
        self._touch(threads, words, self._reader, self._read)
        return self.bytes[addresses[:, None] + np.arange(size)]

    def store(self, threads: Array, addresses: Array, values: Array) -> None:
        """Write bytes [threads, size] at `addresses`."""
        words = self._words(addresses, values.shape[1])
        for who, when in ((self._writer, self._written), (self._reader, self._read)):
            if self._unordered(threads, words, who, when).any():
                raise RaceError("overwrites what another thread has " + ("stored" if who is self._writer else "loaded"))
        place = addresses[:, None] + np.arange(values.shape[1])
        self.bytes[place] = values
        if (self.bytes[place] != values).any():
            raise RaceError("threads of one instruction store different values")
        self._touch(threads, words, self._writer, self._written)

    def atomic(self, threads: Array, addresses: Array, function: Any, values: Array) -> Array:
        """An operation on 4 bytes each, thread after thread; what they held before, of the type of `values`."""
        words = self._words(addresses, 4)
        for who, when in ((self._writer, self._written), (self._reader, self._read)):
            if (self._unordered(threads, words, who, when) & (who[words] != _ATOMIC)).any():
                raise RaceError("changes what another thread has " + ("stored" if who is self._writer else "loaded"))
        held, before = self.bytes.view(values.dtype), np.empty_like(values)
        for at, word in enumerate(words[:, 0]):
            before[at] = held[word]
            held[word] = function(held[word], values[at])
        self._writer[words] = _ATOMIC
        self._written[0][words] = self._epoch
        self._written[1][words] = self._warp_epoch[self._warp[threads]][:, None]
        return before

    def _words(self, addresses: Array, size: int) -> Array:
        if (addresses < 0).any() or (addresses + size > len(self.bytes)).any() or (addresses % size).any():
            raise OutOfBoundsError(f"{size} bytes at {addresses.min()} to {addresses.max()}")
        words = addresses[:, None] // 4 + np.arange(-(-size // 4))
        if not self._owned[words].all():
            raise OutOfBoundsError(f"{size} bytes at {addresses[~self._owned[words].all(1)][0]} belong to no tensor")
        return words

    def _unordered(self, threads: Array, words: Array, who: Array, when: Array) -> Array:
        return self._after_no_barrier(threads, words, who, when) & (who[words] != threads[:, None])

    def _after_no_barrier(self, threads: Array, words: Array, who: Array, when: Array) -> Array:
        """Whether no barrier stands between the last access to each word and now."""
        warp = self._warp[threads][:, None]
        apart = (self._warp_of(who[words]) != warp) | (when[1][words] == self._warp_epoch[warp])
        return (when[0][words] == self._epoch) & apart

    def _warp_of(self, who: Array) -> Array:
        """The warp of a thread, or of several of one warp; -1: none."""
        return np.where(who >= 0, self._warp[np.maximum(who, 0)], np.where(who <= _OF_WARP, _OF_WARP - who, -1))

    def _touch(self, threads: Array, words: Array, who: Array, when: Array) -> None:
        """Note an access. A read that no barrier orders before this one stays noted: a store must come after both.
        Of threads that store one value by one instruction, any is noted."""
        mine = np.broadcast_to(threads[:, None], words.shape)
        if who is self._writer:
            who[words] = mine
        else:
            self._note_readers(words, mine, self._after_no_barrier(threads, words, who, when))
        when[0][words] = self._epoch
        when[1][words] = self._warp_epoch[self._warp[threads]][:, None]

    def _note_readers(self, words: Array, mine: Array, kept: Array) -> None:
        """A thread, or several of a warp, or of several warps: of this instruction, and before it where `kept`."""
        who = self._reader
        before = who[words]
        who[words] = mine
        kept = kept & (before != _NOBODY) & (before != mine)
        several = (who[words] != mine) | kept
        if several.any():
            warp = self._warp[mine]
            who[words[several]] = (_OF_WARP - warp)[several]
            marked = who[words]
            mixed = (marked <= _OF_WARP) & (marked != _OF_WARP - warp) | kept & (self._warp_of(before) != warp)
            who[words[mixed]] = _SEVERAL
