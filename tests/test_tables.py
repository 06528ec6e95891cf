"""Tables for people."""

import pytest

from jaxprompt.tables import markdown_table, table


def test_table():
    rows = [("bare backbone", 52.08, 1), ["prompt", 81.25, 20480], ("majority", 50.9, None)]
    assert table(rows, ("", "accuracy", "bytes")).splitlines() == [
        "               accuracy   bytes",
        "-------------  --------  ------",
        "bare backbone      52.1       1",
        "prompt             81.2  20,480",
        "majority           50.9    None",
    ]
    assert table([], ["a", "bc"]) == "a  bc\n-  --"
    with pytest.raises(ValueError, match=r"needs 2 cells, like the header \['a', 'b'\]"):
        table([["x"]], ["a", "b"])


def test_the_same_cells_in_markdown():
    rows = [["soft", 71.25, 1024], ["a longer name", "", 7]]
    assert markdown_table(rows, ["", "accuracy", "bytes"]).splitlines() == [
        "|  | accuracy | bytes |",
        "| --- | --- | --- |",
        "| soft | 71.2 | 1,024 |",
        "| a longer name |  | 7 |",
    ]
