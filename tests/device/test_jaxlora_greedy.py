"""The demo model through the real engine: all 20 prompts at once, 64 tokens each, are those of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from serve_world import Answer, ask
from small_world import smollm2_prompts

pytest_plugins = ["smollm2_fixtures"]
# Our logits are within 2e-4 of those of transformers (test_jaxlora_model.py): a smaller margin may fall to either side,
# and what follows it is another text.
TIE = 1e-3


def comparable(margin: np.ndarray) -> int:
    """How many tokens have to agree: all before the first tie."""
    ties = np.flatnonzero(margin < TIE)
    return int(ties[0]) if len(ties) else len(margin)


@pytest.mark.slow
def test_sixty_four_greedy_tokens_are_those_of_transformers(smol_engine):
    prompts, engine = smollm2_prompts(), smol_engine
    answers = [Answer() for _ in prompts]
    for i, p in enumerate(prompts):
        engine.submit(ask(str(i), prompt=p.ids_T.tolist(), max_tokens=len(p.greedy)))
    largest, steps = 0, 0
    while engine.has_work:
        for delta in engine.step():
            answers[int(delta.request_id)].take(delta)
        largest, steps = max(largest, len(engine.scheduler.running)), steps + 1
    assert largest == len(prompts) == 20  # nobody waited: one prefill and one decode program a step, for all
    assert steps < 64 + 4
    counts = [comparable(p.margin) for p in prompts]
    assert sum(c == 64 for c in counts) >= 19
    for i, (p, count) in enumerate(zip(prompts, counts, strict=True)):
        assert len(answers[i].tokens) == 64
        assert answers[i].tokens[:count] == p.greedy[:count].tolist(), p.text
    assert all(a.text for a in answers)
