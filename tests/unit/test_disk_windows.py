"""Windows of a cluster map, made of what qemu-img prints."""

from __future__ import annotations

import json

import pytest

from agent.disk.windows import (
    FIRST_WINDOW_BYTES,
    MIB,
    SERVED,
    ZERO,
    Piece,
    Window,
    next_window_bytes,
    window_of,
)


def printed(*extents: dict[str, object]) -> bytes:
    """As qemu-img prints it: one extent a line."""
    return ("[" + ",\n".join(json.dumps(extent) for extent in extents) + "]\n").encode()


def data(start: int, length: int, offset: int, depth: int = 0) -> dict[str, object]:
    return {"start": start, "length": length, "depth": depth, "zero": False, "data": True, "offset": offset}


def zero(start: int, length: int) -> dict[str, object]:
    return {"start": start, "length": length, "depth": 0, "present": False, "zero": True, "data": False}


TEXT = printed(data(100, 50, 7000), zero(150, 50), data(200, 100, 9000, depth=1))


def test_pieces_are_clipped_and_their_places_move_along() -> None:
    window = window_of(TEXT, 100, 300, complete=True, files=2)
    assert list(window.pieces(120, 260)) == [
        Piece(120, 30, 7020, 0),
        Piece(150, 50, ZERO, 0),
        Piece(200, 60, 9000, 1),
    ]
    assert list(window.pieces(299, 1000)) == [Piece(299, 1, 9099, 1)]
    assert window.data_bytes == 150


def test_what_lies_deeper_than_our_files_or_has_no_place_is_left_to_qemu() -> None:
    assert window_of(TEXT, 100, 300, complete=True, files=1).places.tolist() == [7000, ZERO, SERVED]
    nowhere: dict[str, object] = {"start": 0, "length": 10, "depth": 0, "zero": False, "data": True}
    neither: dict[str, object] = {"start": 10, "length": 10, "depth": 0, "zero": False, "data": False}
    named = data(20, 10, 5) | {"compressed": True}
    text = printed(nowhere, neither, named)
    assert window_of(text, 0, 30, complete=True, files=1).places.tolist() == [SERVED, SERVED, SERVED]


def test_preallocated_zeroes_are_zeroes() -> None:
    text = printed(data(0, 10, 70) | {"zero": True})
    assert window_of(text, 0, 10, complete=True, files=1).places.tolist() == [ZERO]


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_text_that_was_cut_ends_with_its_last_whole_line(cut: int) -> None:
    window = window_of(TEXT.rstrip()[: -cut - 1], 100, 300, complete=False, files=2)
    assert window.end == 200
    assert list(window.pieces(190, 300)) == [Piece(190, 10, ZERO, 0)]


@pytest.mark.parametrize(
    "text",
    [
        printed(),
        printed(zero(0, 100)),
        printed(zero(100, 50), zero(160, 140)),
        printed(zero(100, 0), zero(100, 200)),
        printed(zero(100, 100)),
        printed(zero(100, 300)),
        b"[{ cut",
        b"",
    ],
)
def test_a_map_with_gaps_or_of_another_place_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"gap|told about|Expecting"):
        window_of(text, 100, 300, complete=True, files=1)


def one(length: int, *, is_data: bool) -> Window:
    return window_of(printed(data(0, length, 0) if is_data else zero(0, length)), 0, length, complete=True, files=1)


def test_windows_grow_over_what_is_empty_and_stay_bounded_over_data() -> None:
    tib = 1024**4
    asked, at, questions = FIRST_WINDOW_BYTES, 0, 0
    while at < 8 * tib:
        at += asked
        asked = next_window_bytes(asked, one(asked, is_data=False), complete=True)
        questions += 1
    assert questions <= 6
    assert next_window_bytes(16 * 1024 * MIB, one(16 * 1024 * MIB, is_data=True), complete=True) == 16 * 1024 * MIB
    assert next_window_bytes(tib, one(tib, is_data=True), complete=True) == tib // 2


def test_after_a_cut_the_next_question_is_no_larger_than_what_fitted() -> None:
    assert next_window_bytes(1024 * MIB, one(300 * MIB, is_data=True), complete=False) == 300 * MIB
    assert next_window_bytes(1024 * MIB, one(1 * MIB, is_data=True), complete=False) == 64 * MIB
