"""Three prompts on a small MoE with room for half of its experts; then the same without a limit: the text is equal.

python examples/demo.py [MODEL]      # default checkpoints/mini
"""

import sys
from pathlib import Path

import click

import moedge
from moedge.models.hub import resolve
from moedge.models.load import draw
from moedge.runtime.budget import make_plan
from moedge.runtime.device import process_memory
from moedge.runtime.verb_plan import print_plan
from moedge.units import format_size

PROMPTS = {
    "a novel": "The old house stood at the end of the lane, and",
    "biomedicine": "The expression of the gene was significantly increased in patients with",
    "code": "def __init__(self, name",
}


def half_of_the_experts(model: str) -> int:
    """The limit that leaves slots for half of the experts, from the same plan that `moedge plan` prints."""
    blueprint = draw(resolve(model))
    plan = make_plan(blueprint, limit=1 << 40, context=512)
    blueprint.checkpoint.close()
    fixed = sum(row.nbytes for row in plan.rows[:-1])
    return fixed + (sum(plan.num_experts) // 2 + plan.spare) * plan.slot_bytes


def answer(lm: moedge.LM, prompt: str, show: bool) -> str:
    """Stream one answer, then what the cache did."""
    text, hits, misses, read, seconds = "", 0, 0, 0, 0.0
    for step in lm.generate(prompt, max_new_tokens=48):
        text += step.text
        hits, misses, read, seconds = (
            hits + step.hits,
            misses + step.misses,
            read + step.bytes_read,
            seconds + step.seconds,
        )
        click.echo(step.text if show else "", nl=False)
    if show:
        rate = f"{hits / (hits + misses):.0%} of the experts were in memory" if hits + misses else "no experts used"
        click.secho(f"\n  [{rate}, {format_size(read)} read, {seconds:.1f} s]\n", dim=True)
    return text


def main(model: str) -> None:
    with moedge.load(model, memory=half_of_the_experts(model), context=512) as lm:
        print_plan(lm.plan, title=f"{model} with room for half of its experts")
        limited = {}
        for domain, prompt in PROMPTS.items():
            click.echo(f"\n{domain}: " + click.style(prompt, bold=True), nl=False)
            limited[domain] = answer(lm, prompt, show=True)
        click.echo(
            f"Peak memory of the process: {format_size(process_memory()[1])}, limit {format_size(lm.plan.limit or 0)}."
        )
    with moedge.load(model) as lm:
        same = all(answer(lm, prompt, show=False) == limited[domain] for domain, prompt in PROMPTS.items())
    click.echo(f"The same text without a limit: {'yes' if same else 'NO'}.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).resolve().parent.parent / "checkpoints" / "mini"))
