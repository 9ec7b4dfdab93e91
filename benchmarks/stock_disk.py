"""Generate greedily with stock transformers and accelerate's disk offload; prints one JSON line. Used by offload.py.

    python benchmarks/stock_disk.py FOLDER --offload-folder F [--resident-layers 0] [--tokens 64] [--prompt TEXT]

Experts of all but the first `resident-layers` layers are on "disk"; everything else is on the CPU. Loading
is timed from before the first import, generation from its call.
"""

import time

STARTED = time.perf_counter()

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402


def device_map(layers: int, resident: int) -> dict[str, str]:
    """Module path -> "cpu" or "disk", as `from_pretrained(device_map=...)` takes it."""
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"{prefix}.{name}"] = "cpu"
        places[f"{prefix}.mlp.experts"] = "cpu" if layer < resident else "disk"
    return places


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--offload-folder", required=True, type=click.Path(path_type=Path))
@click.option("--resident-layers", default=0)
@click.option("--tokens", default=64)
@click.option("--prompt", default="The sea was calm and the")
@click.option("--experts", help="experts_implementation; by default transformers' own default.")
@click.option("--memory-only", is_flag=True, help="No offload: the reference for the tokens.")
def main(
    folder: Path,
    offload_folder: Path,
    resident_layers: int,
    tokens: int,
    prompt: str,
    experts: str | None,
    memory_only: bool,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        """When each token appeared; the first call is the prompt."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def put(self, value: object) -> None:
            self.seconds.append(time.perf_counter() - STARTED)

        def end(self) -> None: ...

    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    places = {"": "cpu"} if memory_only else device_map(layers, resident_layers)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="bfloat16",
        **({"experts_implementation": experts} if experts else {}),
        device_map=places,
        offload_folder=str(offload_folder),
    )
    loaded = time.perf_counter() - STARTED
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    clock = Clock()
    began = time.perf_counter() - STARTED
    out = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=clock)
    stamps = clock.seconds[1:]
    result = {
        "load_seconds": round(loaded, 2),
        "first_token_seconds": stamps[0] - began,
        "tokens_per_second": len(stamps) / (stamps[-1] - began),  # reading the prompt included, as in moedge run
        "token_ids": out[0, ids.shape[1] :].tolist(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
