"""Tables and commands for people: they line up, and break at words only."""

from nnunet_flare.tables import command_lines, table


def test_columns_line_up_by_their_sides():
    assert table([["liver", "0.91"], ["a", "10.5"]], header=["organ", "Dice"], align="lr") == [
        "organ  Dice",
        "liver  0.91",
        "a      10.5",
    ]


def test_the_last_column_is_wrapped_under_itself_and_long_words_stay_whole():
    path = "/a/path/of/more/than/thirty/columns/in/all"
    assert table([["first", f"some words and {path} here"], ["b"]], width=40) == [
        "first  some words and",
        f"       {path}",
        "       here",
        "b",
    ]
    assert table([["a", "x " * 100]]) == ["a  " + ("x " * 100).rstrip()]
    assert table([]) == []


def test_a_long_command_can_be_copied_from_a_narrow_terminal():
    command = "nnUNetv2_train 22 3d_fullres_uncertainty_r1 4 -tr nnUNetTrainerFlareST -p nnUNetPlansFlare -device cuda"
    lines = command_lines(command, 60, "    ")
    assert max(map(len, lines)) <= 60 and all(line.endswith(" \\") for line in lines[:-1])
    assert " ".join("\n".join(lines).replace("\\\n", " ").split()) == command
    assert command_lines(command, None, "    ") == ["    " + command]
