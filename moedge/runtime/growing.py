"""A key/value cache that appends in place: transformers' own copies all of a layer's keys and values for each token.

Values are the same bit for bit. Memory beyond what is in use is reserved, not touched. Knows caches; no models.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

LEAST = 256  # tokens that room is made for at first


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """As DynamicLayer; keys and values [B, heads, T, D] are the beginning of larger tensors."""

    crop = DynamicLayer.crop
    _rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        keys, values = self.extend(new)
        keys[..., -new:, :], values[..., -new:, :] = key_states, value_states
        return keys, values

    def extend(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values with room for `count` more tokens at their end, which the caller is to write."""
        assert self.keys is not None
        assert self.values is not None
        rooms = self._rooms or (self.keys, self.values)
        self._rooms = _room(rooms[0], self.keys, count), _room(rooms[1], self.values, count)
        length = self.keys.shape[-2] + count
        self.keys, self.values = self._rooms[0].narrow(-2, 0, length), self._rooms[1].narrow(-2, 0, length)
        return self.keys, self.values


def _room(room: Tensor, held: Tensor, count: int) -> Tensor:
    """A tensor that begins with `held` and has `count` more tokens: `room`, where that is such a one."""
    start, end = held.shape[-2], held.shape[-2] + count
    same = room.data_ptr() == held.data_ptr() and room.shape[:-2] == held.shape[:-2]
    if not same or end > room.shape[-2]:
        room = held.new_empty(*held.shape[:-2], max(LEAST, 2 * end), held.shape[-1])
        room[..., :start, :] = held
    return room


def let_grow(cache: Any) -> None:
    """Make a cache's plain layers grow in place from now on; windows and states stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
