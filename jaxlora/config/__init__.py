"""Settings as frozen dataclasses, each checked once, and the strict TOML loader.
May import core; no jax.
The fields are the only places of defaults; nothing that a checkpoint decides has one."""
