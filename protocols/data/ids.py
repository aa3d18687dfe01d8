"""Sample ids: derived from the sample's place in the data, so a regenerated sample keeps its id.

63 bits: data epoch (15) | prompt ordinal within the epoch (32) | sample index within the prompt (16).
A prompt's id is the same number without the index. Two reserved values mark rows that are not trained:
epoch `EVALUATION_EPOCH` for evaluation rows, index `BASELINE_INDEX` for a prompt's greedy baseline row.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

INDEX_BITS, ORDINAL_BITS, EPOCH_BITS = 16, 32, 15
BASELINE_INDEX = (1 << INDEX_BITS) - 1
EVALUATION_EPOCH = (1 << EPOCH_BITS) - 1

Purpose = Literal["train", "baseline", "evaluate"]


def prompt_id(epoch: int, ordinal: int) -> int:
    """The id of the prompt at this place in the data. Raises ValueError if a part does not fit its bits."""
    if not (0 <= epoch <= EVALUATION_EPOCH and 0 <= ordinal < 1 << ORDINAL_BITS):
        raise ValueError(
            f"prompt at epoch {epoch}, ordinal {ordinal} does not fit {EPOCH_BITS} and {ORDINAL_BITS} bits"
        )
    return epoch << ORDINAL_BITS | ordinal


def sample_id(prompt: int, index: int) -> int:
    """The id of sample `index` of a prompt. Raises ValueError if the index does not fit."""
    if not 0 <= index <= BASELINE_INDEX:
        raise ValueError(f"sample index {index} does not fit {INDEX_BITS} bits")
    return prompt << INDEX_BITS | index


def prompt_of(sample: int) -> int:
    """The prompt a sample belongs to."""
    return sample >> INDEX_BITS


def prompts_of(samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The prompt of each sample, int64 [N]."""
    return samples >> INDEX_BITS


def index_of(sample: int) -> int:
    """A sample's index within its prompt."""
    return sample & BASELINE_INDEX


def purpose_of(sample: int) -> Purpose:
    """The purpose of a row; admission and the ledger count only "train" rows."""
    if sample >> (INDEX_BITS + ORDINAL_BITS) == EVALUATION_EPOCH:
        return "evaluate"
    return "baseline" if index_of(sample) == BASELINE_INDEX else "train"


def place_of(prompt: int) -> tuple[int, int]:
    """(epoch, ordinal) of a prompt."""
    return prompt >> ORDINAL_BITS, prompt & ((1 << ORDINAL_BITS) - 1)


def sampling_seed(run_seed: int, sample: int, retry: int = 0, token: int = 0) -> int:
    """The seed for generating a sample, 63 bits.

    `retry` counts retries of the failure policy, never re-execution after a crash, so a resumed run generates the same
    tokens. `token` is the first token of a continuation after the weights changed.
    """
    text = f"{run_seed}/{sample}/{retry}/{token}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
