"""`jaxlora bench ...`: measures this device, and any server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxlora.config.base import DEMO_MODEL, Dtype, ModelSection
from jaxlora.core.errors import ConfigInvalid
from serve.cli.options import Json, Key, connect

Model = Annotated[str, typer.Option(help='"smollm2", a directory, a .gguf file or a hub id.')]
Weights = Annotated[Dtype, typer.Option(help="Of the base; auto: bfloat16 where it is clearly faster.")]
Rounds = Annotated[int, typer.Option(help="The least of so many timings counts.", min=1)]
Rank = Annotated[int, typer.Option(help="Rank of every adapter.", min=1)]
Whole = Annotated[bool, typer.Option("--json", help="One JSON object.")]
if TYPE_CHECKING:
    from serve.cli.http_client import ApiClient

ServerUrl = Annotated[str, typer.Argument(metavar="URL", show_default=False)]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", help="Whom to ask; may be repeated (default: all adapters, else the base).", show_default=False
    ),
]
Popularity = Annotated[str, typer.Option(help="uniform, zipf:S or trace:FILE, a model a line.")]
Requests = Annotated[int, typer.Option(help="Requests that are measured.", min=1)]
WarmUp = Annotated[int, typer.Option(help="Requests before them that are not.", min=0)]
PromptTokens = Annotated[int, typer.Option(help="About so many, of random words.", min=1)]
MaxTokens = Annotated[int, typer.Option(help="Of an answer.", min=1)]
TimeoutS = Annotated[float, typer.Option(help="Longest wait for a whole answer.", min=0.001)]
Seed = Annotated[int, typer.Option(help="Of prompts, popularity and arrivals.", min=0)]

bench = typer.Typer(help="Measure this device, or a server.", no_args_is_help=True)


@bench.command(epilog="Example:  jaxlora bench kernels --op gathered_lora --model smollm2-135m --json")
def kernels(
    op: Annotated[
        list[str] | None, typer.Option(help="An op; may be repeated (default: all).", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="smollm2-135m, llama-3.2-1b, qwen3-4b or llama-3.1-8b, one layer; may be repeated (default: all).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    rows: Annotated[int, typer.Option(help="Sequences of a decode step.", min=1)] = 32,
    adapters: Annotated[int, typer.Option(help="Distinct adapters among them.", min=1)] = 16,
    slots: Annotated[int, typer.Option(help="Slots of the pool.", min=1)] = 64,
    rank: Rank = 16,
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
    rank: Rank = 16,
    rounds: Rounds = 5,
    as_json: Whole = False,
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
    rank: Rank = 16,
    context: Annotated[int, typer.Option(help="Tokens of a decoding sequence.", min=1)] = 512,
    lanes: Annotated[int, typer.Option(help="Lanes of prefill and training, each of its own adapter.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of such a lane.", min=1)] = 128,
    rounds: Rounds = 5,
    as_json: Whole = False,
) -> None:
    """Measure what this device can do, and how near the steps of serving and training come to it."""
    from serve.bench.roofline import RooflineSizes, report

    sizes = RooflineSizes(
        rows=tuple(rows or (1, 8, 32)), adapters=adapters, rank=rank, context=context, lanes=lanes, tokens=tokens
    )
    found = report(ModelSection(path=model, dtype=dtype), sizes, rounds)
    for line in [json.dumps(asdict(found))] if as_json else found.lines():
        typer.echo(line)


@bench.command("device", epilog="Example:  jaxlora bench device --output h100.json")
def bench_device(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="1b, 4b or 8b, a random base; may be repeated (default: 8b, 4b, 1b).", show_default=False),
    ] = None,
    minutes: Annotated[float, typer.Option(help="No part is begun after so long.", min=0.1)] = 9.0,
    short: Annotated[bool, typer.Option("--short", help="A tiny base and few sizes, also for a CPU.")] = False,
    tests: Annotated[
        bool, typer.Option(help="In a checkout, run the kernels' own tests on this device too; not if short.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Write the report there, as JSON.", show_default=False)] = None,
) -> None:
    """Measure an accelerator: kernels against their definitions, ops and whole steps beside its limits, streams.

    Exit code 1 when a kernel computes something else, one of its tests fails, or something compiled after a warm-up.
    """
    from jaxlora.core.atomic_files import replace_file
    from serve.bench.device import FULL, SHORT, measure_device

    if output is not None and not output.parent.is_dir():
        raise ConfigInvalid(f"--output: {output.parent} is no folder")
    if short and shape:
        raise ConfigInvalid("give --short or --shape, not both")
    sizes = SHORT if short else replace(FULL, shapes=tuple(shape or FULL.shapes))
    folder = Path("tests/device")
    found = measure_device(
        sizes, minutes=minutes, tests=folder if tests and not short and folder.is_dir() else None, say=typer.echo
    )
    if output is not None:
        replace_file(output, json.dumps(asdict(found), indent=1).encode())
    if not found.passed:
        raise typer.Exit(1)


@bench.command("serve", epilog="Example:  jaxlora bench serve http://127.0.0.1:8000 --clients 32 --popularity zipf:1")
def bench_server(
    url: ServerUrl,
    model: Models = None,
    popularity: Popularity = "uniform",
    clients: Annotated[
        int | None, typer.Option(help="Closed loop: so many wait for their answers (8).", min=1, show_default=False)
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: so many requests a second.", min=0.001, show_default=False)
    ] = None,
    requests: Requests = 64,
    warm_up: WarmUp = 8,
    prompt_tokens: PromptTokens = 64,
    max_tokens: MaxTokens = 64,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Answers may end before that; needed where ignore_eos is refused.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Ask chat/completions, not completions.")] = False,
    timeout_s: TimeoutS = 600.0,
    seed: Seed = 0,
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


@contextlib.contextmanager
def quantum_kept(api: ApiClient) -> Generator[Callable[[float], None]]:
    """Yields what sets the quantum, in ms; at the end, however it comes, the server has the one that it had."""

    def tune(quantum_ms: float) -> None:
        api.entry("POST", "tuning", {"quantum_ms": quantum_ms})

    before = api.entry("GET", "tuning")["quantum_ms"]
    try:
        yield tune
    finally:
        tune(before)


@bench.command(epilog="Example:  jaxlora bench quantum http://127.0.0.1:8000 --quantum-ms 50 --quantum-ms 400 --json")
def quantum(
    url: ServerUrl,
    quantum_ms: Annotated[
        list[float] | None,
        typer.Option(help="Milliseconds; may be repeated (default: 25 to 1600, doubled).", show_default=False),
    ] = None,
    model: Models = None,
    popularity: Popularity = "uniform",
    clients: Annotated[int, typer.Option(help="So many wait for their answers.", min=1)] = 16,
    requests: Requests = 64,
    warm_up: WarmUp = 16,
    prompt_tokens: PromptTokens = 32,
    max_tokens: MaxTokens = 32,
    timeout_s: TimeoutS = 600.0,
    seed: Seed = 0,
    picture: Annotated[
        Path | None, typer.Option(help="An SVG of tokens a second against waiting.", show_default=False)
    ] = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Load a jaxlora server with more adapters than slots at one quantum after another, and put its own back.

    Needs an admin's key where there are keys.  Exit code 1 when a request failed.
    """
    from jaxlora.core.atomic_files import replace_file
    from serve.bench import quantum as curve
    from serve.bench.client import Server
    from serve.bench.load import bodies, closed_loop
    from serve.bench.popularity import draw
    from serve.bench.report import LoadReport
    from serve.cli.top import read

    if bad := [ms for ms in quantum_ms or () if not 0 < ms < float("inf")]:
        raise ConfigInvalid(f"--quantum-ms must be positive and finite, got {bad[0]:g}")
    if picture is not None and not picture.parent.is_dir():
        raise ConfigInvalid(f"--picture: {picture.parent} is no folder")
    server, points = Server.at(url, key), []
    with connect(url, key) as api:
        slots = api.entry("GET", "tuning")["active_slots"] or len(read(api)["slots"])
        asked = list(dict.fromkeys(model or [m.id for m in api.models() if m.parent is not None]))
        if len(asked) <= slots:
            raise ConfigInvalid(
                f"a quantum matters where adapters wait for slots; {url} has {slots} for the {len(asked)} asked"
            )
        if not as_json:
            typer.echo(curve.HEAD)
        with quantum_kept(api) as tune:
            for number, ms in enumerate(quantum_ms or curve.SERIES_MS):
                tune(ms)
                load = bodies(
                    draw(popularity, asked, seed),
                    warm_up + requests,
                    chat=False,
                    prompt_tokens=prompt_tokens,
                    max_tokens=max_tokens,
                    early_stop=False,
                    seed=seed + number,  # new prompts, as the server keeps the pages of old ones
                )
                asyncio.run(closed_loop(server, "completions", load[:warm_up], clients, timeout_s))
                before = read(api)["swaps"]
                report = LoadReport.of(
                    asyncio.run(closed_loop(server, "completions", load[warm_up:], clients, timeout_s))
                )
                swaps_s = (read(api)["swaps"] - before) / report.wall_s
                points.append(curve.Point(quantum_ms=ms, swaps_s=swaps_s, load=report))
                typer.echo(json.dumps(asdict(points[-1])) if as_json else points[-1].line())
    if picture is not None:
        replace_file(picture, curve.picture(points).encode())
    if any(point.load.failed for point in points):
        raise typer.Exit(1)
