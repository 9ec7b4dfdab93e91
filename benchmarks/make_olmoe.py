"""Write a random OLMoE checkpoint of 3.4 GB in the layout that stock `save_pretrained` writes, shard by shard.

    python benchmarks/make_olmoe.py [FOLDER] [--layers 16] [--experts 64] ...

One shard of two layers is in memory at a time. The weights are random: speeds are real, the text is noise. Attention
is sharpened so that greedy text does not fall into a loop, which would make every cache look perfect: with the default
seed 41 of 64 greedy tokens differ, and a per-layer LRU of 16 of 64 experts hits 54% (51% at a quarter of the experts is
reported for OLMoE itself). `--plain` is what transformers initialises instead: its text repeats one token.
"""

import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from report import default_folder
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, PreTrainedTokenizerFast

LAYERS_PER_SHARD = 2
EOS = "<|endoftext|>"
STOCK_STD = 0.02  # the config's initializer_range


@dataclass(frozen=True)
class Shape:
    """Sizes of the checkpoint; the defaults make 3.4 GB in bf16."""

    hidden: int = 1024
    intermediate: int = 512
    layers: int = 16
    experts: int = 64
    top_k: int = 8
    heads: int = 16
    vocabulary: int = 8192
    seed: int = 0
    plain: bool = False

    def config(self) -> OlmoeConfig:
        return OlmoeConfig(
            architectures=["OlmoeForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            eos_token_id=0,
            pad_token_id=0,
            dtype="bfloat16",
        )


def _tensors(shape: Shape, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of one layer; `layer` -1 is the embedding and the head."""
    generator = torch.Generator().manual_seed(shape.seed * 1000 + layer + 1)

    def noise(rows: int, columns: int) -> torch.Tensor:
        # 1/sqrt(fan-in): every block changes the residual stream, so that tokens and routing vary from step to step
        scale = STOCK_STD if shape.plain else columns**-0.5
        return torch.randn(rows, columns, generator=generator).mul_(scale).to(torch.bfloat16)

    hidden, ones = shape.hidden, torch.ones(shape.hidden, dtype=torch.bfloat16)
    if layer == -1:
        embedding = torch.randn(shape.vocabulary, hidden, generator=generator) * (STOCK_STD if shape.plain else 1)
        yield "model.embed_tokens.weight", embedding.to(torch.bfloat16)
        yield "model.norm.weight", ones
        yield "lm_head.weight", noise(shape.vocabulary, hidden)
        return
    prefix = f"model.layers.{layer}"
    sharp, loud = (1, 1) if shape.plain else (4, 2)
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        yield f"{prefix}.{name}.weight", ones * (sharp if name == "self_attn.q_norm" else 1)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"{prefix}.self_attn.{name}.weight", noise(hidden, hidden) * (loud if name == "o_proj" else 1)
    yield f"{prefix}.mlp.gate.weight", noise(shape.experts, hidden)
    for expert in range(shape.experts):
        yield f"{prefix}.mlp.experts.{expert}.gate_proj.weight", noise(shape.intermediate, hidden)
        yield f"{prefix}.mlp.experts.{expert}.up_proj.weight", noise(shape.intermediate, hidden)
        yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", noise(hidden, shape.intermediate)


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens, learnt from a few modules of the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    library = Path(sysconfig.get_path("stdlib"))
    tokenizer.train([str(path) for path in sorted(library.glob("*.py"))[:120]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def make(folder: Path, shape: Shape) -> int:
    """Writes config, tokenizer, shards and index into `folder`; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = [list(range(first, min(first + LAYERS_PER_SHARD, shape.layers)))
              for first in range(0, shape.layers, LAYERS_PER_SHARD)]  # fmt: skip
    groups[-1].append(-1)
    weight_map: dict[str, str] = {}
    total = 0
    for number, layers in enumerate(groups, start=1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {key: value for layer in layers for key, value in _tensors(shape, layer)}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    shape.config().save_pretrained(folder)
    _tokenizer(shape.vocabulary).save_pretrained(folder)
    return total


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--hidden", default=Shape.hidden)
@click.option("--intermediate", default=Shape.intermediate)
@click.option("--layers", default=Shape.layers)
@click.option("--experts", default=Shape.experts)
@click.option("--top-k", default=Shape.top_k)
@click.option("--heads", default=Shape.heads)
@click.option("--vocabulary", default=Shape.vocabulary)
@click.option("--seed", default=Shape.seed)
@click.option("--plain", is_flag=True, help="As transformers initialises: greedy text then repeats itself.")
def main(folder: Path | None, **sizes: Any) -> None:
    """Write the checkpoint into FOLDER (default $MOEDGE_BENCH_DIR/olmoe-3.4gb)."""
    folder = folder or default_folder()
    total = make(folder, Shape(**sizes))
    click.echo(json.dumps({"folder": str(folder), "tensor_bytes": total}))


if __name__ == "__main__":
    main()
