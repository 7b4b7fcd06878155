"""What all wires share: error shapes, strict bodies, events, pages, uploads, idempotency, draining.
May import access and db; knows no wire; no jax.
An unknown or unbuilt field is refused by name (Strict, Only). An error has the shape of the wire that was asked."""
