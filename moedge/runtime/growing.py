"""A key/value cache that appends in place: transformers' own copies all of a layer's keys and values for each token.

Values are the same bit for bit. Memory beyond what is in use is reserved, not touched. Knows caches; no models.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

LEAST = 256  # tokens that room is made for at first, and beyond a window


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """As DynamicLayer; keys and values [B, heads, T, D] are the beginning of larger tensors."""

    crop = DynamicLayer.crop
    _rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        return _write(self.extend(key_states.shape[-2]), key_states, value_states)

    def extend(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values with room for `count` more tokens at their end, which the caller is to write."""
        room = max(LEAST, 2 * (_held(self)[0].shape[-2] + count))
        self.keys, self.values = _extended(self, count, room)
        return self.keys, self.values


class GrowingWindow(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """As DynamicSlidingWindowLayer; keys and values are a part of larger tensors, further on with each token."""

    crop = DynamicSlidingWindowLayer.crop
    _rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        new = key_states.shape[-2]
        if self.is_initialized and not self.record_past and new < LEAST:
            return _write(self.extend(new), key_states, value_states)
        whole = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past:
            keys, values = _held(self)
            self.keys, self.values = keys.clone(), values.clone()  # not the end of what was before the window
        return whole

    def extend(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the window before, with room for `count` tokens at their end, which the caller writes."""
        keys, values = _extended(self, count, _held(self)[0].shape[-2] + LEAST)
        self.keys = keys[:, :, -self.sliding_window + 1 :, :]
        self.values = values[:, :, -self.sliding_window + 1 :, :]
        self.cumulative_length += count
        return keys, values


Growing = GrowingLayer | GrowingWindow


def _held(layer: Growing) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def _write(held: tuple[Tensor, Tensor], key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    new = key_states.shape[-2]
    keys, values = held
    keys[..., -new:, :], values[..., -new:, :] = key_states, value_states
    return held


def _extended(layer: Growing, count: int, size: int) -> tuple[Tensor, Tensor]:
    """What the layer holds, and `count` tokens after it; new rooms have `size`."""
    held = _held(layer)
    rooms = layer._rooms or held
    (keys, first), (values, other) = (_room(room, part, count, size) for room, part in zip(rooms, held, strict=True))
    layer._rooms = keys, values
    length = held[0].shape[-2] + count
    return keys.narrow(-2, first, length), values.narrow(-2, other, length)


def _room(room: Tensor, held: Tensor, count: int, size: int) -> tuple[Tensor, int]:
    """A tensor that has `held` from a token on, and `count` more behind it: `room`, where that is such a one."""
    length = held.shape[-2]
    first, rest = divmod(held.data_ptr() - room.data_ptr(), room.stride(-2) * room.element_size())
    same = rest == 0 and room.shape[:-2] == held.shape[:-2] and room.stride() == held.stride()
    if same and first >= 0 and first + length + count <= room.shape[-2]:
        return room, first
    new = held.new_empty(*held.shape[:-2], size, held.shape[-1])
    new[..., :length, :] = held
    return new, 0


def bytes_beyond_windows(cache: Any) -> int:
    """What the windows of a cache that is full take more once they grow in place."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length >= layer.sliding_window:
            assert layer.keys is not None
            total += 2 * layer.keys.nbytes // layer.keys.shape[-2] * LEAST
    return total


def let_grow(cache: Any) -> None:
    """Make a cache's layers of attention grow in place from now on; recurrent states stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer
        elif type(layer) is DynamicSlidingWindowLayer:
            layer.__class__ = GrowingWindow
