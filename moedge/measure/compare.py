"""How far a model is from a reference: KL(reference || model) and top-1 agreement, token by token over texts.

The two are never in memory together: the reference's logits go to a temporary file first, exactly as they are, and are
read back beside the model's. Legend: t positions, V vocabulary.
"""

import errno
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import IO, Any

import torch
from torch import Tensor

from moedge.errors import DataError
from moedge.measure.quality import Window
from moedge.runtime.forward import vocabulary
from moedge.runtime.generate import logits_in_chunks
from moedge.runtime.session import Model, Session
from moedge.units import format_size


class Recording:
    """Logits of windows in a temporary file, which is gone when this is closed."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="moedge-logits-")  # noqa: SIM115
        self._ids, self._read = array("q"), 0
        self._dtype, self._width = torch.float32, 0

    def record(self, lm: Model, some: Iterable[Window]) -> Iterator[int]:
        """Run `lm` over the windows and keep its logits; the number of tokens so far, after each window."""
        self._width = vocabulary(lm.model)
        session = Session(lm)
        for window in some:
            for _ in self.keep(window, logits_in_chunks(lm, window.ids[:-1], session=session)):
                pass
            yield len(self._ids)

    def keep(self, window: Window, logits: Iterable[Tensor]) -> Iterator[Tensor]:
        """Hand on the logits [t, V] of the next window, in pieces, and keep them."""
        for piece in logits:
            self._dtype, self._width = piece.dtype, piece.shape[1]
            self._write(piece)
            yield piece
        self._ids.extend(window.ids)

    def _write(self, logits: Tensor) -> None:
        try:
            self._file.write(logits.cpu().contiguous().view(torch.uint8).numpy().data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            each = format_size(logits.shape[1] * logits.element_size())
            raise DataError(
                f"the reference's logits, {each} a token, do not fit into {tempfile.gettempdir()} after "
                f"{len(self._ids)} tokens: use --max-tokens, or set TMPDIR to a larger disk"
            ) from error

    def rewind(self) -> None:
        """Read from the first window again."""
        self._file.seek(0)
        self._read = 0

    def expect(self, window: Window) -> None:
        """DataError unless the next recorded window has these ids."""
        recorded = self._ids[self._read : self._read + len(window.ids)]
        if tuple(recorded) != window.ids:
            raise DataError(
                "the reference's tokenizer splits the text differently: KL compares token by token and needs models "
                "with the same tokenizer; compare their bits per byte instead"
            )
        self._read += len(window.ids)

    def take(self, rows: int, width: int) -> Tensor:
        """The next `rows` recorded logits [rows, V]."""
        if width != self._width:
            raise DataError(
                f"the reference has {self._width} logits a token and the model {width}: KL needs the same vocabulary"
            )
        data = bytearray(self._file.read(rows * width * self._dtype.itemsize))
        return torch.frombuffer(data, dtype=self._dtype).view(rows, width)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Divergence:
    """Sums over tokens of the distance between a recording and the logits that pass by `observe`."""

    def __init__(self, reference: Recording) -> None:
        self._reference = reference
        self.kl_nats, self.agreed, self.tokens = 0.0, 0, 0
        reference.rewind()

    def observe(self, window: Window, logits: Iterator[Tensor]) -> Iterator[Tensor]:
        """Hand `logits` on, and add up how far they are from the recorded ones."""
        self._reference.expect(window)
        for piece in logits:
            expected = self._reference.take(*piece.shape)
            self.kl_nats += float(kl_divergence(expected, piece).double().sum())
            self.agreed += int((expected.argmax(-1) == piece.argmax(-1)).sum())
            self.tokens += len(piece)
            yield piece

    def as_dict(self) -> dict[str, Any]:
        """KL in nats per token, and the share of tokens whose most likely successor is the same."""
        known = max(1, self.tokens)
        return {
            "kl": self.kl_nats / known if self.tokens else None,
            "top1_agreement": self.agreed / known if self.tokens else None,
        }


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats [t] of two rows of logits [t, V], in single precision."""
    p = reference.float().log_softmax(-1)
    q = logits.float().log_softmax(-1)
    return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)
