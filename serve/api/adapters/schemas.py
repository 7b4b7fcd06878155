"""The bodies and queries of the adapters' wire: strict JSON types, no unknown field."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxlora.peft.folder import ModuleReport
from serve.api.document import Closed, form_body
from serve.http.pagination import Listed, PageQuery
from serve.http.schema import Only, Strict, Text

UPLOAD_FIELDS = ("name", "allow_base_mismatch")
UPLOAD_FILES = ("file",)
UPLOAD_BODY = form_body(
    {
        "name": {"type": "string", "description": "NAME; of an admin also TENANT/NAME"},
        "allow_base_mismatch": {"type": "string", "enum": ["true", "false"]},
        "file": {
            "description": "a zip, tar or tar.gz of a PEFT folder, or its files one by one",
            "type": "array",
            "minItems": 1,
            "maxItems": 8,
            "items": {"type": "string", "format": "binary"},
        },
    },
    required=["name", "file"],
)


class LoadBody(Strict):
    """vLLM's body of /v1/load_lora_adapter, and one field of ours."""

    lora_name: Text
    lora_path: Text
    load_inplace: bool = False
    is_3d_lora_weight: Annotated[bool | None, Only((False,))] = None
    allow_base_mismatch: bool = False  # takes a file that records another base, if names and shapes fit


class UnloadBody(Strict):
    """vLLM's body of /v1/unload_lora_adapter."""

    lora_name: Text
    lora_int_id: Annotated[int | None, Only((), "adapters have names here")] = None


class VersionsQuery(PageQuery):
    """Query of the list of an adapter's versions."""

    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class ListQuery(VersionsQuery):
    """Query of the list of adapters."""

    prefix: Text = ""


class DownloadQuery(BaseModel):
    """Query of a download; text, so not strict."""

    model_config = ConfigDict(extra="forbid")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


# ---- answers


class AdapterObject(Closed):
    """An adapter, or one version of it."""

    id: str
    object: Literal["adapter"]
    created: int
    tenant: str
    name: str
    version: int
    rank: int
    base: str
    state: Literal["device", "host", "disk"]
    pinned: bool


class ImportedObject(AdapterObject):
    """A version that came in, with what was read."""

    parameters: int
    modules: list[ModuleReport]
    base_verified: bool
    ignored: list[str]
    left_out: list[str]
    notes: list[str]


AdapterList = Listed[AdapterObject]


class DeletedAdapter(Closed):
    """What is gone."""

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


class DeletedModel(Closed):
    """The same, as OpenAI's clients read it."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]
