"""The `jaxlora` command: each sub-command imports what it runs when it runs.
Top layer: may import anything; --help loads no jax.
Exit codes: 0 done, 1 the device is lost, 2 an error the user can act on (one line), 130 interrupted."""
