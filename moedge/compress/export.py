"""Write a model with some of its experts only as an ordinary Hugging Face folder, from the files of the full one.

Tensors keep the names and the layout that the checkpoint was published in, so that whatever reads the full model reads
the smaller one: an expert's own tensors get its new number, stacked ones are cut along their expert axis, and of the
router's the kept rows remain. Bytes are copied in blocks; no model is loaded. Knows names and bytes; which experts are
worth keeping is elsewhere.
"""

import errno
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from moedge.errors import CheckpointError, ModelError
from moedge.models.checkpoint import ALIGNMENT, DTYPES, INDEX, READ_BLOCK, SINGLE, Checkpoint, TensorInfo
from moedge.models.expert_map import ExpertMap, target_names
from moedge.models.load import Blueprint, draw
from moedge.models.narrow import COUNTS, count_names, narrow
from moedge.models.quantised import QuantisedCheckpoint
from moedge.units import format_size

LIMIT = 2 << 30  # bytes of one shard's tensors
DROP_AFTER = 64 << 20  # written bytes after which the page cache forgets them
COPIED = (
    *("tokenizer*", "*.model", "*.tiktoken", "*.jinja", "vocab.*", "merges.txt", "tekken.json"),
    *(
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
        "generation_config.json",
        "*processor_config.json",
        "LICENSE*",
        "NOTICE*",
    ),
)
_AHEAD = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")  # layers that guess further tokens
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Report = Callable[[int, int], None]  # bytes written, of how many


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: the bytes of `ranges` (offset, length) of the file that `info` lies in, or its rows."""

    name: str
    shape: tuple[int, ...]
    info: TensorInfo
    ranges: tuple[tuple[int, int], ...]  # empty: to be read through the checkpoint, which picks rows

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.info.dtype.itemsize


def export(
    blueprint: Blueprint,
    kept: Sequence[Sequence[int]],
    folder: Path,
    note: Report = lambda done, total: None,
) -> None:
    """Write the model that has only the experts `kept` (per MoE layer) into `folder`, which exists and is empty.

    Config, tokenizer and generation config go along; layers that guess further tokens, which transformers does not
    load, do not. Raises ModelError for a packed or quantised checkpoint or experts that cannot be kept, CheckpointError
    when the disk is full; what was written until then is the caller's to delete.
    """
    experts = blueprint.experts
    if isinstance(blueprint.checkpoint, QuantisedCheckpoint):
        raise ModelError(
            f"{blueprint.folder} is quantised, and experts are cut out of 16-bit tensors only: fit the 16-bit original"
        )
    if not isinstance(experts, ExpertMap):
        raise ModelError(
            f"{blueprint.folder} is packed, which is not a Hugging Face checkpoint: fit the original, then pack the "
            "result with `moedge pack`"
        )
    small = narrow(blueprint, kept)
    backbone, ahead = _backbone(blueprint, small.checkpoint)
    shards = _shards([*backbone, *_experts(experts, small)])
    config = _config(blueprint, small, ahead)
    total = sum(piece.nbytes for shard in shards for piece in shard)
    with _writing(folder):
        _check_space(folder, total)
        _write_shards(small.checkpoint, shards, folder, total, note)
        for path in small_files(blueprint.folder):
            shutil.copyfile(path, folder / path.name)
        (folder / "config.json").write_text(config, encoding="utf-8")
    draw(folder, blueprint.dtype).checkpoint.close()  # raises unless config and experts belong together


def _backbone(blueprint: Blueprint, small: Checkpoint) -> tuple[list[Piece], bool]:
    """What is no expert's; and whether the checkpoint has layers that transformers leaves alone."""
    behind, pieces = left_behind(blueprint), []
    for name, info in small.tensors.items():
        if name in blueprint.experts.tensors or name in behind:
            continue
        ranges = () if name in small.rows else ((info.offset, info.nbytes),)
        pieces.append(Piece(name, small.shape(name), info, ranges))
    return pieces, bool(behind)


def left_behind(blueprint: Blueprint) -> set[str]:
    """The tensors that transformers does not load, such as those of layers that guess further tokens."""
    ignored = [re.compile(pattern) for pattern in blueprint.meta._keys_to_ignore_on_load_unexpected or ()]
    state, target_of = blueprint.meta.state_dict().keys(), target_names(blueprint.meta)
    names = blueprint.checkpoint.tensors.keys() - blueprint.experts.tensors
    return {n for n in names if any(pattern.search(n) for pattern in ignored) and target_of(n)[0] not in state}


def small_files(folder: Path) -> list[Path]:
    """What goes along with the weights besides config.json: tokenizer, generation config, licence."""
    return sorted({path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()})


def _experts(full: ExpertMap, small: Blueprint) -> Iterator[Piece]:
    """An expert's own tensors under the names that its new number has in the full model; stacks of what is kept."""
    stacks: dict[str, tuple[TensorInfo, list[tuple[int, int]]]] = {}
    fewer = small.experts
    assert isinstance(fewer, ExpertMap)
    for layer in small.anatomy.layers:
        for expert in range(layer.num_experts):
            here = [part for source in fewer.sources(layer.index, expert) for part in source.parts]
            there = [part for source in full.sources(layer.index, expert) for part in source.parts]
            for part, named in zip(here, there, strict=True):
                place = (part.offset, part.nbytes)
                if part.shape == part.info.shape:
                    yield Piece(named.info.name, part.shape, part.info, (place,))
                else:
                    stacks.setdefault(part.info.name, (part.info, []))[1].append(place)
    for name, (info, places) in stacks.items():
        yield Piece(name, (len(places), *info.shape[1:]), info, tuple(places))


def _shards(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Those of one file together, as far as the limit allows."""
    by_file: dict[Path, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: piece.info.offset):
        by_file.setdefault(piece.info.file, []).append(piece)
    shards: list[list[Piece]] = []
    for _, found in sorted(by_file.items()):
        room = 0
        for piece in found:
            if piece is found[0] or piece.nbytes > room:
                shards.append([])
                room = LIMIT
            shards[-1].append(piece)
            room -= piece.nbytes
    return [_aligned(shard) for shard in shards]


def _aligned(shard: list[Piece]) -> list[Piece]:
    """In such an order that each lies at the address modulo 64 that it had in its file, on which products depend.

    As far as tensors of odd sizes allow, which go last. Data begins at the address of the first.
    """
    waiting: dict[int, deque[Piece]] = {}
    for piece in sorted(shard, key=lambda piece: piece.nbytes % ALIGNMENT != 0):
        waiting.setdefault(piece.info.offset % ALIGNMENT, deque()).append(piece)
    at, placed = max(waiting, key=lambda shift: len(waiting[shift])), []
    while waiting:
        shift = at if at in waiting else next(iter(waiting))
        placed.append(waiting[shift].popleft())
        if not waiting[shift]:
            del waiting[shift]
        at = (at + placed[-1].nbytes) % ALIGNMENT
    return placed


def _config(blueprint: Blueprint, small: Blueprint, ahead: bool) -> str:
    """The checkpoint's config.json with the new count under every name that its readers use."""
    values = json.loads((blueprint.folder / "config.json").read_text(encoding="utf-8"))
    text = values["text_config"] if isinstance(values.get("text_config"), dict) else values
    count, full = small.anatomy.layers[0].num_experts, blueprint.anatomy
    names = {*count_names(blueprint.config, full), *count_names(blueprint.config.get_text_config(decoder=True), full)}
    if names & {"num_experts", "num_local_experts"}:  # some read the one, some the other
        names |= {"num_experts", "num_local_experts"}
    text |= dict.fromkeys(names, count)
    counts = {layer.num_experts for layer in full.layers}
    for part in (values, text):
        part |= {name: count for name in COUNTS if part.get(name) in counts}
        part |= {name: 0 for name in _AHEAD if ahead and name in part}
    return json.dumps(values, indent=2) + "\n"


def _write_shards(
    checkpoint: Checkpoint, shards: Sequence[Sequence[Piece]], folder: Path, total: int, note: Report
) -> None:
    done, weight_map = 0, dict[str, str]()
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {piece.name: name for piece in shard}
        with _File(folder / name) as file:
            file.write(memoryview(_header(shard)))
            for piece in shard:
                for block in _blocks(checkpoint, piece):
                    file.write(memoryview(block.numpy().data))
                    done += len(block)
                    note(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shard: Sequence[Piece]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in shard:
        place = [end, end + piece.nbytes]
        entries[piece.name] = {"dtype": _DTYPE_NAMES[piece.info.dtype], "shape": piece.shape, "data_offsets": place}
        end += piece.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = len(text) + (shard[0].info.offset - 8 - len(text)) % ALIGNMENT
    return length.to_bytes(8, "little") + text.ljust(length)


def _blocks(checkpoint: Checkpoint, piece: Piece) -> Iterator[torch.Tensor]:
    """The tensor's bytes, uint8, some at a time."""
    if not piece.ranges:
        yield checkpoint.read_rows(piece.info.name).contiguous().view(-1).view(torch.uint8)
    shard = checkpoint.shard(piece.info.file)
    for offset, nbytes in piece.ranges:
        for start in range(0, nbytes, READ_BLOCK):
            yield shard.pread(offset + start, min(READ_BLOCK, nbytes - start), piece.info.name, shift=0)


class _File:
    """A file that is written without staying in the page cache."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._at = self._dropped = 0

    def write(self, data: memoryview) -> None:
        while data:
            count = os.write(self._fd, data)
            data, self._at = data[count:], self._at + count
        if self._at - self._dropped > DROP_AFTER:
            self._drop()

    def _drop(self) -> None:
        os.fsync(self._fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, self._at, os.POSIX_FADV_DONTNEED)
        self._dropped = self._at

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        try:
            if kind is None:
                self._drop()
        finally:
            os.close(self._fd)


def _check_space(folder: Path, nbytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise CheckpointError(
            f"{folder} will take {format_size(nbytes)}, its disk has {format_size(free)} for it: free "
            f"{format_size(nbytes - free)} or choose another disk"
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Names the folder and the remedy where it cannot be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "its disk is full: free some space" if full else f"{error.strerror}: choose another folder"
        raise CheckpointError(f"{folder} cannot be written, {what}") from error
