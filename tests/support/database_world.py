"""Records to keep in a database."""

from jaxlora.core.lora import AdapterRef
from serve.db.job_spec import JobSpec, LoraChoice, Resolved
from serve.db.models import CheckpointRecord, FileRecord, GradientRecord, JobRecord, KeyRecord, NewEvent


def key_record(id="key-1", tenant="acme", *, created_s=1.0, role="tenant"):
    return KeyRecord(id=id, tenant=tenant, role=role, label="a laptop", digest=f"digest-{id}", created_s=created_s)


def file_record(id="file-1", tenant="acme", *, created_s=1.0, size_bytes=10, expires_s=None, purpose="fine-tune"):
    return FileRecord(
        id=id,
        tenant=tenant,
        filename="Grüße 🌍.jsonl",
        purpose=purpose,
        size_bytes=size_bytes,
        sha256="0" * 64,
        created_s=created_s,
        expires_s=expires_s,
    )


def job_record(id="ftjob-1", tenant="acme", *, created_s=1.0, metadata=None, **changes):
    return JobRecord(
        id=id,
        tenant=tenant,
        adapter="support",
        request=JobSpec(model="org/base", training_file="file-1", betas=(0.9, 0.99), lora=LoraChoice(alpha=2.5)),
        resolved=Resolved(seed=7, start=AdapterRef(tenant, "support", 2)),
        progress={"odd": "\ud800\u0000ü", "none": None, "nested": {"list": [1, 2.5, True]}},
        labels=metadata or {},
        created_s=created_s,
        **changes,
    )


def event(message, *, time_s=2.0):
    return NewEvent(time_s=time_s, level="info", kind="message", message=message, data={"step": 1})


def checkpoint_record(version, *, job="ftjob-1"):
    return CheckpointRecord(
        id=f"ftckpt-{version}", job=job, step=10 * version, version=version, metrics={"train_loss": 0.5}, created_s=3.0
    )


def gradient_record(id="a" * 50, tenant="acme", *, created_s=1.0):
    return GradientRecord(
        id=id,
        tenant=tenant,
        workspace="my adapter",
        adapter="gradient-1",
        base="org/base",
        settings={"rank": 8},
        created_s=created_s,
        updated_s=created_s,
    )
