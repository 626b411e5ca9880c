"""Whatever takes long shows life within five seconds, and the time left after thirty."""

import builtins
import importlib
import io
import re
import subprocess
import sys
import time

import pytest

from sparsecut import waits
from sparsecut.waits import display as display_module
from sparsecut.waits import steps
from sparsecut.waits.display import Display, is_switched_off
from sparsecut.waits.step import Step, format_seconds

VARIABLES = [display_module.VARIABLE, *display_module.OTHER_VARIABLES]


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=[False, True], ids=["file", "terminal"])
def shown(request, clock, monkeypatch):
    """A display on a stream in memory, which draws when the test asks; (display, stream)."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    stream = io.StringIO()
    display = Display(stream, is_terminal=request.param, clock=clock, has_thread=False)
    display.is_disabled = False  # whatever the tests before have done
    monkeypatch.setattr(steps, "DISPLAY", display)
    return display, stream


def pass_time(display, clock, seconds: float) -> None:
    """Let the clock go on, and the display look as often as its thread does."""
    end = clock.now + seconds
    while clock.now < end:
        clock.now += display_module.SECONDS_BETWEEN_LOOKS
        display.look()


def test_a_silent_step_shows_life_within_five_seconds(shown, clock):
    display, stream = shown
    with waits.show_step("thinking"):
        pass_time(display, clock, 5)
        assert "thinking" in stream.getvalue()


def test_steps_in_steps_are_all_shown(shown, clock):
    display, stream = shown
    with (
        waits.show_step("command", is_background=True),
        waits.show_step("outer", 3),
        waits.show_step("inner"),
    ):
        pass_time(display, clock, 5)
        assert re.search(r"outer.*0 of 3", stream.getvalue())
        assert "inner" in stream.getvalue()
        assert "command" not in stream.getvalue()


def test_each_step_of_a_command_shows_life(shown, clock):
    display, stream = shown
    with waits.show_step("command", is_background=True):
        for name in ("one", "two", "three"):
            with waits.show_step(name):
                pass_time(display, clock, 5)
            assert name in stream.getvalue()


@pytest.mark.parametrize("seconds_each", [0.5, 3, 16])
@pytest.mark.parametrize("total", [100, 7])
def test_after_thirty_seconds_the_time_left_is_shown(shown, clock, seconds_each, total):
    display, stream = shown
    with waits.show_step("counting", total) as step:
        for _ in step.count(range(total)):
            pass_time(display, clock, seconds_each)
            if clock.now > 1031:
                break
        if clock.now > 1031:
            seconds = seconds_each * (total - step.done)
            left = step.estimate_left(clock.now)
            assert "left" in stream.getvalue()
            assert left == pytest.approx(seconds, rel=0.5, abs=2 * seconds_each)


def test_what_was_done_before_does_not_count_as_speed(clock):
    step = Step("answers", clock=clock)
    step(900, 1000)
    clock.now += 10
    step(910, 1000)
    assert step.estimate_left(clock.now) == pytest.approx(90, rel=0.2)


def test_the_estimate_grows_while_an_item_takes_long(clock):
    step = Step("items", 10, clock=clock)
    clock.now += 1
    step.advance()
    before = step.estimate_left(clock.now)
    clock.now += 100
    assert step.estimate_left(clock.now) > 10 * before


def test_a_file_gets_one_line_in_half_a_minute(clock, shown):
    display, stream = shown
    if display._is_terminal:
        pytest.skip("a terminal has bars")
    with waits.show_step("working", 1000) as step:
        for _ in step.count(range(300)):
            pass_time(display, clock, 1)
    lines = stream.getvalue().splitlines()
    assert 10 <= len(lines) <= 13
    assert not any("\x1b" in line for line in lines)


def test_what_is_quick_shows_nothing(shown, clock):
    display, stream = shown
    for _ in range(20):
        with waits.show_step("quick"):
            pass_time(display, clock, 0.5)
    assert stream.getvalue() == ""


def test_a_bar_is_gone_when_its_step_is(shown, clock):
    display, stream = shown
    if not display._is_terminal:
        pytest.skip("lines stay")
    with waits.show_step("drawing"):
        pass_time(display, clock, 3)
        assert display._view.bars is not None
    assert display._view.bars is None
    after = stream.getvalue().rpartition("drawing")[2]
    assert "\x1b[2K" in after
    assert not after.endswith("\n")


def test_a_long_label_leaves_room_for_the_time_left(shown, clock):
    display, stream = shown
    with waits.show_step("reading records of " + "folder/" * 30, 10) as step:
        step.advance()
        pass_time(display, clock, 5)
    assert "left" in stream.getvalue()


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environment_switches_it_off(shown, clock, monkeypatch, name):
    display, stream = shown
    display.is_disabled = None
    monkeypatch.setenv(name, "1")
    with waits.show_step("working"):
        pass_time(display, clock, 100)
    assert stream.getvalue() == ""
    monkeypatch.setenv(display_module.VARIABLE, "0")  # our own variable decides
    assert not is_switched_off()


def test_switched_off_bars_of_transformers_switch_it_off(shown):
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    try:
        logging.disable_progress_bar()
        assert is_switched_off()
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def test_a_caller_switches_it_off_and_on(shown, clock, monkeypatch):
    display, stream = shown
    monkeypatch.setattr(display_module, "DISPLAY", display)
    monkeypatch.setenv(display_module.VARIABLE, "1")
    for change, is_seen in (
        (waits.disable_progress_bars, False),
        (waits.enable_progress_bars, True),
    ):
        change()
        with waits.show_step("working"):
            pass_time(display, clock, 5)
        assert ("working" in stream.getvalue()) == is_seen


def test_an_error_knows_the_steps_it_arose_in(shown, clock):
    with (
        pytest.raises(KeyboardInterrupt) as caught,
        waits.show_step("command", is_background=True),
        waits.show_step("outer", 5) as outer,
    ):
        for _ in outer.count(range(5)):
            if outer.done == 2:
                with waits.show_step("inner"):
                    raise KeyboardInterrupt
    assert waits.describe_place(caught.value) == "outer (2 of 5), inner"
    assert waits.describe_place(ValueError()) == ""


def test_a_closed_stream_does_not_stop_the_work(clock, monkeypatch):
    stream = io.StringIO()
    display = Display(stream, is_terminal=False, clock=clock, has_thread=False)
    display.is_disabled = False
    monkeypatch.setattr(steps, "DISPLAY", display)
    with waits.show_step("working"):
        stream.close()
        pass_time(display, clock, 40)


def test_a_forked_process_shows_nothing_and_is_not_locked():
    code = (
        "import os, sys, time\n"
        "from sparsecut.waits import show_step\n"
        "from sparsecut.waits import display\n"
        "display.SECONDS_TO_LINE = 0.1\n"
        "with show_step('parent'):\n"
        "    child = os.fork()\n"
        "    with show_step('in child' if not child else 'in parent'):\n"
        "        time.sleep(0.8)\n"
        "    if not child: os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "in parent" in done.stderr
    assert "in child" not in done.stderr
    assert done.stdout == ""


def test_showing_costs_next_to_nothing(shown):
    begin = time.perf_counter()
    with waits.show_step("items", 100_000) as step:
        for _ in step.count(range(100_000)):
            pass
    assert (time.perf_counter() - begin) / 100_000 < 20e-6


def test_durations_read_well():
    shown = [format_seconds(seconds) for seconds in (0.4, 60, 600, 36_000)]
    assert shown == ["0 s", "60 s", "10 min", "10.0 h"]


def test_lines_that_follow_one_another_show_different_times():
    shown = [format_seconds(seconds) for seconds in range(30, 5400, 30)]
    assert len(set(shown)) == len(shown)


def test_a_command_says_that_it_loads_libraries(shown, clock, tmp_path, monkeypatch):
    display, stream = shown
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "slow_library", raising=False)
    (tmp_path / "slow_library.py").write_text("import builtins\nbuiltins.import_slowly()\n")
    monkeypatch.setattr(
        builtins, "import_slowly", lambda: pass_time(display, clock, 5), raising=False
    )
    with waits.show_step("command", is_background=True):
        pass_time(display, clock, 5)
        assert display_module.LOADING not in stream.getvalue()
        clock.now += 30
        importlib.import_module("slow_library")
        assert display_module.LOADING in stream.getvalue()
