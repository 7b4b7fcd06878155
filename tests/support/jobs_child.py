"""A process that runs jobs and may be killed: `python jobs_child.py FOLDER STEPS [full]`.

FOLDER/states holds the checkpoints, FOLDER/out the finished adapters; a job whose adapter is there is not created again.
A line of output for each step and for each event that is not one.  With `full` the disk takes no file of more than a few
bytes from the first checkpoint on, until every job is paused; then it takes all again and the jobs are resumed.
"""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path

import compiled  # noqa: F401  # jax as in the tests
import numpy as np
from jobs_world import make_jobs, request, trainer_of
from train_world import examples, optimizer

from jaxlora.core.atomic_files import replace_file
from jaxlora.core.lora import AdapterRef, AdapterWeights
from train.jobs.job import JobRequest
from train.jobs.runner import Jobs

SLOTS = 2


class FolderShelf:
    """Finished adapters as files, whole or not there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, tenant: str, name: str, weights: AdapterWeights) -> AdapterRef:
        file = io.BytesIO()
        arrays = {f"{t}.{half}": x for t, pair in weights.weights.items() for half, x in zip("ab", pair, strict=True)}
        np.savez(file, **arrays)
        replace_file(self.folder / f"{name}.npz", file.getvalue())
        return AdapterRef(tenant, name, 1)


def asked(steps: int) -> dict[str, JobRequest]:
    """Three jobs over two slots, by id: one delivers its best weights, one would stop early if it forgot its best loss."""
    data = {i: examples(i, 7) for i in range(3)}
    heldout, how = (
        examples(9, 2),
        optimizer(lr=0.03, total_steps=steps, schedule="cosine", warmup_steps=3, weight_decay=0.1),
    )
    settings = [
        {"owner": "a", "checkpoint_every": 2},
        {"owner": "b", "checkpoint_every": 3, "heldout": heldout, "evaluate_every": 2, "keep_best": True},
        {"owner": "b", "checkpoint_every": 5, "heldout": heldout, "evaluate_every": 3, "patience": 1000},
    ]
    return {f"job{i}": request(i, data=data[i], optimizer=how, **s) for i, s in enumerate(settings)}


def start(folder: Path, steps: int) -> Jobs:
    """The jobs that have no adapter yet; slices of three steps, and what is parked goes to files."""
    (folder / "out").mkdir(parents=True, exist_ok=True)
    trainer = trainer_of(SLOTS, lanes=2, lane_tokens=32)
    jobs, _ = make_jobs(
        folder,
        trainer,
        shelf=FolderShelf(folder / "out"),
        states=folder / "states",
        quantum_steps=3,
        host_bytes=0,
    )
    for job_id, r in asked(steps).items():
        if not (folder / "out" / f"{r.name}.npz").exists():
            jobs.create(r, id=job_id)
    return jobs


def main(folder: Path, steps: int, full: bool) -> None:
    jobs, told = start(folder, steps), {}
    while jobs.has_work:
        jobs.step()
        time.sleep(0.01)  # so that saves get done between steps, as with a model of some size
        for job in jobs.list(None)[::-1]:
            for event in jobs.events(job.request.owner, job.id, after=told.get(job.id, 0)):
                print(job.id, event.kind, event.message, flush=True)
                told[job.id] = event.seq
                if full and event.kind == "checkpoint":
                    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        if full and not jobs.has_work:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            full = False
            for job in jobs.list(None):
                assert (job.state, job.code) == ("paused", "storage_failed"), job
                jobs.resume(job.request.owner, job.id)
    jobs.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "full" in sys.argv)
