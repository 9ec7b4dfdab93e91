"""`moedge serve`: one model over HTTP until it is told to stop. Knows the options; what they do is elsewhere."""

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moedge.errors import DataError
from moedge.runtime.opening import NAMES, load_options
from moedge.terminal import SIZE, console, json_option, print_json
from moedge.units import format_size

if TYPE_CHECKING:
    from moedge.serve.service import Service

EXAMPLES = """\b
Examples:
  moedge serve checkpoints/mini --memory 600MiB
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"model": "mini", "prompt": "The sea was", "max_tokens": 32}'
  python -m moedge.api.keys laptop >> keys.txt       # shows the key once, keeps its hash
  moedge serve ./OLMoE-1B-7B --memory 4GiB --host 0.0.0.0 --api-keys keys.txt --parallel 2
"""


@click.command(epilog=EXAMPLES, context_settings={"default_map": {"parallel": 4}})
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free one.")
@click.option("--name", help="What clients call the model. By default the last part of its path.")
@click.option("--queue", type=click.IntRange(0), default=16, show_default=True, help="Requests that may wait.")
@click.option(
    "--api-keys", type=click.Path(path_type=Path, dir_okay=False), help="Ask for a key of this file; see below."
)
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Allow web pages of this origin, or * for any.")
@click.option("--max-body", type=SIZE, default="1MiB", show_default=True, help="Largest request.")
@click.option("--timeout", type=click.FloatRange(1), default=600.0, show_default=True, help="Seconds for one request.")
@click.option("--grace", type=click.FloatRange(0), default=10.0, show_default=True, help="Seconds to finish in.")
@load_options
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Serve a model over HTTP, as OpenAI's API and with a page to chat in.

    One model and one cache of experts for all requests: their steps take turns and are never batched, so every answer
    is the one it would be alone. --parallel reserves that many contexts within --memory; further requests wait in the
    queue, and are refused with 429 when it is full. Ctrl-C or SIGTERM ends the server: answers may finish for --grace
    seconds. With --json one line with the address is printed when the model is ready.
    """
    _require()
    from moedge.api.keys import read_keys
    from moedge.api.limits import BodyLimits
    from moedge.serve.app import Access, make_app
    from moedge.serve.listen import Server, Stages, bind, is_local, own_names, url_of
    from moedge.serve.service import Service

    keys = {} if options["api_keys"] is None else read_keys(options["api_keys"])
    bodies = BodyLimits(one=options["max_body"], together=16 * options["max_body"])
    loading = {name: options[name] for name in NAMES}
    service = Service(
        name=options["name"] or _name(model),
        load=lambda: _load(model, loading),
        parallel=options["parallel"],
        queue=options["queue"],
        seconds=options["timeout"],
    )
    with bind(options["host"], options["port"]) as listener:
        if not keys and not is_local(listener):
            console.print(
                "[yellow]Anybody who reaches this machine can use the model: --api-keys asks for keys.[/yellow]"
            )
        url = url_of(listener)
        access = Access(keys, options["cors"], () if keys else own_names(listener), bodies)
        if not as_json:
            console.print(f"loading {model}, listening on {url}")
        stages = Stages(
            begin=lambda: service.start(lambda ready: _announce(ready, url, as_json), stop),
            drain=service.engine.drain,
            end=service.engine.end,
            grace=options["grace"],
        )
        server = Server(make_app(service, access), stages)

        def stop() -> None:
            server.should_exit = True

        logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn catches it first, and raises it again at its end
        try:
            server.run(sockets=[listener])
        finally:
            service.engine.end()
            service.join()
    if service.failure is not None:
        raise service.failure


def _require() -> None:
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"moedge serve needs {error.name}, which is not installed: pip install 'moedge[serve]'"
        ) from error


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _load(model: str, options: dict[str, Any]) -> Any:
    from moedge.runtime.lm import load

    return load(model, **options)


def _announce(service: "Service", url: str, as_json: bool) -> None:
    """On the model's thread, when it is ready."""
    plan = service.lm.plan
    if as_json:
        print_json({"url": url, "model": service.name, "plan": plan.as_dict()})
        return
    limit = "no memory limit" if plan.limit is None else f"at most {format_size(plan.limit)}"
    share = f"{100 * plan.resident_share:.0f}% of the experts fit in memory"
    context = "the model's context" if plan.context is None else f"{plan.context} tokens"
    ready = f"{service.name} is ready: {limit}, {share}, {plan.parallel} answers at once of {context} each"
    console.print(ready, soft_wrap=True)  # one line in a log too
    console.print(f"page {url}/, API {url}/v1, Ctrl-C ends", highlight=False, soft_wrap=True)
