"""Training as the server's watch tells it: a function that is called on the device thread."""

from __future__ import annotations

from collections import Counter

from serve.snapshot import MOST_JOBS, JobView, TrainingView
from train.jobs.job import NEXT
from train.jobs.runner import Jobs


def training_view(jobs: Jobs) -> TrainingView:
    """What the jobs of a trainer have come to, and the newest of those that have not ended.  On its thread."""
    every = jobs.list(None)
    counts = Counter(job.state for job in every)
    views = []
    for job in [job for job in every if not job.final][:MOST_JOBS]:
        tenant = jobs.trainer.tenants.get(job.id)
        views.append(
            JobView(
                id=job.id,
                owner=job.request.owner,
                name=job.request.name,
                state=job.state,
                step=job.progress.step,
                steps=job.request.optimizer.total_steps,
                loss=tenant.losses[-1] if tenant is not None and tenant.losses else None,
            )
        )
    return TrainingView(
        tokens=jobs.trainer.trained_tokens,
        steps=jobs.trainer.updates,
        jobs={state: counts[state] for state, after in NEXT.items() if after},  # those at their end are forgotten
        open=tuple(views),
    )
