import subprocess
import sys

import pytest

RESIDENT = """
import resource, sys
from zsq.allocator import keep_freed_memory

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

told = sys.argv[1] == "keep" and keep_freed_memory()
before = resident()
block = bytearray(b"x" * 100_000_000)
del block
print(told, (resident() - before) // 1_000_000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_stays_with_the_process_that_asked_for_it():
    def kept(word: str) -> tuple[str, int]:
        found = subprocess.run([sys.executable, "-c", RESIDENT, word], capture_output=True, text=True, check=True)
        told, megabytes = found.stdout.split()
        return told, int(megabytes)

    assert kept("return") == ("False", 0)
    told, megabytes = kept("keep")
    assert megabytes >= 100 if told == "True" else megabytes == 0
