"""Requests and tokens a minute, adapters and their bytes, by tenant; and what a client is told."""

import time

import openai
import pytest
from fake_backend import BASE, HI, FakeBackend, serving

from jaxlora.config.serving import LimitsSection, NamedLimits
from jaxlora.core.errors import QuotaExceeded, RateLimited, StorageFailed
from jaxlora.core.lora import AdapterRef
from serve.access.adapter_quota import AdapterQuota
from serve.access.caller import Caller
from serve.access.rate_limit import Limiter
from serve.server.app import create_app
from serve.server.gate import AppConfig

WHOLE_MINUTE = 1_700_000_040.0  # a multiple of 60


@pytest.fixture
def clock(monkeypatch):
    """A hand to turn: the seconds that have passed in a whole minute."""
    now = [WHOLE_MINUTE]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def turn(seconds):
        now[0] = WHOLE_MINUTE + seconds

    return turn


def wait_s(limiter, **cost):
    with pytest.raises(RateLimited) as caught:
        limiter.admit("acme", **cost)
    return caught.value.retry_after_s


class TestLimiter:
    def test_without_limits_everything_passes(self, clock):
        limiter = Limiter(LimitsSection())
        for _ in range(100):
            limiter.admit("acme", tokens=10**9)

    def test_tenants_are_counted_apart_and_by_their_own_numbers(self, clock):
        limiter = Limiter(
            LimitsSection(requests_per_minute=1, tenant=(NamedLimits(name="big", requests_per_minute=3),))
        )
        limiter.admit("acme", tokens=1)
        limiter.admit("other", tokens=1)
        wait_s(limiter, tokens=1)
        for _ in range(3):
            limiter.admit("big", tokens=1)
        with pytest.raises(RateLimited):
            limiter.admit("big", tokens=1)

    @pytest.mark.parametrize("at", [0.0, 10.0, 59.0])
    @pytest.mark.parametrize("cost", [1, 40, 100])
    def test_the_wait_it_names_is_enough_and_not_much_too_long(self, clock, at, cost):
        limiter = Limiter(LimitsSection(tokens_per_minute=100))
        clock(at)
        limiter.admit("acme", tokens=70)
        limiter.admit("acme", tokens=30)
        wait = wait_s(limiter, tokens=cost)
        clock(at + wait - 0.7)  # the count is rounded down, so that a token may pass this much sooner
        wait_s(limiter, tokens=cost)
        clock(at + wait)
        limiter.admit("acme", tokens=cost)

    def test_the_wait_within_the_next_minute(self, clock):
        limiter = Limiter(LimitsSection(tokens_per_minute=100))
        clock(30)
        limiter.admit("acme", tokens=80)
        clock(75)  # 80 · 45/60 = 60 still count
        limiter.admit("acme", tokens=20)
        assert wait_s(limiter, tokens=60) == pytest.approx(30)  # until 80 · 15/60 + 20 = 40

    def test_what_is_refused_counts_nothing(self, clock):
        limiter = Limiter(LimitsSection(requests_per_minute=2, tokens_per_minute=100))
        limiter.admit("acme", tokens=90)
        for _ in range(5):
            wait_s(limiter, tokens=20)
        limiter.admit("acme", tokens=10)
        assert wait_s(limiter, tokens=0) > 0  # of requests

    def test_more_than_a_minute_has_is_refused_for_good(self, clock):
        with pytest.raises(QuotaExceeded, match=r"101 tokens.*100"):
            Limiter(LimitsSection(tokens_per_minute=100)).admit("acme", tokens=101)


class Shelf:
    """A store of versions, each of some bytes."""

    def __init__(self, sizes):
        self.sizes = {AdapterRef(t, n, v): b for (t, n, v), b in sizes.items()}
        self.asked = 0

    def list(self, tenant):
        return [r for r in self.sizes if r.tenant == tenant and r == self.versions(tenant, r.name)[-1]]

    def versions(self, tenant, name):
        return sorted(r for r in self.sizes if (r.tenant, r.name) == (tenant, name))

    def nbytes(self, ref):
        self.asked += 1
        if self.sizes[ref] is None:
            raise StorageFailed("damaged")
        return self.sizes[ref]


class TestAdapterQuota:
    @pytest.fixture
    def shelf(self):
        return Shelf({("acme", "a", 1): 10, ("acme", "a", 2): 10, ("acme", "b", 1): 5, ("zoo", "a", 1): 99})

    def test_adapters_are_counted_before_one_more(self, shelf):
        quota = AdapterQuota(LimitsSection(adapters=2), shelf)
        quota.check("zoo", 1, another=True)
        quota.check("acme", 1, another=False)
        with pytest.raises(QuotaExceeded, match="2 adapters"):
            quota.check("acme", 1, another=True)
        AdapterQuota(LimitsSection(), shelf).check("acme", 1, another=True)
        assert shelf.asked == 0  # nobody's bytes are limited

    @pytest.mark.parametrize("another", [True, False])
    def test_bytes_of_all_versions_are_counted(self, shelf, another):
        quota = AdapterQuota(LimitsSection(adapter_bytes=40), shelf)
        quota.check("acme", 15, another=another)
        with pytest.raises(QuotaExceeded, match=r"40 bytes together; 15 are left, and this one has 16"):
            quota.check("acme", 16, another=another)
        with pytest.raises(QuotaExceeded, match=r" 0 are left"):
            quota.check("zoo", 1, another=another)

    def test_room_for_another_like_this_is_remembered_until_it_is_asked_again(self, shelf):
        quota = AdapterQuota(LimitsSection(adapter_bytes=34), shelf)
        a, b = AdapterRef("acme", "a", 2), AdapterRef("acme", "b", 1)
        assert quota.had_room("acme", "a")
        assert (quota.has_room(a), quota.has_room(b)) == (False, True)
        assert (quota.had_room("acme", "a"), quota.had_room("acme", "b")) == (False, True)
        del shelf.sizes[b]
        assert not quota.had_room("acme", "a")
        assert quota.has_room(a)
        assert quota.had_room("acme", "a")

    def test_what_nobody_can_have_has_no_bytes(self, shelf):
        shelf.sizes[AdapterRef("acme", "a", 1)] = None
        assert AdapterQuota(LimitsSection(adapter_bytes=40), shelf).left_bytes("acme") == 25


class TestOverHttp:
    @pytest.fixture
    def ask(self):
        limits = LimitsSection(tokens_per_minute=300, tenant=(NamedLimits(name="slow", requests_per_minute=1),))

        def by_header(connection):
            return Caller(owner=connection.headers["authorization"].removeprefix("Bearer "), admin=False)

        backend = FakeBackend()
        app = create_app(backend, AppConfig(default_max_tokens=64, caller_of=by_header, limiter=Limiter(limits)))
        with serving(app) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as client:
            yield lambda tenant, **body: client.with_options(api_key=tenant).chat.completions.create(
                **{"model": BASE, "messages": HI} | body
            )

    def test_a_refusal_says_when_to_come_again(self, ask):
        ask("slow", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as caught:
            ask("slow", max_tokens=1)
        error = caught.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(error.response.headers["retry-after"]) <= 120
        assert "x-should-retry" not in error.response.headers

    def test_all_choices_and_the_prompt_count(self, ask):
        """The prompt has 20 tokens: mark, "user:hi", end, mark, "assistant:"."""
        with pytest.raises(openai.RateLimitError) as caught:
            ask("acme", max_tokens=100, n=3)
        assert "come to 320 tokens" in caught.value.message
        assert caught.value.response.headers["x-should-retry"] == "false"
        ask("acme", max_tokens=93, n=3)  # 20 + 279
        with pytest.raises(openai.RateLimitError):
            ask("acme", max_tokens=1)
        ask("other", max_tokens=1)
