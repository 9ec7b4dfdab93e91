"""The profile pass of `moedge pack --calibrate`: run the model over texts, see what goes into its experts' matrices.

The model runs from disk within the memory limit as it would anyway; its experts modules compute here, so that each
matrix's input is seen. Knows the model and tokens; what is made of the inputs is in calibrate.py.
"""

import gc
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moedge.errors import CheckpointError, DataError, MemoryLimitError, ModelError
from moedge.models.anatomy import MoeLayer
from moedge.models.load import Blueprint, load_tokenizer
from moedge.runtime.calibrate import MOMENTS, Inputs, Moments
from moedge.runtime.device import return_freed_memory
from moedge.runtime.experts import ExpertSource, feed_forward, multiply
from moedge.runtime.journal import Unfinished
from moedge.runtime.lm import LM, load
from moedge.runtime.session import Session, check_ids
from moedge.runtime.store import Parameters
from moedge.runtime.texts import read_texts
from moedge.units import format_size

WINDOW = 512  # tokens read from one beginning
TOKENS = 32 * WINDOW  # the most that are read: each window may read every expert again from the disk
Report = Callable[[int, int], None]  # tokens done, of how many


class Profile:
    """The first TOKENS tokens of a text or JSONL file, in `windows`, and what the inputs of experts are like on them.

    Raises DataError for a file without tokens, CheckpointError for a model without a tokenizer, ModelError for one that
    cannot be calibrated.
    """

    def __init__(self, blueprint: Blueprint, path: Path) -> None:
        self._blueprint = blueprint
        self._counts = [layer.num_experts for layer in blueprint.anatomy.layers]
        self._inputs = [inputs_of(layer) for layer in blueprint.anatomy.layers]
        if blueprint.anatomy.encoder_decoder:
            raise ModelError(f"{blueprint.folder} is an encoder-decoder, which --calibrate does not run: pack without")
        size = min(WINDOW, blueprint.max_context or WINDOW)
        self.windows: list[tuple[int, ...]] = []
        left = TOKENS
        for window in _windows(blueprint.folder, path, size):
            self.windows.append(window[:left])
            left -= len(window)
            if left <= 0:
                break
        if not self.windows:
            raise DataError(f"{path} has no tokens to calibrate on: give a text like those that the model will read")

    @property
    def identity(self) -> dict[str, str]:
        """Which tokens are read."""
        ids = array("q", (token for window in self.windows for token in (*window, -1)))
        return {"calibration": hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()}

    @property
    def nbytes(self) -> int:
        """What the moments take, in memory and on the disk."""
        return Moments.nbytes_of(self._counts, self._inputs)

    def moments(self, memory: int | None, unfinished: Unfinished, report: Report) -> Moments:
        """The moments of the experts' inputs: those of an earlier run of this pack, or measured now.

        They are saved beside the unfinished pack and their checksum stands in the journal, so that a run that was
        killed goes on with the same. Raises MemoryLimitError.
        """
        if memory is not None and self.nbytes > memory:
            raise MemoryLimitError(
                f"--calibrate measures {format_size(self.nbytes)}, --memory gives {format_size(memory)}: raise it, or "
                "pack without"
            )
        found = Moments(self._counts, self._inputs)
        path, key = unfinished.folder / MOMENTS, (len(self._counts), 0)  # in the journal: behind the last experts
        earlier = unfinished.done.get(key)
        if earlier is not None and path.exists():
            found.load(path)
            if found.checksum == earlier:
                return found
            found.clear()
        with load(self._blueprint.folder, memory=memory, context=max(map(len, self.windows))) as lm:
            measure(lm, self.windows, found, report)
        del lm
        gc.collect()  # hooks and modules know each other; packing needs the memory
        return_freed_memory()
        if earlier not in (None, found.checksum):
            raise CheckpointError(
                f"{path} is damaged, and what is measured now differs from what some experts were packed with: "
                f"delete {unfinished.folder} and give the same command again"
            )
        found.save(path)
        unfinished.record(*key, found.checksum)
        return found


def _windows(folder: Path, path: Path, size: int) -> Iterator[tuple[int, ...]]:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} has no tokenizer to read {path} with: copy the tokenizer's files beside the weights"
        )
    for text in read_texts(path):
        ids = [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]
        yield from (tuple(ids[at : at + size]) for at in range(0, len(ids), size))


def inputs_of(layer: MoeLayer) -> Inputs:
    """The matrices of a layer's experts, and how many inputs they have."""
    side = 0 if layer.kind.transposed else 1
    return {name: shape[side] for name, (shape, _) in layer.parameters.items() if len(shape) == 2}


def measure(lm: LM, windows: Sequence[Sequence[int]], moments: Moments, report: Report) -> None:
    """Have the model read every window, and add up the moments."""
    modules: list[Any] = [lm.model.get_submodule(layer.experts) for layer in lm.anatomy.layers]
    session, done, total = Session(lm), 0, sum(map(len, windows))
    try:
        for layer, module in zip(lm.anatomy.layers, modules, strict=True):
            module.forward = partial(_forward, module, layer, moments)
        for window in windows:
            check_ids(lm, window)
            for hidden in session.hidden(window):
                done += len(hidden)
                report(done, total)
    finally:
        for module in modules:
            del module.forward


def _forward(module: Any, layer: MoeLayer, moments: Moments, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """As the eager forward, [T, H], [T, k], [T, k] -> [T, H], with every expert's inputs seen."""
    source: ExpertSource = module._moedge_source
    out = torch.zeros_like(hidden, dtype=source.sum_dtype(module, hidden, weights))
    terms = {}
    for expert, parameters in source.fetch(index, weights):
        token, position = torch.where(index == expert)
        gate = weights[token, position]
        inputs: dict[str, Tensor] = {}  # of each matrix, [N, I]

        def seen(x: Tensor, parameters: Parameters, name: str, transposed: bool, inputs: Any = inputs) -> Tensor:
            inputs[name] = x
            return multiply(x, parameters, name, transposed)

        value = feed_forward(module, parameters, hidden[token], seen) * gate[:, None]
        moments.add(layer.index, expert, inputs, gate)
        terms[expert] = token, value
    for expert in sorted(terms):  # experts arrive in any order
        token, value = terms[expert]
        out.index_add_(0, token, value.to(out.dtype))
    return out.to(hidden.dtype)
