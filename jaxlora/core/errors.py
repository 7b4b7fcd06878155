"""The hierarchy of errors.  Every error a caller can act on has a class, an HTTP status and a code.

    JaxLoraError                    500 internal_error
    ├── InvalidRequest              400 invalid_value          a value we can name is wrong
    │   ├── UnsupportedParameter    400 unsupported_parameter  known to the API, not built here
    │   └── ContextLengthExceeded   400 context_length_exceeded
    ├── Unauthorized                401 invalid_api_key        no key, or none that is valid
    ├── Forbidden                   403 insufficient_scope     the key is valid, its role may not do this
    ├── NotFound                    404 not_found
    │   └── AdapterNotFound         404 model_not_found
    ├── AdapterInvalid              400 adapter_invalid        a PEFT folder or an adapter we cannot hold
    │   ├── BaseMismatch            400 base_mismatch          made for another base model
    │   └── AdapterNotFinite        400 adapter_not_finite
    ├── ModelInvalid                400 model_invalid          a checkpoint we cannot read
    ├── ConfigInvalid               400 config_invalid         a TOML file or an option
    │   └── PackageHidden           400 config_invalid         another module stands where one of our packages should
    ├── DataInvalid                 400 invalid_training_file  names line and field
    ├── AlreadyExists               409 already_exists
    ├── StateInvalid                409 invalid_state          no slot, wrong phase
    ├── RateLimited                 429 rate_limit_exceeded    too many requests or tokens in a time; retry later
    ├── QuotaExceeded               429 insufficient_quota     no more files, bytes, adapters or jobs; retrying is of no use
    ├── StorageFailed               500 storage_failed         a stored version is damaged or could not be written
    ├── StorageFull                 507 storage_full           no room on the server's disk
    ├── DeadlineExceeded            504 deadline_exceeded      the request's own time limit, or the server's
    ├── Overloaded                  503 overloaded             retry later
    └── Unavailable                 503 unavailable            the server is stopping or has stopped
        ├── NoReplica               503 starting               a cluster starts the server that would answer; retry later
        ├── StorageAway             503 storage_unavailable    the database or object storage does not answer; retry later
        └── DeviceLost              500 internal_error         the device failed or hung while it answered

A message states what was received, what was expected and what to do.  It never contains another tenant's text.
"""

from __future__ import annotations


class JaxLoraError(Exception):
    """Root of the hierarchy.

    `message` is a sentence, `details` are all mistakes one by one where the message does not say them; `param` names the
    offending field where one exists.
    """

    status: int = 500
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, details: tuple[str, ...] = ()):
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details


class InvalidRequest(JaxLoraError, ValueError):
    """A value in a request is wrong; `param` names it."""

    status, code = 400, "invalid_value"


class UnsupportedParameter(InvalidRequest):
    """The field is part of the API but this server does not support it."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """Prompt plus requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class Unauthorized(JaxLoraError):
    """The request has no key, or an invalid one."""

    status, code = 401, "invalid_api_key"


class Forbidden(JaxLoraError):
    """The key is valid, but its role may not do this."""

    status, code = 403, "insufficient_scope"


class NotFound(JaxLoraError, LookupError):
    """No object with that id exists, or it belongs to another tenant."""

    status, code = 404, "not_found"


class AdapterNotFound(NotFound):
    """No model or adapter of that name exists, or it belongs to another tenant."""

    code = "model_not_found"


class AdapterInvalid(JaxLoraError, ValueError):
    """The adapter cannot be loaded: unsupported feature, wrong tensors, too large a rank."""

    status, code = 400, "adapter_invalid"


class BaseMismatch(AdapterInvalid):
    """The adapter was made for another base model."""

    code = "base_mismatch"


class AdapterNotFinite(AdapterInvalid):
    """A weight of the adapter is NaN or infinite."""

    code = "adapter_not_finite"


class ModelInvalid(JaxLoraError, ValueError):
    """The base checkpoint cannot be read; names the tensor or the field."""

    status, code = 400, "model_invalid"


class ConfigInvalid(JaxLoraError, ValueError):
    """A setting is unknown, missing or impossible; names file and key."""

    status, code = 400, "config_invalid"


class PackageHidden(ConfigInvalid, ImportError):
    """A module that is not ours would be imported by the name of one of our packages; names both."""


class DataInvalid(JaxLoraError, ValueError):
    """A training file has a bad line; names line and field."""

    status, code = 400, "invalid_training_file"


class AlreadyExists(JaxLoraError, ValueError):
    """An object of this name exists."""

    status, code = 409, "already_exists"


class StateInvalid(JaxLoraError, RuntimeError):
    """The object is not in a state that allows this (no free slot, wrong phase)."""

    status, code = 409, "invalid_state"


class RateLimited(JaxLoraError):
    """Too many requests or tokens in a time; the next one is accepted after `retry_after_s`."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float, param: str | None = None):
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class QuotaExceeded(JaxLoraError):
    """The tenant has reached its limit of files, bytes, adapters or jobs: deleting some helps, retrying does not."""

    status, code = 429, "insufficient_quota"


class StorageFull(JaxLoraError, OSError):
    """The server's disk is full."""

    status, code = 507, "storage_full"


class StorageFailed(JaxLoraError):
    """A stored version is damaged, of an unknown format, or could not be written; names it."""

    status, code = 500, "storage_failed"


class DeadlineExceeded(JaxLoraError, TimeoutError):
    """The time limit of the request is over."""

    status, code = 504, "deadline_exceeded"


class Overloaded(JaxLoraError, RuntimeError):
    """The queue is full; retry later."""

    status, code = 503, "overloaded"


class Unavailable(JaxLoraError, RuntimeError):
    """The server is stopping or has stopped; retry when it is running again."""

    status, code = 503, "unavailable"


class NoReplica(Unavailable):
    """No replica of a cluster runs; one is expected after `retry_after_s`."""

    code = "starting"

    def __init__(self, message: str, *, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageAway(Unavailable):
    """The database or object storage does not respond now."""

    code = "storage_unavailable"


class DeviceLost(Unavailable):
    """The device thread failed or hung while it answered this request."""

    status, code = 500, "internal_error"
