"""Files and records to examples and pairs, and the mixer that packs them into lanes.
May import jaxlora's core, config and tokenizers; no jax.
A lane holds one tenant; weights[i] weighs the prediction of token i. The mixer is a pure function of its cursor."""
