"""The load generator: laws of popularity, percentiles and sums by hand, and what it makes of answers that go wrong."""

import asyncio
import contextlib
import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from collections import Counter

import pytest

from jaxlora.core.errors import ConfigInvalid
from serve.bench.client import Answer, Server, ask
from serve.bench.load import bodies, closed_loop, open_loop
from serve.bench.popularity import draw
from serve.bench.quantum import HEAD, Point, picture
from serve.bench.report import LoadReport, percentile

NAMES = [f"a{n}" for n in range(4)]


def drawn(popularity, count=20_000, seed=0):
    return Counter(itertools.islice(draw(popularity, NAMES, seed), count))


class TestPopularity:
    # 20,000 draws: a share of 1/4 has a standard deviation of 0.003.

    def test_uniform(self):
        found = drawn("uniform")
        assert [found[name] / 20_000 for name in NAMES] == pytest.approx([0.25] * 4, abs=0.015)

    def test_zipf_falls_with_the_place(self):
        found = drawn("zipf:2")
        whole = 1 + 1 / 4 + 1 / 9 + 1 / 16
        wanted = [1 / whole, 1 / 4 / whole, 1 / 9 / whole, 1 / 16 / whole]
        assert [found[name] / 20_000 for name in NAMES] == pytest.approx(wanted, abs=0.015)

    def test_a_seed_decides(self):
        first, again, other = (list(itertools.islice(draw("zipf:1", NAMES, seed), 50)) for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_a_trace_is_kept_to_and_begins_anew(self, tmp_path):
        (tmp_path / "trace").write_text("a2\na0\na2\n")
        assert list(itertools.islice(draw(f"trace:{tmp_path / 'trace'}", NAMES, 0), 5)) == [
            "a2",
            "a0",
            "a2",
            "a2",
            "a0",
        ]

    @pytest.mark.parametrize(
        "popularity", ["", "zipf", "zipf:0", "zipf:nan", "zipf:x", "uniform:1", "trace:", "trace:/no"]
    )
    def test_another_law_is_refused(self, popularity):
        with pytest.raises(ConfigInvalid):
            draw(popularity, NAMES, 0)

    @pytest.mark.parametrize(("text", "told"), [("a0\nb\n", "'b'"), ("\n", "empty")])
    def test_a_trace_that_does_not_fit_is_refused(self, text, told, tmp_path):
        (tmp_path / "trace").write_text(text)
        with pytest.raises(ConfigInvalid, match=told):
            draw(f"trace:{tmp_path / 'trace'}", NAMES, 0)


@pytest.mark.parametrize(("p", "wanted"), [(0, 1), (50, 3), (99, 9.76), (100, 10)])
def test_percentiles(p, wanted):
    assert percentile([10, 1, 2, 3, 4], p) == pytest.approx(wanted)


def test_percentile_of_one_value():
    assert percentile([7.0], 99) == 7.0


def answer(model, began_s, pieces_s, ended_s, **other):
    return Answer(
        **{"model": model, "began_s": began_s, "pieces_s": pieces_s, "ended_s": ended_s, "prompt_tokens": 5}
        | {"tokens": 4, "text": "", "error": None}
        | other
    )


def test_a_report_sums_up_what_was_whole():
    report = LoadReport.of(
        [
            answer("a", 10.0, (10.5, 10.6, 10.9), 11.0),
            answer("b", 10.0, (11.5, 11.7), 12.0),
            answer("c", 13.0, (13.1,), 14.0, error="HTTP 503: full", tokens=1),
        ]
    )
    assert (report.requests, report.failed, report.models, report.errors) == (3, 1, 2, {"HTTP 503: full": 1})
    assert (report.wall_s, report.prompt_tokens, report.tokens, report.tokens_s) == (4.0, 10, 8, 2.0)
    assert report.first_token.p50_s == pytest.approx(1.0)  # of 0.5 and 1.5
    assert report.between_tokens.p50_s == pytest.approx(0.2)  # of 0.1, 0.3 and 0.2
    assert report.whole_answer.p99_s == pytest.approx(1.99)  # of 1 and 2
    assert "failed 1 times: HTTP 503: full" in report.lines()


def test_a_report_of_failures_has_no_times():
    report = LoadReport.of([answer("a", 0.0, (), 1.0, error="refused", prompt_tokens=None, tokens=0)])
    assert (report.first_token, report.between_tokens, report.whole_answer, report.prompt_tokens) == (None,) * 4


def test_prompts_differ_and_a_seed_decides():
    def made(seed):
        how = {"chat": False, "prompt_tokens": 6, "max_tokens": 3, "early_stop": False, "seed": seed}
        return bodies(itertools.cycle(["a", "b"]), 3, **how)

    assert made(0) == made(0) != made(1)
    assert [body["model"] for body in made(0)] == ["a", "b", "a"]
    assert len({body["prompt"] for body in made(0)}) == 3
    assert all(len(body["prompt"].split()) == 6 and body["ignore_eos"] for body in made(0))


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:x"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ConfigInvalid):
        Server.at(url)


def test_urls():
    assert Server.at("http://h:1/v1/") == Server.at("http://h:1") == Server("h", 1, False, "/v1", None)
    assert Server.at("https://h/proxy", "k") == Server("h", 443, True, "/proxy/v1", "k")


# ---- answers over a socket


@contextlib.asynccontextmanager
async def scripted(*parts: bytes, pause_s: float = 0.0):
    """A server that sends these bytes, part by part, to whoever asks."""

    async def told(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        writer.close()

    server = await asyncio.start_server(told, "127.0.0.1", 0)
    async with server:
        yield Server.at(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def asked(*parts: bytes, timeout_s: float = 5.0, pause_s: float = 0.0) -> Answer:
    async def run():
        async with scripted(*parts, pause_s=pause_s) as server:
            return await ask(server, "completions", {"model": "m", "prompt": "hi"}, timeout_s)

    return asyncio.run(run())


PLAIN, CHUNKED = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = b'data: {"choices": [{"text": "x"}]}\n\n'
LAST = b'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def test_an_event_cut_by_chunks_is_read_whole():
    found = asked(
        CHUNKED, chunk(PIECE[:9]), chunk(PIECE[9:] + b": ping\n\n"), chunk(LAST + b"data: [DONE]\n\n"), b"0\r\n\r\n"
    )
    assert (found.error, found.tokens, len(found.pieces_s), found.prompt_tokens) == (None, 1, 1, None)
    assert found.text == "x"


def test_usage_counts_before_pieces():
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}}\n\n'
    found = asked(PLAIN, PIECE, LAST, usage)
    assert (found.error, found.tokens, found.prompt_tokens) == (None, 9, 3)


def test_pieces_have_their_times():
    found = asked(PLAIN, PIECE, PIECE, LAST, pause_s=0.05)
    assert found.began_s < found.pieces_s[0]
    assert 0.04 < found.pieces_s[1] - found.pieces_s[0] < found.ended_s - found.began_s


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ((b"HTTP/1.1 503 Busy\r\n\r\n", b"full"), "HTTP 503: full"),
        ((PLAIN, PIECE), "the answer broke off"),
        ((PLAIN, PIECE, b'data: {"error": {"message": "lost"}}\n\n'), "lost"),
        ((PLAIN, b"data: {\n\n"), "Expecting"),
        ((CHUNKED, b"zz\r\n"), "invalid literal"),
        ((b"nothing",), "0 bytes read|7 bytes read"),
    ],
)
def test_what_goes_wrong_is_said(parts, told):
    found = asked(*parts)
    assert found.error is not None
    assert re.search(told, found.error)


def test_nobody_waits_longer_than_the_limit():
    assert asked(PLAIN, PIECE, pause_s=0.5, timeout_s=0.05).error == "no end after 0.05 s"


def test_no_server():
    found = asyncio.run(ask(Server.at("http://127.0.0.1:1"), "completions", {"model": "m"}, 5.0))
    assert found.error is not None


@pytest.mark.parametrize(("run", "at_once"), [("closed", 2), ("open", 6)])
def test_how_many_wait_at_once(run, at_once):
    """Two clients wait for two answers at most; at a high rate all six requests are under way together."""
    now, most = 0, 0

    async def told(reader, writer):
        nonlocal now, most
        await reader.readuntil(b"\r\n\r\n")
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0.05)
        now -= 1
        writer.write(PLAIN + PIECE + LAST)
        writer.close()

    async def load():
        async with await asyncio.start_server(told, "127.0.0.1", 0) as listening:
            server = Server.at(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            wanted = [{"model": "m"}] * 6
            if run == "closed":
                return await closed_loop(server, "completions", wanted, 2, 5.0)
            return await open_loop(server, "completions", wanted, 1e4, 5.0, 0)

    answers = asyncio.run(load())
    assert [a.error for a in answers] == [None] * 6
    assert most == at_once


def test_answers_come_in_the_order_of_the_requests():
    async def told(reader, writer):
        """The first who asks waits longest."""
        head = await reader.readuntil(b"\r\n\r\n")
        body = json.loads(await reader.readexactly(int(re.search(rb"Content-Length: (\d+)", head)[1])))
        await asyncio.sleep(0.1 - 0.02 * int(body["model"]))
        writer.write(PLAIN + PIECE + LAST)
        writer.close()

    async def load():
        async with await asyncio.start_server(told, "127.0.0.1", 0) as listening:
            server = Server.at(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}")
            return await closed_loop(server, "completions", [{"model": str(n)} for n in range(4)], 4, 5.0)

    answers = asyncio.run(load())
    assert [a.model for a in answers] == ["0", "1", "2", "3"]
    assert answers[0].ended_s > answers[3].ended_s


def test_an_open_loop_keeps_its_rate():
    async def load():
        async with scripted(PLAIN, PIECE, LAST) as server:
            return await open_loop(server, "completions", [{"model": "m"}] * 40, 200.0, 5.0, 3)

    answers = asyncio.run(load())
    took_s = max(a.began_s for a in answers) - min(a.began_s for a in answers)
    assert took_s > 0.5 * 40 / 200  # a late machine takes longer, none less: the sum of 39 exponential gaps


# ---- the curve of the quantum


def point(quantum_ms, speed, p50_s, p99_s):
    """Answers whose first tokens took p50_s, but for the last two, which took p99_s."""
    waits = [p50_s] * 98 + [p99_s] * 2
    answers = [answer("a", 0.0, (w, 100.0), 100.0, tokens=speed) for w in waits]
    return Point(quantum_ms=quantum_ms, swaps_s=0.5, load=LoadReport.of(answers))


def test_a_point_is_a_line_under_its_head():
    heads = HEAD.replace("quantum ms", "quantum").replace("first token ms: p50", "p50").split()
    values = point(200, 80, 0.5, 2.0).line().split()
    assert dict(zip(heads, values, strict=True)) == {
        "quantum": "200",
        "tokens/s": "80.0",
        "swaps/s": "0.50",
        "p50": "500.0",
        "p99": "2000.0",
        "failed": "0",
    }


def test_the_picture_has_each_point_where_its_axes_say():
    svg = ET.fromstring(picture([point(25, 50, 0.2, 0.5), point(400, 100, 1.0, 4.0)]))
    name = "{http://www.w3.org/2000/svg}"
    texts = {t.text: (float(t.get("x")), float(t.get("y"))) for t in svg.findall(f"{name}text")}
    for kind, waits in (("median", (0.2, 1.0)), ("tail", (0.5, 4.0))):
        (group,) = [g for g in svg.findall(f"{name}g") if g.get("class") == kind]
        dots = [(float(c.get("cx")), float(c.get("cy"))) for c in group.findall(f"{name}circle")]
        assert [t.text for t in group.findall(f"{name}text")] == ["25 ms", "400 ms"]
        for (x, _), wait in zip(dots, waits, strict=True):
            share = math.log(wait / 0.2) / math.log(5 / 0.2)  # between the ticks 0.2 and 5
            assert x == pytest.approx(texts["0.2"][0] + share * (texts["5"][0] - texts["0.2"][0]), abs=0.1)
        for (_, y), speed in zip(dots, (50, 100), strict=True):
            bottom, top = texts["0"][1], texts["100"][1]
            assert y == pytest.approx(bottom - 4 + speed / 100 * (top - bottom), abs=0.1)


def test_a_picture_of_failures_has_axes_alone():
    nothing = LoadReport.of([answer("a", 0.0, (), 1.0, error="refused", tokens=0)])
    svg = picture([Point(quantum_ms=25, swaps_s=0.0, load=nothing)])
    assert "circle cx" not in svg
    assert ET.fromstring(svg).tag.endswith("svg")
