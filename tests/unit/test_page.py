# SPDX-License-Identifier: Apache-2.0
"""The status page: made, looked at by somebody else, damaged; its words, its text and its ledger do not overlap."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmloop.common.page import (
    LEDGER_AT,
    LEDGER_SLOT_WORDS,
    LEDGER_SLOTS,
    MAGIC,
    PAGE_BYTES,
    Page,
    PageDamaged,
    Word,
    float_to_word,
    word_to_float,
)

TASK_WORDS = range(16, 24)
REASON_WORDS = range(24, 32)
ALL_ONES = (1 << 64) - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "page"


def test_a_new_page_is_zero_but_for_its_magic(path: Path) -> None:
    with Page(path, writable=True) as page:
        assert page.words[Word.MAGIC] == MAGIC
        assert not any(page.words[1:])
    assert path.stat().st_size == PAGE_BYTES
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes()[:8] == b"VMLPAGE1"


def test_a_looker_sees_what_the_worker_writes_while_both_have_it_open(path: Path) -> None:
    with Page(path, writable=True) as page, Page(path, writable=False) as looker:
        page.words[Word.EPOCH] = 7
        page.busy("qmp query-status")
        assert looker.words[Word.EPOCH] == 7
        assert looker.words[Word.WAKEUPS] == 1
        assert looker.task() == "qmp query-status"


def test_a_looker_cannot_write(path: Path) -> None:
    Page(path, writable=True).close()
    with Page(path, writable=False) as looker, pytest.raises(TypeError):
        looker.words[Word.EPOCH] = 1


def test_the_next_worker_finds_everything(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.words[Word.QMP_ID] = 99
        page.slot(15)[15] = 5
    with Page(path, writable=True) as again:
        assert again.words[Word.QMP_ID] == 99
        assert again.slot(15)[15] == 5


def test_a_looker_makes_no_page(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Page(path, writable=False)
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"x",
        bytes(PAGE_BYTES),
        b"VMLPAGE1",
        b"VMLPAGE2".ljust(PAGE_BYTES, b"\0"),
        b"VMLPAGE1".ljust(PAGE_BYTES + 1, b"\0"),
    ],
    ids=["short", "zeros", "torn", "other version", "long"],
)
@pytest.mark.parametrize("writable", [True, False])
def test_a_damaged_or_foreign_file_is_named_and_left_alone(path: Path, content: bytes, writable: bool) -> None:
    path.write_bytes(content)
    with pytest.raises(PageDamaged, match="page"):
        Page(path, writable=writable)
    assert path.read_bytes() == content


def test_an_empty_file_is_a_new_page_for_a_worker_and_damaged_for_a_looker(path: Path) -> None:
    path.touch()
    with pytest.raises(PageDamaged):
        Page(path, writable=False)
    Page(path, writable=True).close()
    Page(path, writable=False).close()


def test_no_descriptor_stays_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    Page(path, writable=True).close()
    path.write_bytes(b"torn")
    for writable in (True, False):
        with pytest.raises(PageDamaged):
            Page(path, writable=writable)
    assert len(os.listdir("/proc/self/fd")) == before


# -- busy and idle --------------------------------------------------------------------------------------------------------


def test_a_sleeping_loop_is_not_blocked(path: Path) -> None:
    with Page(path, writable=True) as page:
        assert page.blocked_seconds() == 0.0
        page.busy("x")
        page.idle()
        assert page.blocked_seconds() == 0.0
        assert page.task() == "x"  # what it did last stays to be read


def test_a_busy_loop_is_blocked_since_it_woke(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.words[Word.BUSY_SINCE] = time.monotonic_ns() - 5_000_000_000
        assert 5.0 <= page.blocked_seconds() < 60.0
        page.busy()
        assert 0.0 <= page.blocked_seconds() < 4.0


def test_a_time_in_the_future_is_no_negative_figure(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.words[Word.BUSY_SINCE] = time.monotonic_ns() + 60_000_000_000
        assert page.blocked_seconds() == 0.0


def test_wakeups_count_and_wrap(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.words[Word.WAKEUPS] = ALL_ONES
        page.busy()
        assert page.words[Word.WAKEUPS] == 0
        page.busy()
        assert page.words[Word.WAKEUPS] == 1


def test_a_shorter_task_leaves_nothing_of_the_longer_one(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.busy("a long name of a task")
        page.busy("short")
        assert page.task() == "short"
        page.busy()
        assert page.task() == "short"


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=100))
def test_texts_of_any_length_stay_in_their_places(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with Page(tmp_path_factory.mktemp("p") / "page", writable=True) as page:
        page.words[REASON_WORDS.stop] = ALL_ONES
        page.busy(text)
        assert page.state_reason() == ""
        page.put_state(3, text, 17)
        for read in (page.task(), page.state_reason()):
            if len(text.encode()) < 64:
                assert read == text
            else:  # cut at 63 bytes, perhaps within a character
                assert text.startswith(read.removesuffix("\ufffd"))
                assert len(read.removesuffix("\ufffd").encode()) >= 60
        assert page.words[Word.STATE] == 3
        assert page.words[REASON_WORDS.stop] == ALL_ONES
        page.busy("short")
        assert page.task() == "short"


def test_a_text_that_is_no_utf8_is_written_all_the_same(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.put_state(1, "from \udcff", 17)
        assert page.state_reason() == "from ?"


def test_a_state_is_put_with_its_time(path: Path) -> None:
    with Page(path, writable=True) as page:
        page.put_state(2, "stop", 17)
        assert page.words[Word.SINCE] == 17
    with Page(path, writable=False) as looker:
        assert (looker.words[Word.STATE], looker.state_reason()) == (2, "stop")


# -- the layout -----------------------------------------------------------------------------------------------------------


def test_words_text_and_ledger_slots_do_not_overlap(path: Path) -> None:
    with Page(path, writable=True) as page:
        owners: dict[int, str] = {int(word): word.name for word in Word}
        assert len(owners) == len(Word)
        for index in (*TASK_WORDS, *REASON_WORDS):
            assert index not in owners
            owners[index] = "text"
        for number in range(LEDGER_SLOTS):
            slot = page.slot(number)
            assert len(slot) == LEDGER_SLOT_WORDS
            before = list(page.words)
            for index in range(LEDGER_SLOT_WORDS):
                slot[index] = ALL_ONES - number
            for index, (old, new) in enumerate(zip(before, page.words, strict=True)):
                if old != new:
                    assert index not in owners, f"slot {number} overlaps {owners[index]}"
                    owners[index] = f"slot {number}"
            slot.release()
        assert sum(owner.startswith("slot") for owner in owners.values()) == LEDGER_SLOTS * LEDGER_SLOT_WORDS
        assert min(index for index, owner in owners.items() if owner == "slot 0") == LEDGER_AT
        assert max(owners) < PAGE_BYTES // 8


@given(st.floats(allow_nan=False))
def test_a_float_fits_a_word(value: float) -> None:
    word = float_to_word(value)
    assert 0 <= word <= ALL_ONES
    assert word_to_float(word) == value


# -- no room ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs without a free block."""
    place = tmp_path / "full"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        if os.environ.get("CI") == "true":
            pytest.fail(mounted.stderr.decode())
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode()}")
    try:
        (place / "filler").write_bytes(b"x" * 4096)
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_page_that_has_no_room_is_an_error_that_names_it_and_not_a_sigbus_later(full: Path) -> None:
    path = full / "page"
    with pytest.raises(OSError, match="No space left on device") as caught:
        Page(path, writable=True)
    assert caught.value.filename == str(path)
    assert not path.exists()


def test_a_page_that_was_made_has_all_its_blocks(full: Path) -> None:
    path = full / "page"
    (full / "filler").unlink()
    with Page(path, writable=True) as page:
        for index in range(PAGE_BYTES // 8):
            page.words[index] = index
    assert path.stat().st_blocks * 512 >= PAGE_BYTES


def test_a_page_in_memory_is_a_page_that_nobody_else_sees(tmp_path: Path) -> None:
    with Page(None, writable=True) as page:
        page.put_state(2, "here", 17)
        assert page.state_reason() == "here"
        assert page.words[Word.MAGIC] == MAGIC
    assert list(tmp_path.iterdir()) == []
