"""Trains the mini model: `python -m recipes.mini.run --data ../shared/data`. Run it again to continue after a stop."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moedge.train.data import Mixture
from moedge.train.kernels import install
from moedge.train.loop import Curriculum, Settings, train
from moedge.train.loss import RouterLoss
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
SPECIALISE_SHARES = {  # more alike, so that the rare domains and tasks get experts too
    "novel": 0.19,
    "biomedicine": 0.15,
    "encyclopaedia": 0.07,
    "code": 0.06,
    "languages": 0.05,
    "play": 0.03,
    "mathematics": 0.04,
    "sst2": 0.08,
    "sst2-long": 0.06,
    "language": 0.05,
    "arithmetic": 0.15,
    "kind": 0.07,
}
SPREAD_OUT_SHARES = SPECIALISE_SHARES | {  # more of what is then still spread out over the experts
    "novel": 0.16,
    "biomedicine": 0.12,
    "encyclopaedia": 0.11,
    "mathematics": 0.08,
    "arithmetic": 0.1,
    "kind": 0.12,
}
# half novels and abstracts, which want the most experts
TEXT_SHARES = SPREAD_OUT_SHARES | {"novel": 0.3, "biomedicine": 0.35}


def curriculum(step: int, decay: float) -> tuple[Mapping[str, float], int]:
    """More of the tasks while the rate decays, and then every sixth step has rows of 2048 tokens."""
    if decay == 0:
        return SHARES, ROW
    return DECAY_SHARES, LONG_ROW if step % LONG_EVERY == 0 else ROW


def long_too(shares: Mapping[str, float]) -> Curriculum:
    """The same shares throughout, and in every sixth step rows of 2048 tokens."""
    return lambda step, _decay: (shares, LONG_ROW if step % LONG_EVERY == 0 else ROW)


def specialising(tokens: int, rate: float, decay: float, balance: float, focus: float) -> Settings:
    """`rate` is Muon's; AdamW has a tenth of it."""
    router = RouterLoss(balance=balance, focus=focus, floor=0.05, steps=20)
    return Settings(tokens=tokens, muon_lr=rate, adam_lr=rate / 10, decay=decay, router=router)


RUNS = (  # one after the other: the folder of its checkpoints, what is mixed, how it is trained
    ("checkpoints", curriculum, Settings(tokens=11_689_984, decay=0.22)),
    ("specialised", long_too(SPECIALISE_SHARES), specialising(4_000_000, 0.012, 0.7, balance=0.05, focus=0.1)),
    ("gathered", long_too(SPREAD_OUT_SHARES), specialising(1_200_000, 0.008, 1.0, balance=0.1, focus=0.3)),
    ("texts", long_too(TEXT_SHARES), specialising(1_400_000, 0.01, 1.0, balance=0.2, focus=0.6)),
)


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
@click.option("--minutes", type=float, help="End each of the runs after this many minutes, as far as that is.")
@click.option("--workers", type=int, default=2, show_default=True, help="Cores to train on.")
def main(data: Path, work: Path, minutes: float | None, workers: int) -> None:
    """Train the mini model: prepare what is not there, then train or continue."""
    torch.set_num_threads(1)  # each worker is a thread
    prepare(data, work)
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    end, turn = (tokenizer.get_vocab()[token] for token in (END, TURN))
    model, mixture = make_model(end, turn), Mixture(streams(work))
    for folder, shares, settings in RUNS:
        deadline = time.time() + 60 * minutes if minutes else None
        settings = replace(settings, deadline=deadline, workers=workers)
        result = train(model, mixture, shares, settings, work / folder, tokenizer=tokenizer)
        done = "finished" if result.finished else "stopped"
        click.echo(f"{folder}: {result.tokens:,} tokens in {result.step:,} steps, {done}")
        if not result.finished:
            break


if __name__ == "__main__":
    main()
