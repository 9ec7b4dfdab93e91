"""Quantised checkpoints made from tiny ones, by plain implementations of the formats that share no code with moedge.

Integers and scales are random; each writer also gives the dense matrices that they stand for, number by number.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, torch.Tensor]  # stored tensors by what their names end in, and the dense matrix in float64
Write = Callable[[tuple[int, ...], torch.Generator], Made]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantised(
    original: Path, out: Path, is_quantised: Callable[[str], bool], write: Write, config: dict[str, Any]
) -> Tensors:
    """Write to `out` the checkpoint `original` with some of its tensors quantised; returns the dense tensors of all."""
    shutil.copytree(original, out)
    chance = torch.Generator().manual_seed(11)
    tensors: Tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    for file in out.glob("*.index.json"):
        file.unlink()
    stored: Tensors = {}
    dense: Tensors = {}
    for name, tensor in tensors.items():
        if not is_quantised(name):
            stored[name] = dense[name] = tensor
            continue
        made, values = write(tuple(tensor.shape), chance)
        dense[name] = values
        stored |= {end.replace("NAME", name.removesuffix(".weight")): part for end, part in made.items()}
    save_file({name: each.contiguous() for name, each in stored.items()}, out / "model.safetensors", {"format": "pt"})
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return dense


def dense_copy(quantised_folder: Path, out: Path, dense: Tensors, dtype: torch.dtype) -> Path:
    """The checkpoint of the dense tensors, in `dtype`."""
    out.mkdir()
    for file in quantised_folder.glob("*.json"):
        shutil.copy(file, out)
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    config["dtype"] = str(dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in dense.items()}
    save_file({name: each.contiguous() for name, each in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out


def mxfp4(shape: tuple[int, ...], chance: torch.Generator) -> Made:
    """Of parameters [E, in, out]."""
    experts, inputs, outputs = shape
    codes = torch.randint(0, 16, (experts, outputs, inputs), generator=chance)
    exponents = torch.randint(119, 124, (experts, outputs, inputs // 32), generator=chance)
    values = torch.tensor(FP4, dtype=torch.float64)[codes]
    values = values * torch.pow(2.0, exponents.double() - 127).repeat_interleave(32, 2)
    packed = codes[..., 0::2] + 16 * codes[..., 1::2]
    blocks = packed.view(experts, outputs, inputs // 32, 16)
    return {"NAME_blocks": blocks.to(torch.uint8), "NAME_scales": exponents.to(torch.uint8)}, values.transpose(1, 2)


def fp8(block: tuple[int, int] | None) -> Write:
    def write(shape: tuple[int, ...], chance: torch.Generator) -> Made:
        rows, columns = shape
        weight = torch.randn(rows, columns, generator=chance).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        if block is None:
            scales = torch.tensor(0.0007)
            return {"NAME.weight": weight, "NAME.weight_scale_inv": scales}, weight.double() * scales.double()
        scales = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=chance) * 0.001 + 0.0003
        dense = weight.double()
        for i, row in enumerate(scales.double()):
            for j, scale in enumerate(row):
                dense[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale
        return {"NAME.weight": weight, "NAME.weight_scale_inv": scales}, dense

    return write


def gptq(bits: int, group: int, *, v2: bool = False, sym: bool = False, act_order: bool = False) -> Write:
    """`group` -1: one for each row."""

    def write(shape: tuple[int, ...], chance: torch.Generator) -> Made:
        outputs, inputs = shape
        wide = inputs if group == -1 else group
        groups = -(-inputs // wide)
        q, zeros, scales, dense = integers(inputs, outputs, groups, bits, sym, chance)
        index = torch.arange(inputs) // wide
        if act_order:
            index = index[torch.randperm(inputs, generator=chance)]
        for i in range(inputs):
            dense[:, i] = (q[i] - zeros[index[i]]).double() * scales[index[i]].double()
        each = 32 // bits
        qweight = torch.zeros(inputs // each, outputs, dtype=torch.int64)
        for i in range(inputs):
            qweight[i // each] += q[i] << bits * (i % each)
        qzeros = torch.zeros(groups, outputs // each, dtype=torch.int64)
        for o in range(outputs):
            qzeros[:, o // each] += (zeros[:, o] - (0 if v2 else 1)) << bits * (o % each)
        stored = {"qweight": words(qweight), "qzeros": words(qzeros), "scales": scales, "g_idx": index.int()}
        return {f"NAME.{name}": each for name, each in stored.items()}, dense

    return write


def awq(group: int) -> Write:
    def write(shape: tuple[int, ...], chance: torch.Generator) -> Made:
        outputs, inputs = shape
        q, zeros, scales, dense = integers(inputs, outputs, inputs // group, 4, False, chance)
        for i in range(inputs):
            dense[:, i] = (q[i] - zeros[i // group]).double() * scales[i // group].double()
        packed = {}
        for name, numbers in (("qweight", q), ("qzeros", zeros)):
            packed[name] = torch.zeros(len(numbers), outputs // 8, dtype=torch.int64)
            for word in range(outputs // 8):
                for place, number in enumerate(AWQ_ORDER):
                    packed[name][:, word] += numbers[:, 8 * word + number] << 4 * place
        return {"NAME.qweight": words(packed["qweight"]), "NAME.qzeros": words(packed["qzeros"]),
                "NAME.scales": scales}, dense  # fmt: skip

    return write


def integers(
    inputs: int, outputs: int, groups: int, bits: int, sym: bool, chance: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [I, O], zeros [G, O], scales [G, O] in fp16, and room for the dense matrix [O, I]."""
    q = torch.randint(0, 2**bits, (inputs, outputs), generator=chance)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=chance)
    if sym:
        zeros = torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.rand(groups, outputs, generator=chance) * 0.2 + 0.05) / 2**bits
    return q, zeros, scales.half(), torch.empty(outputs, inputs, dtype=torch.float64)


def words(numbers: torch.Tensor) -> torch.Tensor:
    """The lowest 32 bits as int32."""
    return ((numbers + 2**31) % 2**32 - 2**31).int()
