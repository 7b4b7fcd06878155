"""Writes tests/fixtures/data_before_move: what a server and a training run left on disk before the modules moved to folders.

`uv run python tests/support/make_data_before_move.py` was run by the last version with flat packages (revision c9974c5), which
is the point of it.  A later version must open what it wrote, so the script is kept to show how and is not run again.

The server has no orderly end: its process exits in the middle of a job.  A copy of the folder is then served by the same
version, and what it went on to is expected of later ones.
"""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import closing
from pathlib import Path

from adapters_world import zip_of
from old_data_world import (
    EVERY,
    FILES,
    FOLDER,
    RUN,
    SERVER,
    STEPS,
    Server,
    fine_tune,
    server,
    unpack,
    upload,
    write_run,
)
from serve_world import MODEL, random_weights
from small_world import tiny_path
from whole_world import whole_config

from jaxlora.checkpoints.load import base_hash, open_model
from jaxlora.core.lora import Adapter, AdapterRef, LoraSpec
from jaxlora.peft.folder import export_peft
from serve.access.keys import create_key
from serve.db.database import Database
from serve.db.keys import StoredKeys
from train.trainer import Trainer

PROMPTS = [f"{word} {i}" for i in range(10) for word in ("say", "count to", "why")]
MARGIN = 0.02  # nats, of every token that is compared: far beyond rounding
ADAPTERS = [("acme", "bot"), ("acme", "bot"), ("acme", "tone"), ("globex", "bot")]
TARGETS = {"bot": ("q_proj", "v_proj", "down_proj"), "tone": ("o_proj", "gate_proj")}


def archive_of(name: str, seed: int, scratch: Path) -> bytes:
    """A zip of a PEFT folder, its weights at random."""
    source, _ = open_model(tiny_path(MODEL))
    rank, targets = 2 + seed % 3, TARGETS[name]
    adapter = Adapter(
        ref=AdapterRef("x", name, 1),
        spec=LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets),
        base_hash=base_hash(tiny_path(MODEL)),
        weights=random_weights(source.config, rank, targets, seed),
    )
    export_peft(adapter, scratch / f"peft{seed}", source.config, base_name="tiny")
    return zip_of({p.name: p.read_bytes() for p in sorted((scratch / f"peft{seed}").iterdir())})


def clear(server: Server, key: str, model: str, *unlike: str) -> dict:
    """A prompt with its greedy tokens, each well above the others, which neither the base nor these models say."""
    answers = [(*server.greedy(key, model, prompt), prompt) for prompt in PROMPTS]
    for tokens, _, prompt in sorted((a for a in answers if a[1] > MARGIN), key=lambda a: (-len(set(a[0])), -a[1])):
        if all(server.greedy(key, other, prompt)[0] != tokens for other in ("tiny", *unlike)):
            return {"model": model, "prompt": prompt, "tokens": tokens}
    raise ValueError(f"no prompt of {model} is clear")


def job(server: Server, key: str, file: str, steps: int, **extra: object) -> str:
    """The id of a new one."""
    body = {"model": "tiny", "training_file": file, "seed": 5, "max_steps": steps, "checkpoint_every": EVERY}
    body |= {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 0.01, **extra}
    return server.ask(key, "POST", "/v1/fine_tuning/jobs", json=body)["id"]


def until_step(server: Server, key: str, id: str, step: int) -> None:
    """Waits until a job that runs has made so many updates."""
    while (server.job(key, id, "running")["progress"]["step"] or 0) < step:
        time.sleep(0.02)


def write(folder: Path) -> None:
    """Fills the folder and leaves without an end."""
    (folder / "data").mkdir(parents=True)
    with closing(Database(whole_config(folder).database_url)) as database:
        keys = {tenant: create_key(StoredKeys(database), tenant)[1] for tenant in ("acme", "globex")}
        keys["root"] = create_key(StoredKeys(database), "root", role="admin")[1]
    acme = keys["acme"]
    with server(folder) as it, tempfile.TemporaryDirectory() as scratch:
        completions = []
        for seed, (tenant, name) in enumerate(ADAPTERS):
            form = {"data": {"name": name}, "files": {"file": ("a.zip", archive_of(name, seed, Path(scratch)))}}
            it.ask(keys[tenant], "POST", "/v1/adapters", **form)
            version = 1 + sum(one == (tenant, name) for one in ADAPTERS[:seed])
            before = [f"{name}@{version - 1}"] if version > 1 else []
            completions.append({"tenant": tenant, **clear(it, keys[tenant], f"{name}@{version}", *before)})
        files = {tenant: upload(it, keys[tenant], tenant, again="file-1") for tenant in FILES}
        train = files["acme"]["id"]

        base = it.ask(acme, "GET", "/api/models")["models"][0]["id"]
        hyper = {"loraHyperparameters": {"rank": 2, "targetModules": ["q_proj", "v_proj"], "seed": 1}}
        hyper |= {"trainingArguments": {"learningRate": 0.05}}
        body = {"model": {"baseModelId": base, "name": "sums"}, "initialHyperparameters": hyper}
        tuned = it.ask(acme, "POST", "/api/models", json=body)["id"]
        losses = [fine_tune(it, acme, tuned, again=f"call-{i}") for i in range(3)]
        completions.append({"tenant": "acme", **clear(it, acme, "sums@4")})

        succeeded = job(it, acme, train, 5, suffix="done", metadata={"team": "red"})
        done = it.job(acme, succeeded, "succeeded")
        completions.append({"tenant": "acme", **clear(it, acme, done["fine_tuned_model"])})
        paused = job(it, acme, train, STEPS)
        until_step(it, acme, paused, 5)
        it.ask(acme, "POST", f"/v1/fine_tuning/jobs/{paused}/pause")
        it.job(acme, paused, "paused")
        cancelled = job(it, acme, train, STEPS)
        until_step(it, acme, cancelled, 3)
        it.ask(acme, "POST", f"/v1/fine_tuning/jobs/{cancelled}/cancel")
        it.job(acme, cancelled, "cancelled")
        jobs = {"succeeded": succeeded, "paused": paused, "cancelled": cancelled}
        expected = {
            "keys": keys,
            "completions": completions,
            "files": files,
            "gradient": {"id": tuned, "losses": losses},
            "jobs": jobs,
            "events": {id: it.events(acme, id) for id in jobs.values()},
        }
        while not list((folder / "data/tuned").glob("acme/sums/4/meta")):
            time.sleep(0.01)
        interrupted = jobs["running"] = job(it, acme, train, STEPS)
        until_step(it, acme, interrupted, EVERY + 1)
        while not list((folder / f"data/jobs/states/{interrupted}").glob("*/meta")):
            time.sleep(0.02)
        assert it.job(acme, interrupted, "running")["progress"]["step"] < STEPS, "it was too fast: try again"
        (folder.parent / "expected.json").write_text(json.dumps(expected))
        os._exit(0)


def go_on(folder: Path) -> None:
    """Serves the folder once more and writes what it comes to."""
    written = json.loads((folder.parent / "expected.json").read_text())
    key, id = written["keys"]["acme"], written["jobs"]["running"]
    with server(folder) as it:
        done = it.job(key, id, "succeeded")
        losses = [fine_tune(it, key, written["gradient"]["id"]) for _ in range(2)]
        went_on = [e["message"] for e in it.events(key, id) if "goes on" in e["message"]]
        assert went_on, "it was not interrupted"
        after = {"losses": losses, "went_on": went_on, "train_loss": done["progress"]["train_loss"]}
        after["final"] = clear(it, key, done["fine_tuned_model"])
    (folder.parent / "after.json").write_text(json.dumps(after))


def train(folder: Path, *, interrupted: bool) -> None:
    """`jaxlora train` on the file; interrupted: until it dies after its first checkpoint."""
    from jaxlora import cli

    step = Trainer.step

    def dying(self: Trainer) -> object:
        if interrupted and self.tenants["one"].step == 3:
            os._exit(0)
        return step(self)

    Trainer.step = dying  # ty: ignore[invalid-assignment]
    sys.argv = ["jaxlora", "train", str(write_run(folder))]
    cli.main()


def pack(folder: Path, archive: Path) -> None:
    """The folder's files as an archive that depends on them alone."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime, info.mode = 0, 0o755 if info.isdir() else 0o644
        return info

    with (
        lzma.open(archive, "wb", preset=9 | lzma.PRESET_EXTREME) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            tar.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)


def stage(name: str, folder: Path) -> None:
    """One of the steps above in a process of its own."""
    subprocess.run([sys.executable, __file__, name, str(folder)], check=True)


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        stage("write", work / "server")
        FOLDER.mkdir(exist_ok=True)
        pack(work / "server", SERVER)
        stage("go_on", unpack(SERVER, work / "copy"))
        expected = json.loads((work / "expected.json").read_text())
        expected["after"] = json.loads((work / "after.json").read_text())
        run = work / "run"
        run.mkdir()
        stage("train_interrupted", run)
        (run / "job.toml").unlink()  # it names a folder of this machine
        pack(run, RUN)
        stage("train", unpack(RUN, work / "run_copy"))
        expected["metrics"] = (work / "run_copy/out/one/metrics.csv").read_text()
        (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["write", folder]:
            write(Path(folder))
        case ["go_on", folder]:
            go_on(Path(folder))
        case ["train", folder]:
            train(Path(folder), interrupted=False)
        case ["train_interrupted", folder]:
            train(Path(folder), interrupted=True)
