"""What a budget is counted in: how many experts a model has, how few it can do with, and the bytes of each on disk.

Knows blueprints and files; no scores, and no weights are read.
"""

from pathlib import Path

from moedge.compress.export import left_behind, small_files
from moedge.compress.plan import Shape
from moedge.errors import ModelError
from moedge.models.checkpoint import INDEX
from moedge.models.hub import resolve
from moedge.models.load import Blueprint, draw
from moedge.models.narrow import constraints
from moedge.models.packed_experts import PackedExperts
from moedge.models.quantised import quantisation
from moedge.runtime.formats import Format
from moedge.runtime.pack import packed_sizes
from moedge.runtime.sources import choose_format
from moedge.units import PAGE

REFUSED = {
    "NllbMoeForConditionalGeneration": "transformers runs its experts 0 and 1 for every token, whatever its router "
    "chooses, so no sample says which are needed"
}


def drawn(model: str) -> Blueprint:
    """The blueprint of a model to be fitted; close its checkpoint when done. Raises ModelError for a quantised one."""
    folder = resolve(model)
    if (folder / "config.json").exists() and quantisation(folder):
        raise ModelError(f"{folder} is quantised: fit the 16-bit original, with --bits to pack the result")
    return draw(folder)


def format_of(folder: Path, bits: int) -> Format:
    """The format that a result of so many bits is packed in."""
    return choose_format(folder, bits, None, False)


def shape_of(blueprint: Blueprint, bits: int | None = None) -> Shape:
    """What a plan has to know of a model, in bytes of the folder that an export makes, or of its pack in `bits`.

    Raises ModelError for a model that cannot do with fewer experts, or not with known ones.
    """
    layers, name = blueprint.anatomy.layers, blueprint.anatomy.architecture
    counts = {layer.num_experts for layer in layers}
    if name in REFUSED:
        raise ModelError(f"{blueprint.folder} is {name}, which cannot be fitted: {REFUSED[name]}; fit another model")
    if isinstance(blueprint.experts, PackedExperts):
        raise ModelError(f"{blueprint.folder} is packed: fit the original, with --bits to pack the result")
    if len(counts) > 1:
        raise ModelError(f"{blueprint.folder} has layers of {min(counts)} to {max(counts)} experts: fit another model")
    rules = constraints(blueprint)
    (count,) = counts
    if bits is None:
        each = sum(blueprint.experts.nbytes(layer.index, 0) for layer in layers)
        other = _folder_bytes(blueprint) - count * each
    else:
        each, other = packed_sizes(blueprint, format_of(blueprint.folder, bits), left_behind(blueprint))
        other += PAGE  # the header is of whole pages, and the config may say the number of experts once more
    return Shape(count, len(layers), rules.minimum, rules.groups, each, other)


def _folder_bytes(blueprint: Blueprint) -> int:
    """Of the full model as `export` would write it."""
    folder, checkpoint = blueprint.folder, blueprint.checkpoint
    beside = [path for path in (folder / "config.json", folder / INDEX, *small_files(folder)) if path.exists()]
    total = sum(path.stat().st_size for path in {*checkpoint.files, *beside})
    return total - sum(checkpoint.tensors[name].nbytes for name in left_behind(blueprint))
