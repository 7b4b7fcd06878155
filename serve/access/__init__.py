"""Who asks, and what it may: callers, API keys, rate limits, quotas of adapters.
May import db, engine's plain types and jaxlora's core and config; no jax.
Without keys everyone is the admin `local`; after the first key nobody comes in without one."""
