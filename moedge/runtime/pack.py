"""Write a packed checkpoint, expert by expert, and check one. The format is in models/pack.py.

Each thread reads one expert, makes its extent and writes it past the page cache to its place in the file; the backbone
and the header follow. Knows files and extents; no model is loaded.
"""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moedge.errors import CheckpointError, MemoryLimitError, ModelError
from moedge.models.backbone import matrices as find_matrices
from moedge.models.checkpoint import READ_BLOCK
from moedge.models.hub import FILES, resolve
from moedge.models.load import Blueprint, draw
from moedge.models.pack import (
    BACKBONE,
    EXPERTS,
    Manifest,
    PackedCheckpoint,
    PackedLayer,
    checksum,
    is_packed,
)
from moedge.models.quantised import QuantisedCheckpoint, without_quantisation
from moedge.models.shorten import can_shorten, shorten
from moedge.runtime.budget import later
from moedge.runtime.calibrate import MOMENTS, Moments
from moedge.runtime.device import private_memory, return_freed_memory
from moedge.runtime.extents import SCRATCH, describe, extent_of, fill
from moedge.runtime.formats import PLAIN, SHORT, Format
from moedge.runtime.journal import Unfinished
from moedge.runtime.pack_backbone import Backbone
from moedge.runtime.reader import BLOCK, DirectReader
from moedge.runtime.slots import Slots
from moedge.runtime.sources import Source
from moedge.runtime.store import read_expert
from moedge.units import format_size, whole_pages

if TYPE_CHECKING:
    from moedge.runtime.profiling import Profile

THREADS = 6  # experts under way at once; each waits for the disk most of the time
Report = Callable[[int, int], None]  # bytes done, of how many


def pack(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: Format = PLAIN,
    memory: int | None = None,
    report: Report = lambda done, total: None,
    calibrate: Path | None = None,
    reading: Report = lambda tokens, total: None,
    backbone: int = 16,
) -> dict[str, int]:
    """Write `model` to the folder `out`, its experts in `format`; sizes in bytes of what was written.

    `memory` limits the process. `calibrate`: texts for which int8 and int4 are made best; `reading` hears of the tokens
    of it that are read. `backbone`: bits of the other matrices. Continues a run that was killed, to the same bytes.
    Raises CheckpointError where `out` exists, the disk is full, or the model is damaged; ModelError; MemoryLimitError.
    """
    folder, out = resolve(model), Path(out)
    if is_packed(folder):
        raise ModelError(f"{folder} is packed already: pack the original")
    blueprint = draw(folder, quantised=True)
    try:
        plan = _Plan(blueprint, format, backbone)
        if calibrate is not None and isinstance(blueprint.checkpoint, QuantisedCheckpoint):
            raise ModelError(f"{folder} is quantised, --calibrate needs the 16-bit original: give that instead")
        threads = _threads(plan, memory)
        if calibrate is not None:
            from moedge.runtime.profiling import Profile  # here: it brings what runs models

            plan.profile = Profile(blueprint, calibrate)
        unfinished = Unfinished(out, plan.identity())
        try:
            unfinished.check_space(plan.total + (plan.profile.nbytes if plan.profile else 0))
            with unfinished.writing():
                if plan.profile:
                    plan.moments = plan.profile.moments(memory, unfinished, reading)
                    threads = _threads(plan, memory)  # again: the moments stay in memory
                _write(plan, unfinished, threads, report)
            unfinished.finish(MOMENTS)
        finally:
            unfinished.close()
    finally:
        blueprint.checkpoint.close()
    sizes = {name: (out / name).stat().st_size for name in (EXPERTS, BACKBONE)}
    return {
        "experts": len(plan.manifest.keys),
        "experts_bytes": sizes[EXPERTS],
        "backbone_bytes": sizes[BACKBONE],
        "total_bytes": sum(file.stat().st_size for file in out.iterdir()),
    }


class _Plan:
    """What will be written, known before a byte is."""

    def __init__(self, blueprint: Blueprint, format: Format, backbone: int) -> None:
        self.short = format == SHORT
        if self.short:
            _check_shortens(blueprint)
            format = PLAIN
        self.blueprint, self.format = blueprint, format
        self.profile: Profile | None = None
        self.moments: Moments | None = None
        self.source = Source(blueprint, format)
        self.checkpoint, self.experts = blueprint.checkpoint, self.source.experts
        tensors = [info for info in self.checkpoint.tensors.values() if info.name not in self.experts.tensors]
        matrices = find_matrices(blueprint.meta, blueprint.anatomy, self.checkpoint.tensors) if backbone < 16 else set()
        self.backbone = Backbone(self.checkpoint, tensors, matrices, Format("int4" if backbone == 4 else "int8"))
        self.small = _small_files(blueprint.folder)
        none, formats = "0" * 8, self.source.formats
        layers = [describe(layer, self.experts, formats[layer.index]) for layer in blueprint.anatomy.layers]
        self.manifest = Manifest(
            source=source_of(blueprint),
            layers=tuple(replace(layer, short=self.short) for layer in layers),
            backbone={name: (none, shift) for name, shift in self.backbone.shifts.items()},
            backbone_header=none,
            files={path.name: none for path in self.small},
            extents=(none,) * sum(layer.num_experts for layer in blueprint.anatomy.layers),
            coded=self.backbone.coded,
        )

    @property
    def total(self) -> int:
        """Bytes of the whole folder."""
        small = sum(path.stat().st_size for path in self.small)
        return self.manifest.file_size + self.backbone.nbytes + small

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued: the header, and the files that are read."""
        stats = [(path.name, path.stat()) for path in (*self.checkpoint.files, *self.small)]
        files = sorted((name, status.st_size, status.st_mtime_ns) for name, status in stats)
        found = {"header": checksum(self.manifest.head()), "files": files, "torch": torch.__version__}
        return found | (self.profile.identity if self.profile else {})


def _check_shortens(blueprint: Blueprint) -> None:
    """Raises ModelError where the experts are not bf16, or not such that 12 bits hold them."""
    quantised = isinstance(blueprint.checkpoint, QuantisedCheckpoint)
    if quantised or not can_shorten(blueprint.experts, blueprint.checkpoint):
        what = "quantised" if quantised else str(blueprint.dtype).removeprefix("torch.")
        raise ModelError(
            f"{blueprint.folder} is {what}: --bits 12 is for bf16 whose numbers have about the same size, and needs "
            "the C kernels; take --bits 16, which is exact too"
        )


def packed_sizes(blueprint: Blueprint, format: Format, without: Container[str] = ()) -> tuple[int, int]:
    """Bytes that one expert of every layer takes in a pack, and that everything else does but the tensors `without`."""
    plan = _Plan(blueprint, format, 16)
    each = sum(layer.stride for layer in plan.manifest.layers)
    left = sum(info.nbytes for name, info in blueprint.checkpoint.tensors.items() if name in without)
    return each, plan.total - left - sum(layer.num_experts * layer.stride for layer in plan.manifest.layers)


def source_of(blueprint: Blueprint) -> dict[str, str]:
    """Tells this model from others: hashes of its config, and of its tensors' names, types and shapes."""
    infos = sorted(blueprint.checkpoint.stored.values(), key=lambda info: info.name)
    shapes = json.dumps([(info.name, str(info.dtype), info.shape) for info in infos])
    config = (blueprint.folder / "config.json").read_bytes()
    return {name: _hash(value) for name, value in (("config", config), ("tensors", shapes.encode()))}


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _small_files(folder: Path) -> list[Path]:
    """What is copied: all that moedge fetches from the hub but weights, and the model's card and licence."""
    patterns = [*(p for p in FILES if "safetensors" not in p), "*.md", "LICENSE*"]
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not path.name.endswith(".index.json"))


def _threads(plan: _Plan, memory: int | None) -> int:
    """How many experts can be under way within the limit. Raises MemoryLimitError."""
    slot = plan.experts.slot_bytes
    extent = max(layer.stride for layer in plan.manifest.layers)
    each = slot + plan.experts.conversion_bytes + plan.source.overhead + BLOCK
    each += 0 if plan.format == PLAIN and not plan.short else extent
    each += SCRATCH if plan.format != PLAIN or plan.source.overhead or plan.backbone.coded else 0
    if memory is None:
        return THREADS
    fixed = private_memory() + later(0) + 2 * READ_BLOCK
    if memory < fixed + each:
        raise MemoryLimitError(
            f"packing needs {format_size(fixed + each)}, {format_size(each)} of it for one expert, "
            f"--memory gives {format_size(memory)}: raise it"
        )
    return_freed_memory()
    return min(THREADS, (memory - fixed) // each)


def _write(plan: _Plan, unfinished: Unfinished, threads: int, report: Report) -> None:
    manifest, folder = plan.manifest, unfinished.folder
    total = manifest.file_size + plan.backbone.nbytes
    done = 0
    extents: dict[tuple[int, int], str] = {}
    writer = _ExtentWriter(plan, unfinished)
    with ThreadPoolExecutor(threads, thread_name_prefix="moedge-pack") as pool:
        try:
            futures = {pool.submit(writer.write, *key): key for key in manifest.keys}
            for future in as_completed(futures):
                key = futures[future]
                extents[key] = future.result()
                done += manifest.layers[key[0]].stride
                report(done, total)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            writer.close()
    head, of_tensors = plan.backbone.write(folder / BACKBONE, lambda count: report(done + count, total))
    files = {path.name: _copy(path, folder / path.name, plan) for path in plan.small}
    final = manifest.with_checksums(tuple(extents[key] for key in manifest.keys), of_tensors, head, files)
    with open(folder / EXPERTS, "r+b") as file:
        file.write(final.head())
    report(total, total)


class _ExtentWriter:
    """Makes and writes single extents, on any number of threads at once."""

    def __init__(self, plan: _Plan, unfinished: Unfinished) -> None:
        self._plan, self._unfinished = plan, unfinished
        self._places = plan.manifest.places
        self._reader = plan.source.reader()
        self._fd = _open_direct(unfinished.folder / EXPERTS)
        self._memory = threading.local()
        self._extents = [extent_of(layer) for layer in plan.manifest.layers]

    def write(self, layer: int, expert: int) -> str:
        """The checksum of the extent, which is in its place now: from an earlier run where that is still right."""
        packed, offset = self._plan.manifest.layers[layer], self._places[layer, expert]
        source, target = self._buffers(layer, packed)
        earlier = self._unfinished.done.get((layer, expert))
        if earlier is not None and self._holds(target.numpy().data, offset, earlier):
            return earlier
        self._make(layer, expert, source, target)
        digits = checksum(target)
        view, done = target.numpy().data, 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)
        self._unfinished.record(layer, expert, digits)
        return digits

    def _make(self, layer: int, expert: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """The extent in `target`, which is `source` where it is plain."""
        source.zero_()  # gaps are zero, whatever was there before
        plan, where = self._plan, f"expert {expert} of layer {layer}"
        if target is source:
            read_expert(plan.experts, self._reader, layer, expert, source)
            return
        target.zero_()
        if plan.short:
            read_expert(plan.experts, self._reader, layer, expert, source)
            if not shorten(source, plan.manifest.layers[layer].nbytes, target):
                raise ModelError(f"{where} has numbers of too many sizes for --bits 12: take --bits 16, exact too")
            return
        if plan.source.keep(self._reader, (layer, expert), source, self._extents[layer], target, where):
            return
        read_expert(plan.experts, self._reader, layer, expert, source)
        transposed = plan.blueprint.anatomy.layers[layer].kind.transposed
        values = plan.experts.views(layer, expert, source)
        moments = plan.moments.of(layer, expert) if plan.moments else None
        fill(self._extents[layer], values, transposed, target, where, moments)

    def _holds(self, view: memoryview, offset: int, expected: str) -> bool:
        """Whether the file has what an earlier run recorded: after a power cut it may not."""
        return os.preadv(self._fd, [view], offset) == len(view) and checksum(view) == expected

    def _buffers(self, layer: int, packed: PackedLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """This thread's memory for the expert as it is and for its extent; the same where that is plain."""
        held = self._memory.__dict__
        if "source" not in held:
            held["source"] = Slots(1, self._plan.experts.slot_bytes)[0]
            if not packed.is_slot:
                held["target"] = Slots(1, max(each.stride for each in self._plan.manifest.layers))[0]
        source: torch.Tensor = held["source"]
        source = source[: whole_pages(self._plan.experts.layouts[layer].nbytes)]
        return source, source if packed.is_slot else held["target"][: packed.stride]

    def close(self) -> None:
        self._reader.close()
        os.close(self._fd)


def _open_direct(path: Path) -> int:
    """Open for reading and writing, past the page cache where the file system does that."""
    flags = os.O_RDWR | os.O_CREAT
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o666)


def _copy(source: Path, target: Path, plan: _Plan) -> str:
    data = source.read_bytes()
    if source.name == "config.json" and (isinstance(plan.checkpoint, QuantisedCheckpoint) or plan.backbone.coded):
        data = without_quantisation(data, plan.blueprint.dtype)
    target.write_bytes(data)
    return checksum(data)


def verify(folder: Path, report: Report = lambda done, total: None) -> dict[str, int]:
    """Check every byte of a packed folder; counts of what was checked.

    Raises CheckpointError, naming file and expert or tensor, for the first that is damaged.
    """
    if not is_packed(folder):
        raise CheckpointError(f"{folder} has no {EXPERTS}: it is not a packed model")
    checkpoint = PackedCheckpoint(folder)
    reader = DirectReader(checkpoint)
    try:
        manifest, done = checkpoint.manifest, 0
        total = sum(info.nbytes for info in checkpoint.stored.values())
        for name in manifest.backbone:
            done += checkpoint.read(name).nbytes
            report(done, total)
        memory = Slots(1, max(layer.stride for layer in manifest.layers))[0]
        for layer, expert in manifest.keys:
            part = checkpoint.extent(layer, expert)
            done += reader.read_extent(part, memory[: part.nbytes])
            checkpoint.check(layer, expert, memory[: part.nbytes])
            report(done, total)
        return {"experts": len(manifest.keys), "tensors": len(manifest.backbone), "files": len(manifest.files)}
    finally:
        reader.close()
        checkpoint.close()
