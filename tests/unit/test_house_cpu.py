"""The line at the top of a report says which kind of CPU ran the tests."""

from __future__ import annotations

import pytest
from cpu_kind import cpu_kind, this_cpu

X86 = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: 17
model name	: AMD EPYC 9R14
flags		: fpu sse2 smep avx2 fma avx512f avx512_bf16 xsave

processor	: 1
vendor_id	: other
"""
ARM = """processor	: 0
Features	: fp asimd crc32 asimdhp sve bf16 i8mm
CPU implementer	: 0x41
CPU architecture: 8
CPU part	: 0xd40
"""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (X86, "AuthenticAMD, family 25, model 17, AMD EPYC 9R14; avx2 fma avx512f avx512_bf16"),
        (ARM, "implementer 0x41, architecture 8, part 0xd40; asimd asimdhp sve bf16 i8mm"),
        ("", "implementer unknown; no vector flags"),
    ],
    ids=["x86", "arm", "nothing"],
)
def test_a_report_says_the_kind_of_cpu(text, line):
    assert cpu_kind(text) == line


def test_this_cpu_is_told_in_one_line(pytestconfig):
    assert len(this_cpu().splitlines()) == 1
    told = pytestconfig.pluginmanager.hook.pytest_report_header(config=pytestconfig, start_path=pytestconfig.rootpath)
    assert any(str(line).startswith(f"cpu: {this_cpu()}") for line in told)
