"""The algorithms by name: one file and one line here each."""

from __future__ import annotations

from asyncflow.dataflow.algorithms.cispo import cispo
from asyncflow.dataflow.algorithms.dapo import dapo
from asyncflow.dataflow.algorithms.dr_grpo import dr_grpo
from asyncflow.dataflow.algorithms.grpo import grpo
from asyncflow.dataflow.algorithms.gspo import gspo
from asyncflow.dataflow.algorithms.ppo import ppo
from asyncflow.dataflow.algorithms.reinforce_pp import reinforce_pp
from asyncflow.dataflow.algorithms.reinforce_pp_baseline import reinforce_pp_baseline
from asyncflow.dataflow.algorithms.remax import remax
from asyncflow.dataflow.algorithms.rloo import rloo
from asyncflow.dataflow.algorithms.safe_rlhf import safe_rlhf
from asyncflow.dataflow.trace import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "ppo": ppo,
    "remax": remax,
    "safe_rlhf": safe_rlhf,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
}
