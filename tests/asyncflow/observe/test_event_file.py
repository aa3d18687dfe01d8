"""The file of a run's events survives what its writer does not, and is read from any event on."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from asyncflow.observe.event_file import EVENTS, EventFile, Recorded, end_of, read_events, read_waits
from protocols.control.events import Event, StateChanged, WaitsChanged

PAUSED, RUNNING = StateChanged(state="paused"), StateChanged(state="running")


def events_from(folder: Path, cursor: int = 0, most_bytes: int = 1 << 18) -> list[Event]:
    return [msgspec.json.decode(line.text, type=Recorded).event for line in read_events(folder, cursor, most_bytes)]


def test_a_reader_goes_on_after_each_event(tmp_path: Path):
    file = EventFile(tmp_path)
    ends = [file.append(PAUSED), file.append(RUNNING)]
    assert [line.cursor for line in read_events(tmp_path, 0)] == ends
    assert events_from(tmp_path, ends[0]) == [RUNNING]
    assert read_events(tmp_path, ends[1]) == []
    assert end_of(tmp_path) == ends[1]
    file.path.write_bytes(file.path.read_bytes() + b'{"at"')
    assert end_of(tmp_path) == ends[1], "a line that is not whole is no event"


def test_a_reader_takes_a_part_at_a_time_but_an_event_at_least(tmp_path: Path):
    file = EventFile(tmp_path)
    for event in (PAUSED, RUNNING):
        file.append(event)
    assert events_from(tmp_path, most_bytes=8) == [PAUSED]


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path):
    EventFile(tmp_path).append(PAUSED)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"at": 1.0, "ev')
    assert events_from(tmp_path) == [PAUSED]


def test_a_line_that_a_power_cut_left_is_removed_by_the_next_writer(tmp_path: Path):
    EventFile(tmp_path).append(PAUSED)
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"at": 1.0, "ev')
    EventFile(tmp_path).append(RUNNING)
    assert events_from(tmp_path) == [PAUSED, RUNNING]


@pytest.mark.parametrize("cursor", [-1, 1, 10_000])
def test_a_cursor_that_no_event_ends_at_is_refused(tmp_path: Path, cursor: int):
    EventFile(tmp_path).append(PAUSED)
    with pytest.raises(ValueError, match=f"cursor {cursor} is none of this run"):
        read_events(tmp_path, cursor)


def test_a_run_that_has_not_begun_has_no_events(tmp_path: Path):
    assert (read_events(tmp_path, 0), end_of(tmp_path), read_waits(tmp_path)) == ([], 0, b"")
    with pytest.raises(ValueError, match="no events yet"):
        read_events(tmp_path, 5)


def test_waits_are_replaced_and_gone_with_their_run(tmp_path: Path):
    file = EventFile(tmp_path)
    for prompts in range(2):
        file.show_waits(WaitsChanged(waits={}, live_prompts=prompts, step_progress=0.0))
    shown = msgspec.json.decode(read_waits(tmp_path), type=Recorded).event
    assert isinstance(shown, WaitsChanged)
    assert shown.live_prompts == 1
    file.close()
    assert read_waits(tmp_path) == b""
    assert end_of(tmp_path) == 0
