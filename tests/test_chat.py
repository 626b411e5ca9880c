"""A chat remembers, streams the same answer that it gives at once, and survives mistakes."""

import pytest
from PIL import Image

from sparsecut import Chat
from sparsecut.chat import run_terminal
from sparsecut.schema import UserError


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 10), "red").save(path)
    return path


def run_lines(chat, *lines, images=()) -> str:
    """What the terminal shows when these lines are typed; an exception among them is raised."""
    lines = iter(lines)
    shown = []

    def read():
        line = next(lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    run_terminal(chat, images, read, shown.append)
    return "".join(shown)


def test_streamed_pieces_make_the_answer(tiny, image):
    settings = {"max_new_tokens": 5, "suppress_tokens": [0, 1, 2, 3, 27]}  # words only
    at_once = Chat(*tiny, **settings)
    piecewise = Chat(*tiny, **settings)
    for question in ("what is it", "are you sure"):
        answer = at_once.ask(question, image)
        pieces = list(piecewise.stream(question, Image.open(image)))
        assert "".join(pieces).strip() == answer
        assert len(pieces) == 5
    assert at_once.messages == piecewise.messages


def test_history_is_part_of_the_next_prompt(tiny, image):
    model, processor = tiny
    chat = Chat(model, processor, max_new_tokens=3)
    first = chat.ask("what is it", image, image)
    second = chat.ask("are you sure")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert len(chat.images) == 2
    assert chat.messages[0]["content"] == "<image>\n<image>\nwhat is it"
    assert chat.messages[-1]["content"] == second

    text = (
        f"USER : <image>\n<image>\nwhat is it ASSISTANT : {first} </s> USER : are you sure"
        " ASSISTANT :"
    )
    inputs = processor(images=chat.images, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new_ids = ids[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(new_ids, skip_special_tokens=True).strip() == second
    chat.reset()
    assert chat.messages == []
    assert chat.images == []


def test_an_image_may_stand_inside_the_question(tiny, image):
    chat = Chat(*tiny, max_new_tokens=2)
    chat.ask("is <image> red", image)
    assert chat.messages[0]["content"] == "is <image> red"
    with pytest.raises(UserError, match="2 <image> but 1 images"):
        chat.ask("<image> is <image>", image)


def test_closing_the_stream_stops_the_answer_and_remembers_it(tiny):
    model, processor = tiny
    model.generation_config.eos_token_id = None
    chat = Chat(model, processor, max_new_tokens=2000)
    pieces = chat.stream("what is it")
    next(pieces)
    pieces.close()
    assert len(chat.messages) == 2
    assert 0 < len(chat.messages[1]["content"].split()) < 1900


def test_an_exception_of_generate_reaches_the_caller(tiny, monkeypatch):
    chat = Chat(*tiny)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream("what is it"))
    assert chat.messages == []


@pytest.mark.parametrize("temperature, draws", [(0.0, False), (5.0, True)])
def test_temperature_draws_and_zero_does_not(tiny, temperature, draws):
    chat = Chat(*tiny, max_new_tokens=8, temperature=temperature)
    answers = set()
    for _ in range(5):
        answers.add(chat.ask("what is it"))
        chat.reset()
    assert (len(answers) > 1) == draws


def test_a_mistaken_question_changes_nothing(tiny, tmp_path):
    chat = Chat(*tiny, max_new_tokens=2)
    (tmp_path / "text.png").write_text("no image")
    for arguments, problem in (
        (("what", "nowhere.png"), "nowhere.png"),
        (("what", tmp_path / "text.png"), "text.png"),
        (("  ",), "empty"),
        (("what is it " * 1000,), "2048"),
    ):
        with pytest.raises(UserError, match=problem):
            chat.ask(*arguments)
    assert chat.messages == []


def test_mistaken_settings_are_named(tiny):
    for settings, problem in (
        ({"topk": 3}, "'top_k'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(UserError, match=problem):
            Chat(*tiny, **settings)
    with pytest.raises(UserError, match="num_beams is 4"):
        Chat(*tiny, num_beams=4).stream("what is it")
    assert Chat(*tiny, num_beams=2, max_new_tokens=2).ask("what is it") is not None


def test_the_terminal_answers_and_knows_commands(tiny, image):
    chat = Chat(*tiny, max_new_tokens=3)
    answer = Chat(*tiny, max_new_tokens=3).ask("what is it", image)
    shown = run_lines(chat, "what is it", "", "/history", images=[image])
    assert shown == f"{answer}\nuser: [image]\nwhat is it\nassistant: {answer}\n"
    shown = run_lines(chat, f"/image {image}", f"/image {image}")
    assert shown.splitlines()[0].startswith("1 image ")
    assert shown.splitlines()[1].startswith("2 images ")
    assert "/image PATH" in run_lines(chat, "/help")
    assert "image" in run_lines(chat, "/reset", "/quit", "never read")
    assert "image" not in run_lines(chat, "/reset")  # there was none any more
    assert chat.messages == []


def test_the_terminal_goes_on_after_a_mistake(tiny):
    chat = Chat(*tiny, max_new_tokens=3)
    for line, problem in (("/imgae x", "'/image'"), ("/image nowhere.png", "nowhere.png")):
        shown = run_lines(chat, line)
        assert shown.startswith("error: ")
        assert problem in shown
    with pytest.raises(UserError, match="nowhere"):
        run_lines(chat, "what is it", images=["nowhere.png"])


def test_interrupts_leave_at_the_prompt_and_stop_an_answer(tiny, monkeypatch):
    chat = Chat(*tiny)
    assert run_lines(chat, KeyboardInterrupt, "never read") == ""

    def interrupted(*args):
        yield "well"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    assert run_lines(chat, "what is it", "/history").startswith("well\n(stopped)\n")
