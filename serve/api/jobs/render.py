"""Jobs, events and checkpoints as OpenAI's clients read them.  Pure."""

from __future__ import annotations

from typing import Literal, cast

from jaxlora.core.adapter_size import AdapterSize
from serve.api.jobs.schemas import CheckpointMetrics, CheckpointObject, EventObject, JobObject, Numbers
from serve.db.models import CheckpointRecord, EventRecord, JobRecord, JsonObject
from serve.runtime.job_names import JobNames
from train.jobs.status import ENDED


def job_object(record: JobRecord, names: JobNames, size: AdapterSize | None, slot_bytes: int) -> JobObject:
    """A job.  `adapter` is the name of what it makes; `fine_tuned_model`, an alias, is set at the first checkpoint.

    size: of its adapter; None until its files are read.  slot_bytes: of its slot on the device.
    """
    request, plan, progress = record.request, record.resolved.plan, record.progress
    usable = "checkpoint_step" in progress or "final_version" in progress
    kind = request.method_name
    numbers: JsonObject = {n: "auto" if plan is None else getattr(plan, n) for n in Numbers.__annotations__}
    beta: JsonObject = {"beta": "auto" if plan is None else plan.beta} if kind == "dpo" else {}
    shown: JsonObject = {
        "id": record.id,
        "object": "fine_tuning.job",
        "created_at": int(record.created_s),
        "finished_at": None if record.finished_s is None else int(record.finished_s),
        "model": request.model,
        "organization_id": record.tenant,
        "status": record.status,
        "training_file": request.training_file,
        "validation_file": request.validation_file,
        "result_files": progress.get("results", []),
        "fine_tuned_model": names.full(record.id) if usable else None,
        "adapter": record.adapter,
        "trained_tokens": progress.get("tokens") if record.status in ENDED else None,
        "seed": record.resolved.seed,
        "error": record.error,
        "hyperparameters": numbers,
        "method": {"type": kind, kind: {"hyperparameters": numbers | beta}},
        "integrations": [],
        "metadata": dict(record.labels) or None,
        "estimated_finish": None,
        "lora": record.resolved.to_json().get("spec"),
        "size": None if size is None else {**size.to_json(), "slot_bytes": slot_bytes},
        "learning_rate": None if plan is None else plan.learning_rate,
        "progress": {
            "step": progress.get("step", 0),
            "total_steps": None if plan is None else plan.total_steps,
            "tokens": progress.get("tokens", 0),
            "train_loss": progress.get("train_loss"),
            "valid_loss": progress.get("valid_loss"),
            "adapter_version": progress.get("version"),
        },
    }
    return cast(JobObject, shown)  # its request and progress are JSON of the database's


def event_object(event: EventRecord) -> EventObject:
    """An event of a job."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.time_s),
        "level": event.level,
        "message": event.message,
        "type": cast(Literal["message", "metrics"], event.kind),
        "data": event.data or None,
    }


def checkpoint_object(record: CheckpointRecord, names: JobNames) -> CheckpointObject:
    """A checkpoint of a job: its model name can be asked."""
    metrics = {k: record.metrics[k] for k in CheckpointMetrics.__annotations__ if record.metrics.get(k) is not None}
    return {
        "id": record.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(record.created_s),
        "fine_tuned_model_checkpoint": names.full(record.job, record.step),
        "fine_tuning_job_id": record.job,
        "step_number": record.step,
        "metrics": cast(CheckpointMetrics, metrics),
        "adapter": names.adapter(record.job),
        "adapter_version": record.version,
    }
