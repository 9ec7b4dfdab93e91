"""The report of a fit: what was kept and why, what it saves and what it costs; and the model card of the result.

Knows figures and text; runs no model and reads no checkpoint. Layers are numbered from 0, as experts are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moedge.compress import page
from moedge.compress.evaluate import Quality
from moedge.compress.page import Block, Bullets, Code, Heading, Paragraph, Plot, Table
from moedge.measure.plots import Axis, Points, bars, heat, lines
from moedge.units import format_size

CURVES = 6  # layers whose CDF is drawn; of more, some from first to last
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_FOLDER_OF_HUB = re.compile(r"models--([^/\\]+?)--([^/\\]+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Layer:
    """One MoE layer. kept: ids of experts; scores: of all experts; tokens: how many the scores saw.

    unrouted: experts that no token went to; cold, moderate, hot: how many experts are in each of LiteMoE's regions.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    tokens: int
    unrouted: tuple[int, ...]
    cold: int
    moderate: int
    hot: int

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(len(self.scores))) - set(self.kept)))


@dataclass(frozen=True)
class Report:
    """What a fit did. before, after: quality of the full and the fitted model by the name of what it was tested on.

    The first of them is the task that was fitted to. bytes_*: the checkpoint on disk. seconds: by step.
    """

    model: str
    command: str
    task: str
    method: str
    budget: str
    reasons: tuple[str, ...]
    layers: tuple[Layer, ...]
    bytes_before: int
    bytes_after: int
    before: Mapping[str, Quality]
    after: Mapping[str, Quality]
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = field(default=())

    @property
    def kept(self) -> int:
        return sum(len(layer.kept) for layer in self.layers)

    @property
    def experts(self) -> int:
        return sum(len(layer.scores) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; `from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Report":
        """The report that `as_dict` gave, also after JSON. Unknown or missing names raise TypeError."""
        layers = tuple(
            Layer(**{**layer, **{name: tuple(layer[name]) for name in ("kept", "scores", "unrouted")}})
            for layer in found["layers"]
        )
        quality = {name: {task: Quality(**q) for task, q in found[name].items()} for name in ("before", "after")}
        texts = {name: tuple(found[name]) for name in ("reasons", "warnings")}
        return cls(**{**found, **quality, **texts, "layers": layers})

    @property
    def title(self) -> str:
        return f"{_short(self.model)} fitted to {self.task}"

    def markdown(self) -> str:
        return page.markdown(self.title, _blocks(self))

    def html(self) -> str:
        return page.html(self.title, _blocks(self))

    def save(self, folder: Path) -> None:
        """Write report.md and report.html."""
        page.write_text(folder / "report.md", self.markdown())
        page.write_text(folder / "report.html", self.html())


def _blocks(report: Report) -> Iterator[Block]:
    yield Paragraph(_summary(report))
    yield Bullets([f"Warning: {warning}" for warning in report.warnings])
    yield Heading("What was asked")
    settings = {"model": report.model, "task": report.task, "method": report.method, "budget": report.budget}
    yield Table(["setting", "value"], list(settings.items()))
    yield Code(report.command)
    yield Bullets(report.reasons)
    yield Heading("What it costs")
    yield Paragraph("On samples that the fit did not see. KL in nats a token, from the full model.")
    yield from quality_tables(report.before, report.after)
    yield Heading("What it saves")
    saved = 1 - report.bytes_after / max(1, report.bytes_before)
    sizes = [format_size(report.bytes_before), format_size(report.bytes_after), _percent(saved)]
    yield Table(["on disk, full", "fitted", "saved"], [sizes])
    yield Heading("Experts")
    yield Table(
        ["layer", "experts", "kept", "dropped", "cold", "moderate", "hot", "tokens seen", "never routed to"],
        [_layer_row(number, layer) for number, layer in enumerate(report.layers)],
    )
    yield from map(Plot, _plots(report))
    yield Table(
        ["layer", "kept", "dropped"],
        [[str(n), ranges(layer.kept), ranges(layer.dropped)] for n, layer in enumerate(report.layers)],
    )
    yield Heading("Time")
    times = [*report.seconds.items(), ("together", sum(report.seconds.values()))]
    yield Table(["step", "seconds"], [[step, f"{seconds:.1f}"] for step, seconds in times])


def _summary(report: Report) -> str:
    share = _percent(report.kept / max(1, report.experts))
    saved = f"{format_size(report.bytes_before)} become {format_size(report.bytes_after)}"
    text = f"{report.kept} of {report.experts} experts are kept ({share}); {saved}."
    name = next(iter(report.after), None)
    if name is None:
        return text
    before, after = report.before[name], report.after[name]
    text += f" On {name}, perplexity goes from {before.perplexity:.4g} to {after.perplexity:.4g}"
    if before.accuracy is not None and after.accuracy is not None:
        text += f" and accuracy from {_percent(before.accuracy)} to {_percent(after.accuracy)}"
    return text + f"; KL {after.kl:.3g}."


def _layer_row(number: int, layer: Layer) -> list[str]:
    counts = (len(layer.scores), len(layer.kept), len(layer.dropped), layer.cold, layer.moderate, layer.hot)
    return [str(number), *map(str, counts), f"{layer.tokens}", ranges(layer.unrouted)]


def quality_tables(before: Mapping[str, Quality], after: Mapping[str, Quality]) -> Iterator[Block]:
    """A table for each thing tested on, full beside fitted; the measures that it has."""
    for name, fitted in after.items():
        full = before[name]
        rows = [
            [
                "perplexity",
                f"{full.perplexity:.4g}",
                f"{fitted.perplexity:.4g}",
                _rise(full.perplexity, fitted.perplexity),
            ]
        ]
        if full.bits_per_byte and fitted.bits_per_byte:
            bits = (full.bits_per_byte, fitted.bits_per_byte)
            rows.append(["bits per byte", f"{bits[0]:.4f}", f"{bits[1]:.4f}", _rise(*bits)])
        rows.append(["KL", "0", f"{fitted.kl:.4g}", ""])
        rows.append(["top-1 agreement", "100%", _percent(fitted.top1_agreement), ""])
        if fitted.kl_answer is not None and fitted.top1_answer is not None:
            rows.append(["KL of the answers", "0", f"{fitted.kl_answer:.4g}", ""])
            rows.append(["top-1 agreement of the answers", "100%", _percent(fitted.top1_answer), ""])
        if full.accuracy is not None and fitted.accuracy is not None:
            kept = fitted.retained(full)
            what = f"{_percent(kept)} of what is above chance" if kept is not None else "the full model only guesses"
            rows.append(["accuracy", _percent(full.accuracy), _percent(fitted.accuracy), what])
            rows.append(["accuracy of guessing", _percent(full.chance or 0.0), "", ""])
        counted = f"{fitted.n} {'questions' if full.accuracy is not None else 'passages'}, {fitted.tokens} tokens"
        yield Table([f"{name} ({counted})", "full", "fitted", "change"], rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _rise(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f}%"


def ranges(ids: Sequence[int]) -> str:
    """Ascending ids as text: `0-3, 7`."""
    parts: list[list[int]] = []
    for one in ids:
        if parts and one == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], one]
        else:
            parts.append([one])
    return ", ".join("-".join(map(str, part)) for part in parts) or "none"


def importance_cdf(scores: Sequence[float]) -> Points:
    """Points of the staircase: the share of a layer's experts whose importance is at most x (LiteMoE Fig. 11).

    Importance as a share of the layer's sum; as it is where a score is negative or all are 0.
    """
    total = sum(scores)
    plain = min(scores) < 0 or total <= 0
    ordered = sorted(scores if plain else [score / total for score in scores])
    return [(min(0.0, ordered[0]), 0.0)] + [(x, number / len(ordered)) for number, x in enumerate(ordered, start=1)]


def _plots(report: Report) -> Iterator[str]:
    layers = report.layers
    if not layers:
        return
    drawn = sorted({round(at * (len(layers) - 1) / max(1, CURVES - 1)) for at in range(CURVES)})
    curves = {f"layer {number}": importance_cdf(layers[number].scores) for number in drawn}
    y = Axis("share of the experts", least=0, most=1)
    yield lines(curves, "Importance of experts, cumulative", Axis("share of the layer's importance"), y, steps=True)
    rows, kept = [layer.scores for layer in layers], [layer.kept for layer in layers]
    yield heat(rows, "Importance by layer; kept experts are framed", "expert", "layer", kept)
    regions = {name: [float(getattr(layer, name)) for layer in layers] for name in ("hot", "moderate", "cold")}
    groups = [str(number) for number in range(len(layers))]
    yield bars(groups, regions, "Hot, moderate and cold experts of each layer", Axis("experts"), stacked=True)
    asked = [name for name, quality in report.after.items() if quality.accuracy is not None]
    if asked:
        found = {
            name: [models[task].accuracy or 0.0 for task in asked]
            for name, models in (("full", report.before), ("fitted", report.after))
        }
        yield bars(asked, found, "Accuracy", Axis("share right", most=1))


def _short(model: str) -> str:
    """A name for a model: of a hub's cache folder the hub's id, of another folder its last part."""
    cached = _FOLDER_OF_HUB.search(model)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        return model
    return Path(model).resolve().name or model


def model_card(report: Report, source_card: str | None, loader: str = "AutoModelForCausalLM") -> str:
    """README.md of the exported folder: front matter for the hub, what was done, what it costs.

    `loader`: the class of transformers that loads it; "moedge" where only moedge does, as what is packed.

    The licence is what the source's card states, else "unknown". Local paths and the command stay out of it.
    """
    import yaml  # type: ignore[import-untyped]

    source = _front_matter(source_card)
    data: dict[str, Any] = {name: source[name] for name in CARRIED if source.get(name)}
    data.setdefault("license", "unknown")
    tags = [str(tag) for tag in source.get("tags") or []]
    data["tags"] = list(dict.fromkeys([*tags, "moe", "pruned", "moedge"]))
    data |= {"base_model": _short(report.model), "library_name": "moedge" if loader == "moedge" else "transformers"}
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{page.markdown(report.title, _card_blocks(report, data, loader))}"


def _card_blocks(report: Report, data: Mapping[str, Any], loader: str) -> Iterator[Block]:
    name = _short(report.model)
    yield Paragraph(
        f"{name} with the experts that {report.task} needs, and without the others: made by moedge fit. It is for that "
        "task; on anything else it is worse than its source, by how much was measured only where a table below says so."
    )
    yield Paragraph(_summary(report))
    settings = {"source": name, "method": report.method, "budget": report.budget}
    yield Table(["setting", "value"], list(settings.items()))
    yield Bullets([f"Warning: {warning}" for warning in report.warnings])
    yield Heading("Use")
    if loader == "moedge":
        yield Code('import moedge\n\nlm = moedge.load("this folder", memory="2GiB")')
    else:
        yield Code(
            f"from transformers import {loader}, AutoTokenizer\n"
            f'model = {loader}.from_pretrained("this folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("this folder")'
        )
    yield Heading("What was measured")
    yield Paragraph("On samples that the fit did not see. KL in nats a token, from the source model.")
    yield from quality_tables(report.before, report.after)
    yield Heading("Licence")
    if data["license"] == "unknown":
        yield Paragraph(f"Not known: the folder of {name} had no card that states one. Ask its authors before use.")
    else:
        stated = ": ".join(str(data[key]) for key in ("license", "license_name", "license_link") if key in data)
        yield Paragraph(f"That of {name}, as its card states it: {stated}.")


def _front_matter(card: str | None) -> dict[str, Any]:
    """What stands between the first two lines of dashes; nothing where that is missing or not a mapping."""
    import yaml

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card or "", re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except yaml.YAMLError:  # a card is for people first: a damaged one states no licence, and the new card says so
        return {}
    return found if isinstance(found, dict) else {}
