"""`sparse-vlm serve MODEL`: an OpenAI-compatible server for a VLM, with a page to chat at `/`."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from sparse_vlm.errors import UserError, printable
from sparse_vlm.hub.store import locate

NEEDED = ("starlette", "uvicorn", "prometheus_client")


def serve(
    model: Annotated[str, typer.Argument(help="A VLM: a folder or a name of the model zoo.")] = "tiny-chat",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="SPARSE_VLM_API_KEY", help="Key that requests must carry.", show_default=False)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens an image, for a model that serves several budgets.", min=1)] = None,
    max_body: Annotated[int, typer.Option(help="The largest request, in MB.", min=1)] = 20,
    max_images: Annotated[int, typer.Option(help="Images of a request.", min=0)] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that wait while one is answered.", min=0)] = 16,
    allow_domain: Annotated[
        list[str] | None, typer.Option(help="A host that images are fetched from by URL; repeat it for several. None by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores unless given.", min=1)] = None,
) -> None:
    """Serve a vision-language model over HTTP."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UserError(f"sparse-vlm serve needs {', '.join(missing)}; pip install 'sparse-vlm[serve]'")
    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise UserError("--api-key (SPARSE_VLM_API_KEY) is empty or not of printable ASCII characters")
    for domain in allow_domain or ():
        if not domain or any(character in domain for character in "/:*@ "):
            raise UserError(f"--allow-domain {domain!r}: expected the name of one host, as images.example.org")
    locate(model, kind="vlm")

    warnings.simplefilter("ignore")
    from sparse_vlm.serve.server import bind, is_loopback, url_of

    sock = bind(host, port)  # before the model is loaded

    import torch
    from transformers.utils import logging

    from sparse_vlm.serve.engine import Engine, Limits
    from sparse_vlm.serve.server import serve as run
    from sparse_vlm.vlm import VLM

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    domains = frozenset(domain.lower() for domain in allow_domain or ())
    limits = Limits(max_body << 20, max_images, max_queue, domains)
    name = Path(model).name or model  # not where it lies on this machine
    engine = Engine(VLM.from_pretrained(model, num_tokens=tokens), name, limits)

    def say() -> None:
        print(printable(f"{name} at {url_of(sock)} (page), {url_of(sock)}/v1 (OpenAI API); Ctrl-C ends"), flush=True)
        if api_key is None and not is_loopback(sock):
            typer.echo("anybody who reaches this address can use it; --api-key asks for a key", err=True)

    run(engine, sock, api_key, say)
