"""Trains the mini model: `python -m recipes.mini.run --data ../shared/data`. Run it again to continue after a stop."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moedge.train.data import Mixture
from moedge.train.kernels import install
from moedge.train.loop import Settings, train
from recipes.mini.prepare import END, TURN, VOCABULARY, prepare, streams

SHARES = {
    "novel": 0.27,
    "biomedicine": 0.195,
    "encyclopaedia": 0.04,
    "code": 0.04,
    "languages": 0.03,
    "play": 0.02,
    "mathematics": 0.02,
    "sst2": 0.13,
    "language": 0.06,
    "arithmetic": 0.18,
    "kind": 0.015,
}
DECAY_SHARES = SHARES | {
    "novel": 0.23,
    "biomedicine": 0.17,
    "sst2": 0.09,
    "sst2-long": 0.08,
    "arithmetic": 0.28,
}
ROW, LONG_ROW, LONG_EVERY = 512, 2048, 6
FOCUS = 0.0  # weight of the entropy of a row's experts; 0.06 at the end let experts die (docs/log.md)


def curriculum(step: int, decay: float) -> tuple[Mapping[str, float], int]:
    """More of the tasks while the rate decays, and then every sixth step has rows of 2048 tokens."""
    if decay == 0:
        return SHARES, ROW
    return DECAY_SHARES, LONG_ROW if step % LONG_EVERY == 0 else ROW


def common(end: int, turn: int) -> dict[str, Any]:
    """What the configs of the models that are trained so have alike: vocabulary, context and special tokens."""
    return {
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "max_position_embeddings": LONG_ROW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "bos_token_id": None,
        "eos_token_id": [end, turn],
        "pad_token_id": end,
    }


def make_model(end: int, turn: int) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        **common(end, turn),
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    install(model)
    return model


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/mini"), show_default=True)
@click.option("--tokens", type=int, default=14_000_000, show_default=True, help="Tokens to train on.")
@click.option("--minutes", type=float, help="End after this many minutes, as far as that is.")
@click.option("--workers", type=int, default=2, show_default=True, help="Cores to train on.")
def main(data: Path, work: Path, tokens: int, minutes: float | None, workers: int) -> None:
    """Train the mini model: prepare what is not there, then train or continue."""
    torch.set_num_threads(1)  # each worker is a thread
    prepare(data, work)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    end, turn = (tokenizer.get_vocab()[token] for token in (END, TURN))
    deadline = time.time() + 60 * minutes if minutes else None
    settings = Settings(tokens=tokens, decay=0.22, focus=FOCUS, deadline=deadline, workers=workers)
    model = make_model(end, turn)
    result = train(model, Mixture(streams(work)), curriculum, settings, work / "checkpoints", tokenizer=tokenizer)
    click.echo(f"{result.tokens:,} tokens in {result.step:,} steps, {'finished' if result.finished else 'stopped'}")


if __name__ == "__main__":
    main()
