"""Trains it for some minutes: `python -m recipes.second --minutes 25`. Run it again to continue after a stop.

OLMoE: weights of the chosen experts are not made to sum to 1, and there is a norm on whole queries and keys. It takes
mini's data, tokenizer, mixture and loop; the newest checkpoint is a folder that every verb takes. It is not committed.
"""

import shutil
import time
from pathlib import Path

import click
import torch
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from moedge.train.data import Mixture
from moedge.train.kernels import install
from moedge.train.loop import Settings, checkpoints, train
from recipes.mini.prepare import END, TURN, prepare, streams
from recipes.mini.run import common, curriculum


def make_model(end: int, turn: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(  # type: ignore[call-arg]
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        **common(end, turn),
    )
    torch.manual_seed(1)
    model = OlmoeForCausalLM(config)
    install(model)
    return model


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--mini", type=click.Path(path_type=Path), default=Path("runs/mini"), help="Where its data is prepared.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("runs/second"), show_default=True)
@click.option("--tokens", type=int, default=8_000_000, show_default=True, help="Tokens to train on.")
@click.option("--minutes", type=float, help="End after this many minutes, as far as that is.")
def main(data: Path, mini: Path, work: Path, tokens: int, minutes: float | None) -> None:
    """Train the second model; the result is WORK/model."""
    torch.set_num_threads(1)
    prepare(data, mini)
    tokenizer = AutoTokenizer.from_pretrained(mini / "tokenizer")
    end, turn = (tokenizer.get_vocab()[token] for token in (END, TURN))
    deadline = time.time() + 60 * minutes if minutes else None
    settings = Settings(tokens=tokens, decay=0.3, deadline=deadline)
    model = make_model(end, turn)
    result = train(model, Mixture(streams(mini)), curriculum, settings, work / "checkpoints", tokenizer=tokenizer)
    newest = checkpoints(work / "checkpoints")[-1]
    shutil.rmtree(work / "model", ignore_errors=True)
    shutil.copytree(newest, work / "model", ignore=shutil.ignore_patterns("training.pt"))
    click.echo(f"{result.tokens:,} tokens in {result.step:,} steps: {work / 'model'}")


if __name__ == "__main__":
    main()
