"""A client starts fast, and without what only runs need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = "{'torch', 'ray', 'vllm', 'transformers', 'numpy', 'tomli_w', 'prometheus_client'}"
PROGRAM = f"""
import sys, time
import asyncflow.client, asyncflow
from protocols.control.events import StepCommitted
asyncflow.connect("http://127.0.0.1:1")
print(time.process_time(), *({HEAVY} & sys.modules.keys()))
"""


def test_a_client_imports_nothing_heavy_and_takes_less_than_a_third_of_a_second():
    program = [sys.executable, "-c", PROGRAM]
    words = subprocess.run(program, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert words[1:] == []
    assert float(words[0]) < 0.3, "seconds of CPU"
