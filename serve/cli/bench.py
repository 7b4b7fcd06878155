"""`jaxlora bench ...`: measures this device, and any server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from jaxlora.config.base import DEMO_MODEL, Dtype, ModelSection
from jaxlora.core.errors import ConfigInvalid
from serve.cli.options import Json, Key, connect

Model = Annotated[str, typer.Option(help='"smollm2", a directory, a .gguf file or a hub id.')]
Weights = Annotated[Dtype, typer.Option(help="Of the base; auto: bfloat16 where it is clearly faster.")]
Rounds = Annotated[int, typer.Option(help="The least of so many timings counts.", min=1)]

bench = typer.Typer(help="Measure this device, or a server.", no_args_is_help=True)


@bench.command(epilog="Example:  jaxlora bench kernels --op gathered_lora --model smollm2-135m --json")
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; may be repeated (default: all).", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="smollm2-135m, qwen3-4b or llama-3.1-8b, one layer; may be repeated (default: all).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rows: Annotated[int, typer.Option(help="Sequences of a decode step.", min=1)] = 32,
    adapters: Annotated[int, typer.Option(help="Distinct adapters among them.", min=1)] = 16,
    slots: Annotated[int, typer.Option(help="Slots of the pool.", min=1)] = 64,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.", min=1)] = 16,
    lanes: Annotated[int, typer.Option(help="Lanes of training and prefill.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a lane.", min=1)] = 128,
    context: Annotated[int, typer.Option(help="Tokens in the KV pages of a sequence.", min=1)] = 512,
    rounds: Rounds = 7,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Time every op beside what this device can do, the base product and other forms of the op."""
    if dtype not in ("bfloat16", "float32"):
        raise ConfigInvalid(f"--dtype must be bfloat16 or float32, got {dtype}")
    from pallas_kernels.bench.cases import Sizes
    from pallas_kernels.bench.run import main

    try:
        sizes = Sizes(rows=rows, adapters=adapters, slots=slots, rank=rank, lanes=lanes, tokens=tokens, context=context)
        main(
            ops=op or [],
            models=model or [],
            dtype=dtype,
            sizes=sizes,
            rounds=rounds,
            as_json=as_json,
            say=typer.echo,
        )
    except ValueError as e:
        raise ConfigInvalid(f"bench kernels: {e}") from e


@bench.command("train", epilog="Example:  jaxlora bench train --tenants 16 --tokens 64 --dtype bfloat16")
def bench_train(
    model: Model = DEMO_MODEL,
    dtype: Weights = "auto",
    tenants: Annotated[int, typer.Option(help="Tenants in one step.", min=1)] = 16,
    lanes: Annotated[int, typer.Option(help="Lanes of each tenant in a step.", min=1)] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens of a lane.", min=1)] = 128,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.", min=1)] = 16,
    rounds: Rounds = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Time a training step: tenants together, one of them alone, and the base's forward and backward pass below both.

    Exit code 1 when something compiled after the warm-up.
    """
    from train.bench import TrainingSizes, report

    sizes = TrainingSizes(tenants=tenants, lanes=lanes, tokens=tokens, rank=rank)
    found = report(ModelSection(path=model, dtype=dtype), sizes, rounds)
    for line in [json.dumps(asdict(found))] if as_json else found.lines():
        typer.echo(line)
    if found.compiles:
        raise typer.Exit(1)


@bench.command(epilog="Example:  jaxlora bench roofline --model smollm2 --dtype bfloat16 --json")
def roofline(
    model: Model = DEMO_MODEL,
    dtype: Weights = "auto",
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Of a decode step; may be repeated (1, 8 and 32).", min=1, show_default=False),
    ] = None,
    adapters: Annotated[int, typer.Option(help="Distinct adapters in a decode step of the most rows.", min=1)] = 16,
    rank: Annotated[int, typer.Option(help="Rank of every adapter.", min=1)] = 16,
    context: Annotated[int, typer.Option(help="Tokens of a decoding sequence.", min=1)] = 512,
    lanes: Annotated[int, typer.Option(help="Lanes of prefill and training, each of its own adapter.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of such a lane.", min=1)] = 128,
    rounds: Rounds = 5,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure what this device can do, and how near the steps of serving and training come to it."""
    from serve.bench.roofline import RooflineSizes, report

    sizes = RooflineSizes(
        rows=tuple(rows or (1, 8, 32)), adapters=adapters, rank=rank, context=context, lanes=lanes, tokens=tokens
    )
    found = report(ModelSection(path=model, dtype=dtype), sizes, rounds)
    for line in [json.dumps(asdict(found))] if as_json else found.lines():
        typer.echo(line)


@bench.command("serve", epilog="Example:  jaxlora bench serve http://127.0.0.1:8000 --clients 32 --popularity zipf:1")
def bench_server(
    url: Annotated[str, typer.Argument(metavar="URL", show_default=False)],
    model: Annotated[
        list[str] | None,
        typer.Option(help="Whom to ask; may be repeated (default: all adapters, else the base).", show_default=False),
    ] = None,
    popularity: Annotated[str, typer.Option(help="uniform, zipf:S or trace:FILE, a model a line.")] = "uniform",
    clients: Annotated[
        int | None, typer.Option(help="Closed loop: so many wait for their answers (8).", min=1, show_default=False)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests a second.", min=0.001, show_default=False)
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests that are measured.", min=1)] = 64,
    warm_up: Annotated[int, typer.Option(help="Requests before them that are not.", min=0)] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="About so many, of random words.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 64,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Answers may end before that; needed where ignore_eos is refused.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask chat/completions, not completions.")] = False,
    timeout_s: Annotated[float, typer.Option(help="Longest wait for a whole answer.", min=0.001)] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts, popularity and arrivals.", min=0)] = 0,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Load an OpenAI-compatible server with greedy streams; say tokens a second and how long people wait.

    Exit code 1 when a request failed.
    """
    if clients is not None and rate is not None:
        raise ConfigInvalid("give --clients for a closed loop or --rate for an open one, not both")
    from serve.bench.client import Server
    from serve.bench.load import bodies, closed_loop, open_loop
    from serve.bench.popularity import draw
    from serve.bench.report import LoadReport

    server, path = Server.at(url, key), "chat/completions" if chat else "completions"
    if not model:
        with connect(url, key) as api:
            listed = api.models()
        model = [m.id for m in listed if m.parent is not None] or [m.id for m in listed[:1]]
    if not model:
        raise ConfigInvalid(f"{url} lists no model; name one with --model")
    asked = bodies(
        draw(popularity, model, seed),
        warm_up + requests,
        chat=chat,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        early_stop=early_stop,
        seed=seed,
    )
    at_once = clients or 8
    asyncio.run(closed_loop(server, path, asked[:warm_up], at_once, timeout_s))
    measured = asked[warm_up:]
    if rate is None:
        answers = asyncio.run(closed_loop(server, path, measured, at_once, timeout_s))
    else:
        answers = asyncio.run(open_loop(server, path, measured, rate, timeout_s, seed))
    report = LoadReport.of(answers)
    for line in [json.dumps(asdict(report))] if as_json else report.lines():
        typer.echo(line)
    if report.failed:
        raise typer.Exit(1)
