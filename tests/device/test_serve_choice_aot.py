"""What programs that sample read and hold, compiled for an H100 and a TPU: no loop, no branch, no copy of the logits."""

from __future__ import annotations

import pytest
from aot_world import chips
from choice_shapes import alternatives, choice, readers
from cuda_world import Launches, h100s

from jaxlora.model.mesh import make_mesh
from serve.engine.sampling import Work

READS = {Work.GREEDY: 1, Work.DRAWN: 3, Work.FILTERED: 8}
HELD = 4 * 10**6  # bytes of temporaries at most; the logits have 33 million


@pytest.mark.aot_cuda
def test_on_an_h100_each_choice_is_one_graph_that_reads_the_logits_a_few_times(tmp_path):
    with h100s(1) as devices:
        mesh = make_mesh(devices=devices)
        for work, reads in READS.items():
            folder = tmp_path / work.name
            compiled = choice(mesh, work).compile(Launches.dump_to(folder))
            assert readers(compiled) == {"fusion": reads}, work
            assert Launches.read(folder).entries == {"CommandBuffer": 1}, work
            assert compiled.memory_analysis().temp_size_in_bytes < HELD
        compiled = alternatives(mesh).compile(Launches.dump_to(tmp_path / "alternatives"))
        assert readers(compiled) == {"fusion": 2}
        assert Launches.read(tmp_path / "alternatives").entries == {"CommandBuffer": 1}


@pytest.mark.aot
def test_on_a_tpu_a_choice_holds_no_logits_beside_the_chips_own():
    """It takes the logits onto the chip once, and blocks of tokens are told apart in the layout that they have there."""
    with chips("v5e") as devices:
        compiled = choice(make_mesh(devices=devices[:1]), Work.FILTERED).compile()
    assert readers(compiled) == {"fusion": READS[Work.FILTERED]}
    assert compiled.memory_analysis().temp_size_in_bytes < HELD
