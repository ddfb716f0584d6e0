"""The cycle estimate: its parts on hand-made code, and its totals within what was asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import triton
from _pytest.mark.structures import ParameterSet

from bench.ptx.listing import Instruction, parse_ptx, parse_sass
from bench.ptx.sass_issue import LATENCY, each_round, straight
from bench.studies.cycles import TARGETS_US, estimate_plan, target_us
from eplb_triton import POLICIES
from tests.sizes import full_unless


def _issued(text: str, *, stall: int = 1, writes: int = 7, waits: int = 0) -> Instruction:
    return Instruction(text, (), stall | writes << 5 | 7 << 8 | waits << 11)


def test_stalls_add_up() -> None:
    assert straight([_issued("IADD3 R0, R1, R2", stall=4), _issued("MOV R3, R0", stall=2)]) == 6


def test_a_scoreboard_is_waited_for() -> None:
    step = [_issued("REDUX.MIN.S32 UR4, R0", writes=0), _issued("MOV R0, UR4", stall=5, waits=1)]
    assert straight(step) == LATENCY["REDUX"] + 5
    assert each_round(step) == LATENCY["REDUX"] + 5


def test_results_that_nobody_waits_for_overlap() -> None:
    loads = [_issued("LDG.E R0, [R2]", writes=board) for board in range(4)]
    assert straight(loads) == LATENCY["LDG"] + 3
    assert each_round(loads) == 4


PTX = """.visible .entry kernel()
{
	.file	1 "/source/pack.py"
$L__BB0_1:
	.loc	1 10 5
	add.s32 	%r1, %r1, 1;
$L__BB0_2:
	.loc	1 12 5
	add.s32 	%r2, %r2, 1;
	@%p1 bra 	$L__BB0_2;
	@%p2 bra 	$L__BB0_1;
	ret;
}
"""


def test_loops_and_their_lines() -> None:
    listing = parse_ptx(PTX)
    assert [(loop.head, loop.body) for loop in listing.loops] == [(0, (0, 1, 2, 3)), (1, (1, 2))]
    assert [place.line for place in listing.instructions[1].chain] == [12]
    assert listing.instructions[2].opcode == "bra"
    assert listing.instructions[2].predicated


SASS = """
	//## File "/source/arith.py", line 55 inlined at "/source/pack.py", line 12
	//## File "/source/pack.py", line 12
        /*0010*/                   REDUX.MIN.S32 UR4, R26 ;        /* 0x000000001a0d73c4 */
                                                                   /* 0x000e220000010200 */
.L_x_1:
        /*0020*/              @!P0 BRA `(.L_x_1) ;                 /* 0x0000001c1e1e7248 */
                                                                   /* 0x001fe20003fe0100 */
"""


def test_sass_with_places_and_scheduling() -> None:
    listing = parse_sass(SASS)
    reduction, jump = listing.instructions
    places = [(place.path, place.line) for place in reduction.chain]
    assert places == [("/source/arith.py", 55), ("/source/pack.py", 12)]
    assert (reduction.control >> 5 & 7, jump.control >> 11 & 63) == (0, 1)  # writes scoreboard 0, waits for it
    assert [loop.body for loop in listing.loops] == [(1,)]


def _plans() -> Iterator[ParameterSet]:
    for case in TARGETS_US:
        for policy in (policy for policy in POLICIES if target_us(case, policy)):
            chosen = (case, policy) == ("v3-hierarchical", "deepseek")
            marks = full_unless(chosen) if case.startswith("v3") else pytest.mark.slow
            yield pytest.param(case, policy, marks=marks)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize(("case", "policy"), list(_plans()))
def test_estimate_is_within_what_was_asked(case: str, policy: str) -> None:
    found = estimate_plan((case, policy))
    assert 1 < float(str(found["estimated_us"])) <= float(str(found["target_us"]))
