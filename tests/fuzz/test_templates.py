"""A chat template of any kind teaches the answers and their end, or is refused in a sentence."""

from helpers.native import byte_tokenizer
from hypothesis import strategies as st
from transformers import CLIPImageProcessorPil

from sparsecut.chat_templates.thoughts import find_open_thought, read_answer
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import Example
from sparsecut.processing import SparseCutProcessor
from sparsecut.prompts import encode_prompts, render_prompt
from sparsecut.schema import UserError

SPECIAL = ("<image>", "<|start|>", "<|end|>")
BEGINS = ("<|start|>{role}\\n", "### {role}: ", "[{role}] ", "<{role}>", "\\n{role}\\n", "")
ENDS = ("<|end|>", "<|end|>\\n", "</s>", "\\n", "\\n\\n", " ", "")
CONTENTS = ("{{ m.content }}", "{{ m.content | trim }}", "{{ m['content'].strip() }}")
PARTS = (
    "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}"
)
EMPTY_THOUGHT = "<think>\\n\\n</think>\\n\\n"
WORDS = st.one_of(
    st.sampled_from(["red", "Yes.", "a\nb", "<b>", "{{ x }}", "é", "1 < 2", "\t", "猫", "no "]),
    st.text(min_size=1, max_size=6),
)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join).filter(str.strip)


@st.composite
def draw_template(draw) -> str:
    """A template of turns: marks, contents, system turns, thoughts, ends and the prompt vary."""
    begin = draw(st.sampled_from(BEGINS))
    end = draw(st.sampled_from(ENDS))
    content = draw(st.sampled_from([*CONTENTS, PARTS]))
    answer = content
    if draw(st.booleans()):
        answer = "{% generation %}" + content + end + "{% endgeneration %}"
    else:
        answer += end
    thought = draw(st.sampled_from(["", EMPTY_THOUGHT]))
    skips_system = draw(st.booleans())
    prompt = draw(st.sampled_from(["same", "same", "nothing", "thought", "open"]))
    name = "{{ m.role }}"
    turn = begin.replace("{role}", name)
    lines = ["{% for m in messages %}"]
    if skips_system:
        lines.append("{% if m.role != 'system' %}")
    lines.append("{% if m.role == 'assistant' %}" + turn)
    if thought:
        lines.append("{% if loop.last %}" + thought + "{% endif %}")
    lines += [answer, "{% else %}", turn, content, end, "{% endif %}"]
    if skips_system:
        lines.append("{% endif %}")
    lines.append("{% endfor %}")
    opening = begin.replace("{role}", "assistant")
    extra = {"thought": EMPTY_THOUGHT, "open": "<think>\\n"}.get(prompt, "")
    if prompt != "nothing":
        lines.append("{% if add_generation_prompt %}" + opening + extra + "{% endif %}")
    bos = draw(st.sampled_from(["", "{{ bos_token }}"]))
    return (bos + "".join(lines)).replace("\\n", "{{ '\\n' }}")


@st.composite
def draw_example(draw) -> Example:
    """A conversation of one to three answers, with an image or none, with a system turn or none."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXTS)})
    has_image = draw(st.booleans())
    for number in range(draw(st.integers(1, 3))):
        placeholder = "<image>\n" if has_image and number == 0 else ""
        messages.append({"role": "user", "content": placeholder + draw(TEXTS)})
        messages.append({"role": "assistant", "content": draw(TEXTS)})
    return Example("x", ["a.png"] if has_image else [], messages, source="records.json record 0")


def find_runs(labels: list[int]) -> list[list[int]]:
    """Runs of learned tokens."""
    runs = [[]]
    for label in labels:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def test_templates(fuzz):
    images = CLIPImageProcessorPil()

    def check(example):
        template, record = example
        tokenizer = byte_tokenizer(*SPECIAL)
        tokenizer.chat_template = template
        processor = SparseCutProcessor(images, tokenizer, image_size=8, tiles=2, num_image_tokens=4)
        try:
            encoded = example_encoder(processor).encode(record)
            prompt = render_prompt(processor, record.messages[:-1])
        except UserError:
            return
        ids = encode_prompts(processor, [prompt], None)["input_ids"][0].tolist()
        whole = encoded["input_ids"].tolist()
        runs = find_runs(encoded["labels"].tolist())
        assert whole[: len(ids)] == ids, "the prompt is not the beginning of what is learned"
        last = whole[len(ids) : len(ids) + len(runs[-1])]
        assert last == runs[-1], "the last answer is not learned from its first token"
        answer = read_answer(tokenizer, runs[-1], find_open_thought(prompt)).text
        assert answer.startswith(record.messages[-1]["content"].strip())
        text = "".join(tokenizer.decode(run) for run in runs)
        for message in record.messages:
            if message["role"] == "assistant":
                _, found, text = text.partition(message["content"].strip())
                assert found, "an answer is not learned"

    fuzz(check, st.tuples(draw_template(), draw_example()))
