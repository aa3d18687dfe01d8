"""RowReader: the rows of one call, decoded from their frames; unreadable rows are listed with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncflow.services.channels.endpoint import Frame
from protocols.control.delivery import Damaged, RankCall, Reading
from protocols.data import codec
from protocols.data.columns import Batch, concat, take
from protocols.data.messages import SCHEMAS
from protocols.layout.row_plan import Segment


class RowReader:
    """The rows of one call. `inputs` hold the readable rows in call order; `damaged` and `lost` name the others."""

    def __init__(self, call: RankCall, frames: Sequence[Frame | None]) -> None:
        self.read_bytes: list[int] = []
        self.refused: dict[int, str] = {}  # frame -> why
        self.damaged: list[Damaged] = []
        self.lost: list[int] = []
        count = sum(map(len, call.readings[0].segments)) if call.readings else 0
        readable = np.ones(count, bool)
        ids = np.array(call.sample_ids, np.int64)
        read = [self._read(position, reading, ids, frames, readable) for position, reading in enumerate(call.readings)]
        self.rows = int(readable.sum())
        self.inputs: list[Batch] = []
        if self.rows:
            for batch, there in read:
                assert batch is not None
                rows = np.flatnonzero(readable[there])
                self.inputs.append(batch if len(rows) == len(batch) else take(batch, rows))

    def _read(
        self, input: int, reading: Reading, ids: np.ndarray, frames: Sequence[Frame | None], readable: np.ndarray
    ) -> tuple[Batch | None, np.ndarray]:
        """One input's rows that could be read, and their positions in the call; marks the others."""
        schemas = {reading.schema: SCHEMAS[reading.schema]}
        batches: list[Batch] = []
        there: list[np.ndarray] = []
        opened: dict[int, codec.Frame] = {}
        first = 0
        for source, segments in _runs(reading.segments):
            rows = np.concatenate([np.arange(s.start, s.stop) for s in segments])
            span = np.arange(first, first + len(rows))
            first += len(rows)
            frame = frames[source]
            if frame is None:
                self.lost += span[readable[span]].tolist()
                readable[span] = False
                continue
            try:
                if source not in opened:
                    opened[source] = codec.open_frame(frame, schemas=schemas)
                batch = opened[source].read(rows)
                if not np.array_equal(batch.sample_ids, ids[span]):
                    raise codec.BadFrame("it holds other rows than its shard names")
                batches.append(batch)
                there.append(span)
            except (codec.BadFrame, IndexError) as error:  # IndexError: it has fewer rows than its shard names
                self.refused[source] = str(error)
                cause = f"its frame was refused: {error}"
                self.damaged.append(Damaged(input, span[readable[span]].tolist(), cause))
                readable[span] = False
        self.read_bytes.append(sum(frame.bytes_read for frame in opened.values()))
        empty = np.empty(0, np.int64)
        return (concat(batches), np.concatenate(there)) if batches else (None, empty)


def _runs(segments: list[Segment]) -> list[tuple[int, list[Segment]]]:
    """Group neighbouring segments of the same source."""
    runs: list[tuple[int, list[Segment]]] = []
    for segment in segments:
        if runs and runs[-1][0] == segment.source:
            runs[-1][1].append(segment)
        else:
            runs.append((segment.source, [segment]))
    return runs
