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
        assert self.keys is not None
        assert self.values is not None
        rooms = self._rooms or (self.keys, self.values)
        keys, values = _append(rooms[0], self.keys, key_states), _append(rooms[1], self.values, value_states)
        length = self.keys.shape[-2] + key_states.shape[-2]
        self._rooms = keys, values
        self.keys, self.values = keys[..., :length, :], values[..., :length, :]
        return self.keys, self.values


def _append(room: Tensor, held: Tensor, new: Tensor) -> Tensor:
    """The tensor that begins with `held` and then `new`: `room` where `held` is its beginning and it is long enough."""
    start, end = held.shape[-2], held.shape[-2] + new.shape[-2]
    same = room.data_ptr() == held.data_ptr() and room.shape[:-2] == held.shape[:-2]
    if not same or end > room.shape[-2]:
        room = held.new_empty(*held.shape[:-2], max(LEAST, 2 * end), held.shape[-1])
        room[..., :start, :] = held
    room[..., start:end, :] = new
    return room


def let_grow(cache: Any) -> None:
    """Make a cache's plain layers grow in place from now on; windows and states stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
