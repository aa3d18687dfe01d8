"""The drawings, table and examples of protocols/README.md are those of the code."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

from protocols.data.columns import columns_of
from protocols.data.messages import SCHEMAS
from protocols.layout.draw import draw, drawings
from protocols.layout.topology import GenerationGrouping, Topology
from protocols.layout.transfer import protocols, register

# Read before the page's examples register others.
IN_THE_REGISTRY = {name for name in protocols() if not name.startswith("test:")}
PAGE = (Path(__file__).parents[2] / "protocols" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The page's fenced blocks in a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_drawings_on_the_page_are_those_that_the_code_draws():
    """If this fails, `python -m protocols.layout.draw` prints the drawings for the page."""
    assert blocks("text") == list(drawings().values())


def test_each_drawing_stands_under_its_name():
    for name, drawing in drawings().items():
        _, _, section = PAGE.partition(f"### {name}\n")
        assert drawing in section.partition("###")[0]


def test_every_built_in_protocol_is_drawn():
    assert drawings().keys() == IN_THE_REGISTRY


def test_the_examples_on_the_page_give_the_output_shown():
    example = doctest.DocTestParser().get_doctest("\n\n".join(blocks("python")), {}, "README.md", None, None)
    output: list[str] = []
    outcome = doctest.DocTestRunner(verbose=False).run(example, out=output.append)
    assert outcome.attempted > 0
    assert not outcome.failed, "".join(output)


def test_the_messages_on_the_page_have_the_columns_of_the_code():
    table = dict(re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", PAGE, re.MULTILINE))
    declared = {
        kind.__name__: ", ".join(spec.name for spec in columns_of(kind) if spec.name != "sample_ids")
        for kind in SCHEMAS.values()
    }
    assert table == declared


# --- the contents of a drawing


def test_a_rank_that_reads_a_row_has_its_number_in_that_column():
    lines = draw("DP_PROTO", 12, Topology(dp=2)).splitlines()
    assert lines[2] == "0     0 0 0   0  1  2  3  4  5  .  .  .  .  .  .  #1"
    assert lines[3] == "1     0 0 1   .  .  .  .  .  .  6  7  8  9 10 11  #2"


def test_rows_that_are_not_in_order_are_drawn_in_the_order_of_the_plan():
    def backwards(rows: int, topology: Topology, **_: object) -> list[np.ndarray]:
        return [np.arange(rows)[::-1] for _ in range(topology.world_size)]

    register("test:backwards", backwards, lambda topology, **_: [1])
    lines = draw("test:backwards", 3, Topology(dp=2)).splitlines()
    assert lines[3] == "1     0 0 1  2 1 0  #1"
    assert lines[-1] == "result: rows 2 1 0"


def test_coordinates_of_generation_stand_beside_those_of_training():
    topology = Topology(1, 4, 1)
    drawing = draw("3D_ALL_MICRO_DP", 4, topology, generation=GenerationGrouping(topology, 1, 2))
    assert drawing.splitlines() == [
        "3D_ALL_MICRO_DP: 4 rows on 1-4-1, generating 1-2 (hybridflow)",
        "rank  p t d  p_g t_g m  reads    collected",
        "0     0 0 0  0   0   0  0 1 . .  #1",
        "1     0 1 0  0   0   1  . . 2 3  #2",
        "2     0 2 0  0   1   0  0 1 . .",
        "3     0 3 0  0   1   1  . . 2 3",
        "result: rows 0 1 2 3",
    ]


def test_nothing_to_read_and_nothing_collected_can_be_drawn():
    register("test:nobody", lambda rows, topology, **_: [np.arange(rows)], lambda topology, **_: [])
    assert draw("test:nobody", 0, Topology()).splitlines()[-1] == "result: nothing"


def test_a_protocol_that_is_not_there_can_not_be_drawn():
    with pytest.raises(LookupError, match="no transfer protocol '5D_PROTO'"):
        draw("5D_PROTO", 1, Topology())
