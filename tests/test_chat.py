"""A chat remembers, streams what it would say at once, and survives mistakes."""

import pytest
from PIL import Image

from sparsecut import Chat
from sparsecut.chat import converse


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 10), "red").save(path)
    return path


def talk(chat, *lines, pictures=()) -> str:
    """What the terminal shows when these lines are typed; an exception in place of a line is
    raised.
    """
    lines, shown = iter(lines), []

    def read():
        line = next(lines, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    converse(chat, pictures, read, shown.append)
    return "".join(shown)


def test_streamed_pieces_make_the_answer(tiny, picture):
    settings = {"max_new_tokens": 5, "suppress_tokens": [0, 1, 2, 3, 27]}  # words only
    at_once, piecewise = Chat(*tiny, **settings), Chat(*tiny, **settings)
    for question in ("what is it", "are you sure"):
        answer = at_once.ask(question, picture)
        pieces = list(piecewise.stream(question, Image.open(picture)))
        assert "".join(pieces).strip() == answer and len(pieces) == 5
    assert at_once.messages == piecewise.messages


def test_history_is_part_of_the_next_prompt(tiny, picture):
    model, processor = tiny
    chat = Chat(model, processor, max_new_tokens=3)
    first = chat.ask("what is it", picture, picture)
    second = chat.ask("are you sure")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2 and len(
        chat.pictures
    ) == 2
    assert (
        chat.messages[0]["content"] == "<image>\n<image>\nwhat is it"
        and chat.messages[-1]["content"] == second
    )
    text = (
        f"USER : <image>\n<image>\nwhat is it ASSISTANT : {first} </s> USER : are you sure"
        " ASSISTANT :"
    )
    inputs = processor(images=chat.pictures, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (
        processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        == second
    )
    chat.reset()
    assert chat.messages == [] and chat.pictures == []


def test_a_picture_may_stand_inside_the_question(tiny, picture):
    chat = Chat(*tiny, max_new_tokens=2)
    chat.ask("is <image> red", picture)
    assert chat.messages[0]["content"] == "is <image> red"
    with pytest.raises(ValueError, match="2 <image> but 1 pictures"):
        chat.ask("<image> is <image>", picture)


def test_closing_the_stream_stops_the_answer_and_keeps_what_was_said(tiny):
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


def test_temperature_draws_and_zero_does_not(tiny):
    greedy, drawn = Chat(*tiny, max_new_tokens=8), Chat(*tiny, max_new_tokens=8, temperature=5.0)
    assert len({Chat.ask(greedy, "what is it") for _ in range(3) if not greedy.reset()}) == 1
    assert len({Chat.ask(drawn, "what is it") for _ in range(5) if not drawn.reset()}) > 1


def test_mistakes_get_a_sentence_and_change_nothing(tiny, tmp_path):
    chat = Chat(*tiny, max_new_tokens=2)
    (tmp_path / "text.png").write_text("no picture")
    for arguments, words in (
        (("what", "nowhere.png"), "there is no picture nowhere.png"),
        (("what", tmp_path / "text.png"), "is not a picture that can be read"),
        (("  ",), "the question is empty"),
        (("what is it " * 1000,), "is more than the 2048 the language model takes; reset it"),
    ):
        with pytest.raises(ValueError, match=words):
            chat.ask(*arguments)
    assert chat.messages == []
    with pytest.raises(ValueError, match="did you mean 'top_k'"):
        Chat(*tiny, topk=3)
    with pytest.raises(ValueError, match="temperature -1"):
        Chat(*tiny, temperature=-1)
    with pytest.raises(ValueError, match="4 beams"):
        Chat(*tiny, num_beams=4).stream("what is it")
    assert Chat(*tiny, num_beams=2, max_new_tokens=2).ask("what is it") is not None


def test_the_terminal_answers_and_knows_commands(tiny, picture):
    chat = Chat(*tiny, max_new_tokens=3)
    expected = Chat(*tiny, max_new_tokens=3).ask("what is it", picture)
    shown = talk(chat, "what is it", "", "/history", pictures=[picture])
    assert shown == f"{expected}\nuser: [picture]\nwhat is it\nassistant: {expected}\n"
    assert "1 picture for the next question\n2 pictures" in talk(
        chat, f"/image {picture}", f"/image {picture}"
    )
    assert (
        talk(chat, "/reset", "/history", "/quit", "never read")
        == "forgotten\nnothing was said yet\n"
    )
    assert "/image PATH" in talk(chat, "/help")
    assert "error: /imgae is not a command (did you mean '/image'?)" in talk(chat, "/imgae x")
    assert "error: there is no picture nowhere.png" in talk(chat, "/image nowhere.png")
    with pytest.raises(ValueError, match="there is no picture nowhere"):
        talk(chat, "what is it", pictures=["nowhere.png"])


def test_interrupts_leave_at_the_prompt_and_stop_an_answer(tiny, monkeypatch):
    chat = Chat(*tiny)
    assert talk(chat, KeyboardInterrupt, "never read") == ""

    def interrupted(*args):
        yield "well"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    assert talk(chat, "what is it", "/history") == "well\n(stopped)\nnothing was said yet\n"
