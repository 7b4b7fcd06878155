"""`jaxlora demo`: eight tenants train together on a real model, answer while they train, and are measured.

open ─▶ compile everything ─▶ base on held-out ─▶ train, publish, sample ─▶ adapters on held-out ─▶ table, files, HTTP
"""

from __future__ import annotations

import itertools
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from jaxlora.checkpoints.load import Opened, load_found
from jaxlora.config.base import DEMO_MODEL, ModelSection
from jaxlora.config.serving import ServeConfig, TrainingSection
from jaxlora.core.lora import AdapterRef, LoraSpec
from jaxlora.core.progress import Progress, Stage, screen_on
from jaxlora.model import compile_cache
from jaxlora.model.lora_pool import PoolSpec
from jaxlora.peft.folder import export_peft
from serve.demo.tasks import Task, constant_baseline, demo_tasks, nearest_baseline
from serve.engine.request import Delta, Request, SamplingParams
from serve.runtime.device_thread import DeviceThread
from serve.runtime.live_training import LiveTraining, small_trainer, warm_up
from serve.server.app import make_http
from serve.server.build import make_runner, open_store, planned, stop
from serve.server.gate import AppConfig
from serve.server.uvicorn import bound
from train.data.examples import Example
from train.data.records import chat_example
from train.run.loss_curves import LossCurves, write_pictures
from train.step.optimizer import Optimizer
from train.trainer import Evaluation, StepReport, Trainer

STEPS, BATCH = 30, 8  # optimizer steps of each tenant, examples of a step
LANES, LANE_TOKENS = 8, 224  # a lane holds a step of one tenant: its 8 examples have at most 222 tokens
RANK, ALPHA, LR, WARMUP_STEPS = 8, 16.0, 3e-3, 4
PUBLISH_EVERY = 6  # steps
HELDOUT = 32  # examples of each tenant that are generated
SPARE_TOKENS = 4  # an answer may be this much longer than the longest right one


def demo_serve_config(port: int, adapters: Path, tenants: int) -> ServeConfig:
    """The demo's server: two versions of each tenant fit the device, 32 sequences run at once."""
    return ServeConfig(
        model=ModelSection(path=DEMO_MODEL),
        adapters=adapters,
        port=port,
        slots=2 * tenants,
        max_rank=RANK,
        rows=32,
        kv_pages=128,
        prefill_lanes=8,
        prefill_tokens=24,  # a question of the demo fits one chunk
        default_max_tokens=64,
        max_waiting=4096,
        max_waiting_tokens=1_000_000,
        grace_s=10.0,
        training=TrainingSection(slots=tenants, max_rank=RANK, lanes=LANES, lane_tokens=LANE_TOKENS),
    )


@dataclass(slots=True)
class DemoScreen:
    """What the screen shows; filled by the device thread, read by the main one."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    reports: dict[str, StepReport] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)  # lines to print above the table
    published: int = 0
    right: int = 0  # samples taken while training that were right
    sampled: int = 0


@dataclass(frozen=True, slots=True)
class Score:
    """One tenant's held-out result."""

    evaluation: Evaluation
    exact: float  # share of answers that are right to the letter


class Demo:
    """One run of the demo."""

    def __init__(self, opened: Opened, runner: DeviceThread, trainer: Trainer, tasks: Sequence[Task], seed: int):
        self.opened, self.runner, self.trainer, self.tasks, self.seed = opened, runner, trainer, tasks, seed
        self.board = DemoScreen()
        self._ids = itertools.count()
        self._task_of = {task.name: task for task in tasks}

    def examples(self, task: Task, heldout: bool) -> list[Example]:
        """The task's conversations as token sequences."""
        pairs = task.heldout[:HELDOUT] if heldout else task.train
        return [chat_example(self.opened.tokenizer, task.conversation(pair), max_tokens=LANE_TOKENS) for pair in pairs]

    def request(self, task: Task, user: str, adapter: AdapterRef | None) -> Request:
        """A greedy question to one version, with room for the longest right answer."""
        tokenizer = self.opened.tokenizer
        longest = max(len(tokenizer.encode(answer)) for _, answer in task.heldout[:HELDOUT])
        return Request(
            id=f"demo-{next(self._ids)}",
            tenant=task.name,
            adapter=adapter,
            prompt=tuple(tokenizer.chat(task.prompt(user))),
            params=SamplingParams(max_tokens=longest + SPARE_TOKENS, temperature=0.0),
        )

    def seat(self) -> None:
        """Every tenant gets its seat in the trainer, with its own data, learning rate and seed."""
        for i, task in enumerate(self.tasks):
            self.trainer.add(
                task.name,
                LoraSpec(rank=RANK if i % 2 == 0 else RANK // 2, alpha=ALPHA),
                Optimizer(lr=LR, total_steps=STEPS, warmup_steps=WARMUP_STEPS),
                self.examples(task, heldout=False),
                batch_size=BATCH,
                seed=self.seed + i,
            )

    def score(self, tuned: bool, stage: Stage) -> dict[str, Score]:
        """Held-out loss and exact match of every tenant, all tenants' questions answered in the same steps.

        stage: is told how many of the questions are answered.
        """
        store = self.runner.engine.store
        jobs = [
            (task, wanted, self.request(task, user, store.latest(task.name, task.name) if tuned else None))
            for task in self.tasks
            for user, wanted in task.heldout[:HELDOUT]
        ]
        stage.at(0, len(jobs))
        answers = self.runner.complete([request for _, _, request in jobs], stage.at)
        work = [(self.examples(task, heldout=True), task.name if tuned else None) for task in self.tasks]
        evaluations = self.runner.call(lambda: self.trainer.evaluate_all(work))
        scores = {}
        for task, evaluation in zip(self.tasks, evaluations, strict=True):
            right = [a.text == wanted for (t, wanted, _), a in zip(jobs, answers, strict=True) if t is task]
            scores[task.name] = Score(evaluation, sum(right) / len(right))
        return scores

    def on_step(self, reports: list[StepReport]) -> None:
        """New losses for the screen."""
        with self.board.lock:
            self.board.reports |= {r.tenant: r for r in reports}

    def on_publish(self, ref: AdapterRef, step: int) -> None:
        """Asks the new version a held-out question; the answer comes between the next training steps."""
        task = self._task_of[ref.name]
        user, wanted = task.heldout[HELDOUT + (step // PUBLISH_EVERY) % (len(task.heldout) - HELDOUT)]
        request = self.request(task, user, ref)
        text: list[str] = []

        def listen(delta: Delta) -> None:
            text.append(delta.text)
            if delta.error is not None or delta.finish is not None:
                answer = "".join(text) if delta.error is None else f"error: {delta.error}"
                mark = "[green]right[/]" if answer == wanted else "[yellow]not yet[/]"
                line = f"{_plain(user)} → {_plain(answer)}  {mark}"
                with self.board.lock:
                    self.board.samples[ref.name] = f"v{ref.version}: {line}"
                    self.board.news.append(f"step {step:>3}  {ref.name:<12} version {ref.version} answers  {line}")
                    self.board.sampled += 1
                    self.board.right += answer == wanted

        with self.board.lock:
            self.board.published += 1
        self.runner.admit(request, listen)

    def train(self, console: Console) -> float:
        """Trains all tenants to their last step, showing a line per tenant.  Returns seconds."""
        live_training = LiveTraining(
            self.trainer,
            self.runner.publisher,
            publish_every=PUBLISH_EVERY,
            on_step=self.on_step,
            on_publish=self.on_publish,
        )
        start_s = time.perf_counter()
        self.runner.call(lambda: setattr(self.runner, "trainer", live_training))
        with Live(self._table(), console=console, refresh_per_second=4) as live:
            while self.runner.call(lambda: self.trainer.has_work or self.runner.engine.has_work):
                self._show(console, live)
                time.sleep(0.5)
            self._show(console, live)
        if not console.is_terminal:
            console.print()  # rich leaves the line open in a log
        self.runner.call(lambda: setattr(self.runner, "trainer", None))
        return time.perf_counter() - start_s

    def _show(self, console: Console, live: Live) -> None:
        with self.board.lock:
            news, self.board.news = self.board.news, []
        for line in news:
            console.print(line, highlight=False)
        live.update(self._table())

    def _table(self) -> Table:
        table = Table("tenant", "step", "loss", "sample from the newest version, taken while training", expand=True)
        with self.board.lock:
            for task in self.tasks:
                r = self.board.reports.get(task.name)
                step, loss = ("", "") if r is None else (f"{r.step}/{STEPS}", f"{r.loss:.3f}")
                table.add_row(task.name, step, loss, self.board.samples.get(task.name, ""))
        return table


def _plain(text: str) -> str:
    """Model text with nothing that the screen would take for markup or a new line."""
    return text.replace("[", "\\[").replace("\n", " ")


def result_table(tasks: Sequence[Task], base: dict[str, Score], tuned: dict[str, Score]) -> Table:
    """What the demo proves, a line per tenant."""
    table = Table(title=f"held out: {HELDOUT} examples a tenant, greedy answers, right to the letter")
    table.add_column("tenant", no_wrap=True)
    for column in ("NLL base", "NLL adapter", "exact base", "exact adapter", "constant answer", "nearest example"):
        table.add_column(column, justify="right")
    for task in tasks:
        b, t = base[task.name], tuned[task.name]
        table.add_row(
            task.name,
            f"{b.evaluation.nll:.3f}",
            f"{t.evaluation.nll:.3f}",
            f"{b.exact:.2f}",
            f"{t.exact:.2f}",
            f"{constant_baseline(task):.2f}",
            f"{nearest_baseline(task):.2f}",
        )
    return table


def main(*, exit_after: bool, port: int, out: Path | None, seed: int) -> None:
    """Runs the demo; goes on serving on loopback unless `exit_after`.

    Raises ModelInvalid when the demo model is not installed, ConfigInvalid when the port is taken.
    """
    console = Console()
    compile_cache.enable(None)
    folder = out if out is not None else Path(tempfile.mkdtemp(prefix="jaxlora-demo-"))
    tasks = demo_tasks(seed)
    settings = demo_serve_config(port, folder / "store", len(tasks))
    listening = bound(settings.host, port)
    progress = Progress(screen_on(sys.stdout))
    with progress.stage("opening SmolLM2-135M-Instruct"):
        found, config = planned(settings, say=lambda line: None)
        opened = load_found(found, config.model, config.mesh)
    store = open_store(config)
    runner = make_runner(opened, config, store)
    http = make_http(
        runner,
        AppConfig(default_max_tokens=config.default_max_tokens, max_request_s=config.max_request_s),
        listening=listening,
        grace_s=config.grace_s,
    )
    pool_spec = PoolSpec(slots=len(tasks), rank=RANK, dtype="float32")
    trainer = small_trainer(opened, pool_spec, lanes=LANES, lane_tokens=LANE_TOKENS)
    demo = Demo(opened, runner, trainer, tasks, seed)
    with progress.stage("compiling", unit=f"serving programs in {opened.base.dtype.name}") as stage:
        runner.start(stage.at)
    with progress.stage("compiling", unit="training programs") as stage:
        runner.call(lambda: warm_up(trainer, runner.publisher, stage.at))
    http.start()
    console.print(f"answering on {http.url}/v1 from now on")
    runner.call(demo.seat)
    with compile_cache.CompileCounter() as compiles:
        with progress.stage("asking the base model", unit="questions") as stage:
            base = demo.score(False, stage)
        train_s = demo.train(console)
        decoded = runner.call(lambda: runner.engine.decoded_tokens)
        with progress.stage("asking the eight adapters", unit="questions together") as stage:
            tuned = demo.score(True, stage)
            decode_s = stage.lasted_s
    decoded = runner.call(lambda: runner.engine.decoded_tokens) - decoded
    console.print(result_table(demo.tasks, base, tuned))
    learned = sum(base[t.name].exact <= 0.2 and tuned[t.name].exact >= 0.7 for t in demo.tasks)
    console.print(
        f"{learned} of {len(demo.tasks)} tenants went from at most 0.20 to at least 0.70 exact match\n"
        f"trained {trainer.trained_tokens} tokens in {train_s:.0f} s: {trainer.trained_tokens / train_s:.0f} tokens/s, "
        f"sampling included; {demo.board.published} versions published and sampled while training, "
        f"{demo.board.right} of {demo.board.sampled} samples right\n"
        f"decoded {decoded} tokens of 8 adapters in {decode_s:.0f} s: {decoded / decode_s:.0f} tokens/s, "
        f"prefill and scoring included\n"
        f"compiles after warm-up: {compiles.compiles} (traces {compiles.traces})",
        highlight=False,
    )
    write_files(demo, folder)
    console.print(f"adapters (PEFT folders), versions and loss curves: {folder}", highlight=False, soft_wrap=True)
    if not exit_after:
        wait(console, http.url, demo.tasks[0])
    http.stop()
    stop(runner, store)


def write_files(demo: Demo, folder: Path) -> None:
    """PEFT folders of the final versions and the loss curves."""
    store, opened = demo.runner.engine.store, demo.opened
    for task in demo.tasks:
        ref = store.latest(task.name, task.name)
        if ref is not None:
            target = folder / "peft" / task.name
            export_peft(store.get(ref), target, opened.base.config, base_name=opened.name, replace=True)
    tenants = demo.trainer.tenants.items()
    write_pictures({n: LossCurves(train=(range(1, len(t.losses) + 1), t.losses)) for n, t in tenants}, folder)


def wait(console: Console, url: str, task: Task) -> None:
    """Says how to ask, then serves until Ctrl-C or SIGTERM."""
    user = task.heldout[0][0]
    console.print(
        f"\nserving until Ctrl-C.  Ask any of them, for example:\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d "
        f'\'{{"model": "{task.name}", "temperature": 0, "messages": '
        f'[{{"role": "system", "content": "{task.system}"}}, {{"role": "user", "content": "{user}"}}]}}\'\n'
        f"or, in another terminal: jaxlora chat {task.name} --url {url}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    end = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: end.set())
    try:
        end.wait()
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print("stopping")
