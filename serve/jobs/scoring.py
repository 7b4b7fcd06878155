"""Versions of a running job scored by what they generate, at low priority, while training and serving go on.

Published ─▶ queue ─▶ questions, a few at a time, when no client waits ─▶ metrics ─▶ an event of the job
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import regex

from jaxlora.config.training import TooLong
from jaxlora.core.errors import AdapterNotFound, DataInvalid, JaxLoraError, StorageAway, Unavailable
from jaxlora.core.lora import AdapterRef
from serve.db.job_spec import Evaluation
from serve.db.models import JobRecord, JsonObject, NewEvent
from serve.engine.grammar import Grammar, GrammarSource
from serve.engine.request import Request, SamplingParams
from serve.jobs import resolve
from serve.jobs.live_jobs import Published
from serve.runtime.device_thread import DeviceThread
from train.data.examples import Example, Unit
from train.data.load import Loaded
from train.jobs.job import said

LOG = logging.getLogger("serve")
AT_ONCE = 2  # questions in flight: clients keep the other rows
YIELD_S = 0.05  # between two looks whether clients wait
MAX_TOKENS, SAMPLES = 128, 64  # of a job that names none
MOST_CHOICES = 64  # distinct answers of a file that choice_accuracy chooses among
REGEX_S = 0.1  # a pattern that takes longer does not match


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A held-out prompt, and the answer that is wanted."""

    prompt: tuple[int, ...]
    wanted: str


def json_equal(answer: str, wanted: str) -> bool:
    """Whether both are JSON and mean the same."""
    try:
        return json.loads(answer) == json.loads(wanted)
    except ValueError:
        return False


def matches(answer: str, pattern: str) -> bool:
    """Whether the pattern is found in the answer, in little time."""
    try:
        return regex.search(pattern, answer, timeout=REGEX_S) is not None
    except (regex.error, TimeoutError):
        return False


METRICS: Mapping[str, Callable[[str, str], bool]] = {
    "exact_match": lambda answer, wanted: answer.strip() == wanted.strip(),
    "contains": lambda answer, wanted: wanted.strip() in answer,
    "regex": matches,
    "json_equal": json_equal,
    "choice_accuracy": lambda answer, wanted: answer == wanted,
}


class Spelling(Protocol):
    """A tokenizer that spells tokens and knows those that end an answer."""

    @property
    def eos_ids(self) -> Collection[int]:
        """Returns the ids that end a turn or a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids."""


def question(example: Unit, tokenizer: Spelling) -> Question:
    """Returns what an example asks: the answer is its last trained tokens up to the one that ends it, the prompt all before.

    Raises DataInvalid for an example of another kind.
    """
    if isinstance(example, Example) and example.rollout is None:
        trained = example.weights > 0
        end = len(trained) - int(trained[::-1].argmax())
        begin = end - int((~trained[:end])[::-1].argmax())
        if trained.any() and int(example.tokens[end - 1]) in tokenizer.eos_ids:
            wanted = tokenizer.decode(example.tokens[begin : end - 1].tolist())
            return Question(prompt=tuple(example.tokens[:begin].tolist()), wanted=wanted)
    raise DataInvalid("has no prompt with an answer; give conversations, or prompts with completions")


def questions(loaded: Loaded, tokenizer: Spelling, most: int) -> list[Question]:
    """Returns the questions of the first examples of a file.  Raises DataInvalid, which says what is wrong with which."""
    found: list[Question] = []
    for number, example in enumerate(loaded.units[:most], 1):
        try:
            found.append(question(example, tokenizer))
        except DataInvalid as error:
            raise DataInvalid(
                f"example {number} of the evaluation file {error.message}", param="evaluation.file"
            ) from error
    return found


@dataclass(frozen=True, slots=True)
class Task:
    """A version to score."""

    record: JobRecord
    asked: Evaluation
    version: Published


class Turns:
    """What is to be scored: of each job the newest version alone, and tenants take turns.  From any thread."""

    def __init__(self) -> None:
        self._some = threading.Condition()
        self._waiting: dict[str, dict[str, Task]] = {}  # tenant, job; the tenant whose turn it is comes first
        self._closed = False

    def put(self, task: Task) -> None:
        """Adds a version, in place of an older one of its job."""
        with self._some:
            self._waiting.setdefault(task.record.tenant, {})[task.record.id] = task
            self._some.notify()

    def take(self) -> Task | None:
        """The next version, once there is one.  None: closed."""
        with self._some:
            self._some.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            tenant = next(iter(self._waiting))
            jobs = self._waiting.pop(tenant)
            task = jobs.pop(next(iter(jobs)))
            if jobs:
                self._waiting[tenant] = jobs  # behind the others
            return task

    def close(self) -> None:
        """Leaves what is not taken yet."""
        with self._some:
            self._closed = True
            self._some.notify_all()


class Scorer:
    """One thread that asks.  Told from any thread."""

    def __init__(
        self,
        runner: DeviceThread,
        load: Callable[[str, TooLong], Loaded],
        tell: Callable[[str, Callable[[JobRecord], JobRecord], NewEvent], None],
    ):
        """load: the examples of a file.  tell: stores a change of a job's record and an event, such as JobRecorder.change."""
        self._runner, self._load, self._tell = runner, load, tell
        self._turns = Turns()
        self._thread = threading.Thread(target=self._run, name="job-scores", daemon=True)
        self._stopping = False
        self._thread.start()

    def score(self, record: JobRecord, version: Published) -> None:
        """Has a version scored, if its job asked for that.  Returns at once."""
        if record.request.evaluation is not None:
            self._turns.put(Task(record, record.request.evaluation, version))

    def close(self) -> None:
        """Ends, and leaves what is not scored yet."""
        self._stopping = True
        self._turns.close()
        self._thread.join()

    def _run(self) -> None:
        while (task := self._turns.take()) is not None:
            record, asked, version = task.record, task.asked, task.version
            try:
                self._score(record, asked, version)
            except StorageAway as error:
                self._event(record, version, f"step {version.step} is not scored: {why(error)}", {})
            except Unavailable:
                return  # the server ends
            except (JaxLoraError, OSError) as error:
                self._event(record, version, f"step {version.step} is not scored: {why(error)}", {})
            except Exception:
                LOG.exception("job %s: a version is not scored", record.id)

    def _score(self, record: JobRecord, asked: Evaluation, version: Published) -> None:
        limit = asked.max_tokens or MAX_TOKENS
        # An answer that is cut has no end: what may be cut of training examples is left out here.
        loaded = self._load(asked.file, "error" if resolve.too_long(record.request) == "error" else "skip")
        found = questions(loaded, self._runner.tokenizer, asked.samples or SAMPLES)
        free = [m for m in asked.metrics if m != "choice_accuracy"]
        began, scores = time.monotonic(), {}
        if free:
            answers = self._answers(version.ref, found, limit, None)
            scores |= {metric: share(METRICS[metric], answers, found) for metric in free}
        if "choice_accuracy" in asked.metrics:
            answers = self._answers(version.ref, found, limit, self._choices(found, version.ref.tenant))
            scores["choice_accuracy"] = share(METRICS["choice_accuracy"], answers, found)
        shown = ", ".join(f"{k} {v:.3f}" for k, v in scores.items())
        data: JsonObject = {
            "step": version.step,
            "adapter_version": version.ref.version,
            "samples": len(found),
            **scores,
        }
        data["seconds"] = round(time.monotonic() - began, 2)
        self._event(record, version, f"step {version.step}: {shown}", data)

    def _choices(self, found: Sequence[Question], tenant: str) -> Grammar:
        """Any answer of the file.  Raises DataInvalid for too many."""
        choices = sorted({q.wanted for q in found})
        if len(choices) > MOST_CHOICES:
            raise DataInvalid(
                f"choice_accuracy chooses among at most {MOST_CHOICES} distinct answers, the file has {len(choices)}",
                param="evaluation.metrics",
            )
        source = GrammarSource(kind="choice", text=json.dumps(choices), param="evaluation.metrics")
        return asyncio.run(self._runner.grammars.compile(source, tenant))

    def _answers(
        self, ref: AdapterRef, found: Sequence[Question], max_tokens: int, grammar: Grammar | None
    ) -> list[str]:
        """What the version answers, greedily.  Raises AdapterNotFound when it is deleted, Unavailable."""
        answers: list[str] = []
        for start in range(0, len(found), AT_ONCE):
            while self._runner.waiting_requests > 0 and not self._stopping:
                time.sleep(YIELD_S)
            if self._stopping:
                raise Unavailable("the server is stopping")
            requests = [
                Request(
                    id=f"score-{uuid.uuid4().hex}",
                    tenant=ref.tenant,
                    adapter=ref,
                    prompt=q.prompt,
                    params=SamplingParams(max_tokens=max_tokens, temperature=0.0, grammar=grammar),
                )
                for q in found[start : start + AT_ONCE]
            ]
            answers += [c.text for c in self._runner.complete(requests)]
        return answers

    def _event(self, record: JobRecord, version: Published, message: str, data: JsonObject) -> None:
        kind = "metrics" if data else "message"
        event = NewEvent(time_s=time.time(), level="info" if data else "warn", kind=kind, message=message, data=data)
        self._tell(record.id, lambda now: with_score(now, data), event)


def why(error: JaxLoraError | OSError) -> str:
    """Why a version is not scored, for its owner."""
    return "newer versions came first" if isinstance(error, AdapterNotFound) else said(error)


def with_score(record: JobRecord, data: JsonObject) -> JobRecord:
    """The record with one more point of its curve."""
    if not data:
        return record
    curve = record.progress.get("scores")
    return replace(record, progress={**record.progress, "scores": [*(curve if isinstance(curve, list) else []), data]})


def share(right: Callable[[str, str], bool], answers: Sequence[str], found: Sequence[Question]) -> float:
    """The share of answers that are right."""
    return sum(right(a, q.wanted) for a, q in zip(answers, found, strict=True)) / len(found)
