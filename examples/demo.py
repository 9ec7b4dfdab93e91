"""Three prompts on a small MoE (default checkpoints/mini) with room for half of its experts; then without a limit."""

import sys
from pathlib import Path

import click

import moedge
from moedge.models.load import draw
from moedge.runtime.budget import make_plan
from moedge.runtime.device import forget_peak
from moedge.runtime.tally import Tally
from moedge.runtime.verb_plan import print_plan

PROMPTS = {
    "a novel": "The old house stood at the end of the lane, and",
    "biomedicine": "The expression of the gene was significantly increased in",
    "code": "def __init__(self, name",
}


def half_of_the_experts(model: Path) -> int:
    """The limit that leaves slots for half of the experts, from the same plan that `moedge plan` prints."""
    blueprint = draw(model)
    plan = make_plan(blueprint, limit=1 << 40, context=512)
    blueprint.checkpoint.close()
    fixed = sum(row.nbytes for row in plan.rows if row.name != "expert slots")
    return fixed + (sum(plan.num_experts) // 2 + plan.spare) * plan.slot_bytes


def answer(lm: moedge.LM, prompt: str, show: bool) -> str:
    """The answer, streamed if `show`, and then what the cache did."""
    tally = Tally()
    for step in lm.generate(prompt, max_new_tokens=48, temperature=0.7, top_p=0.9, seed=1):
        tally.add(step)
        click.echo(step.text if show else "", nl=False)
    if show:
        click.secho(f"\n  {tally.line()}\n", dim=True)
    return tally.text


def main(model: Path) -> None:
    moedge.load(model, memory="64GiB").close()  # what loading imports and leaves is then in the figure for the process
    limit = max(half_of_the_experts(model) for _ in range(4))
    forget_peak()  # of loading without a limit
    with moedge.load(model, memory=limit, context=512) as lm:
        print_plan(lm.plan, title=f"{model.name} with room for half of its experts")
        limited = {}
        for domain, prompt in PROMPTS.items():
            click.echo(f"\n{domain}: {click.style(prompt, bold=True)}", nl=False)
            limited[prompt] = answer(lm, prompt, show=True)
    with moedge.load(model) as lm:
        same = all(answer(lm, prompt, show=False) == text for prompt, text in limited.items())
    click.echo(f"The text without a limit is {'the same' if same else 'ANOTHER: this is a bug'}.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "checkpoints" / "mini")
