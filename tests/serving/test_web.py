"""The server's page: what it requests, and, where Chromium is installed, a question in it."""

import asyncio
import html
import json
import re
import shutil
import subprocess

import pytest
from fastapi.responses import HTMLResponse
from helpers.clients import (
    encode_image,
    make_data_url,
    make_image,
    make_messages,
    request,
    start_server,
)

from sparsecut.data.examples import Example
from sparsecut.evaluation.heat_maps import KINDS, make_heat_maps
from sparsecut.evaluation.shortcut_norms import measure_additions
from sparsecut.serving.web import PageExamples, add_page, read_page
from sparsecut.shapes import EXAMPLE_IMAGE

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# The browser writes the page down when it has loaded. The image at the end delays that until the
# answers are there.
DRIVER = """<img src="hold" alt="" hidden><script>
const until = async test => { while (!test()) await new Promise(r => setTimeout(r, 20)); };
(async () => {
  await until(() => plan && $("examples").children.length);
  document.body.dataset.hint = $("hint").textContent;
  $("examples").lastChild.click();
  await until(() => document.body.dataset.done === "1");
  $("examples").firstChild.click();
  await until(() => document.body.dataset.done === "2");
  const sent = messages.map(m => Array.isArray(m.content) ? m.content.map(p => p.text || "I") : "A");
  document.body.dataset.sent = JSON.stringify(sent);
  $("new").click();
  addFiles([new File(["a"], "notes.txt", {type: "text/plain"})]);
  document.body.dataset.unread = $("unread").textContent;
  addFiles([]);
  waiting = [IMAGE];
  showWaiting();
  $("text").value = "what is it";
  $("shortcut1").click();
  await ask();
  $("text").value = "are you <b>sure</b>";
  $("shortcut1").click();
  await ask();
  const looks = document.querySelector(".looks");
  looks.open = true;
  await until(() => looks.querySelector("canvas"));
  document.body.dataset.maps = looks.querySelectorAll("figure").length;
  document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;
  const sizes = [...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
    .filter(e => e.getClientRects().length)
    .map(e => parseFloat(getComputedStyle(e).fontSize) * scaleOf(e));
  document.body.dataset.smallest = Math.min(...sizes);
  await fetch("finished");
})();
function scaleOf(element) {
  const matrix = element.getScreenCTM?.();
  return matrix ? matrix.a : 1;
}
</script>"""


EXAMPLES = PageExamples(EXAMPLE_IMAGE, ("what is it", "are you sure"))


def add_page_with_examples(app, engine, config):
    add_page(app, engine, config, EXAMPLES)


def add_driven_page(app, engine, config):
    """A page that asks two questions by itself."""
    driver = DRIVER.replace("IMAGE", json.dumps(make_data_url(make_image(5).resize((120, 90)))))
    finished = asyncio.Event()

    @app.get("/finished")
    async def finish():
        finished.set()

    @app.get("/hold")
    async def hold():
        await asyncio.wait_for(finished.wait(), 30)
        finished.clear()

    @app.get("/driven")
    async def driven():
        return HTMLResponse(read_page() + driver)


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(client):
    response = request(client, "")
    page = read_page()
    assert response.text == page
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r'(src|href)="?https?:|@import|url\(', page)
    assert "innerHTML" not in page  # what a model writes is never read as HTML


def test_the_pages_plan_is_the_models(engine, client):
    facts = request(client, "sparsecut/plan").json()
    shortcuts = facts["shortcuts"]
    expected = [(s.layer, s.mix) for s in engine.model.plan.shortcuts]
    assert [(s["layer"], s["mix"]) for s in shortcuts] == expected
    assert facts["vision_depth"] == 6
    assert facts["language_depth"] == 4
    taps = [tap for shortcut in shortcuts for tap in shortcut["taps"]]
    assert min(taps) >= 0
    assert max(taps) <= 6


def test_strengths_are_those_of_explain(engine, client):
    messages = make_messages("what is it", make_image(5))
    response = request(client, "sparsecut/strengths", json={"messages": messages})
    turns = [{"role": "user", "content": "<image>\nwhat is it"}]
    example = Example("one", [encode_image(make_image(5))], turns)
    expected = measure_additions(engine.model, engine.processor, [example], None)
    for row, expected_row in zip(response.json()["shortcuts"], expected, strict=True):
        assert row["ratio"] == pytest.approx(expected_row["ratio"])
        assert row["norm"] == pytest.approx(expected_row["norm"])


@pytest.mark.parametrize("body", [{"messages": make_messages("what is it")}, {"other": 1}, [1]])
def test_strengths_without_an_image_or_messages_are_refused(client, body):
    response = request(client, "sparsecut/strengths", json=body)
    assert response.status_code == 400
    assert "messages" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_an_answer_are_those_of_the_library(engine, client, kind):
    messages = make_messages("what is it", make_image(5))
    body = {"messages": messages, "answer": "a cat", "kind": kind}
    response = request(client, "sparsecut/looks", json=body).json()
    turns = [{"role": "user", "content": "<image>\nwhat is it"}]
    turns.append({"role": "assistant", "content": "a cat"})
    example = Example("one", [encode_image(make_image(5))], turns)
    expected = make_heat_maps(engine.model, engine.processor, example, kinds=[kind])
    assert response["kind"] == kind
    assert len(response["maps"]) == len(expected.maps) > 0
    for row, own in zip(response["maps"], expected.maps, strict=True):
        assert (row["shortcut"], row["image"]) == (own.shortcut, own.image)
        for values, expected_values in zip(row["values"], own.values, strict=True):
            assert values == pytest.approx(list(expected_values), abs=1e-5)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "answer"),
        ({"answer": 3}, "answer"),
        ({"answer": "a cat", "kind": "gradiant"}, "gradient"),
        ({"answer": "a cat", "kind": ["size"]}, "kind"),
        ({"answer": "a <image> cat"}, "<image>"),
        ({"answer": "a " * 9000}, "max_new_tokens"),
    ],
)
def test_maps_without_an_answer_or_of_an_unknown_kind_are_refused(client, body, named):
    messages = make_messages("what is it", make_image(5))
    response = request(client, "sparsecut/looks", json={"messages": messages, **body})
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def page_source(engine, tmp_path_factory):
    """The page in a narrow window, after two questions, as HTML."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync"
        " --dump-dom --window-size=390,844"
    )
    profile = tmp_path_factory.mktemp("browser")
    with start_server(engine, add_page_with_examples, add_driven_page) as client:
        url = str(client.base_url).removesuffix("v1/") + "driven"
        command = [BROWSER, *flags.split(), f"--user-data-dir={profile}", url]
        browser = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return browser.stdout


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_a_question_in_the_browser_is_answered_with_and_without_a_shortcut(engine, page_source):
    assert 'data-done="4"' in page_source, page_source[-2000:]
    assert 'data-unread="notes.txt' in page_source
    assert page_source.count('class="answer without"') == 1
    assert page_source.count('class="looks"') == 2
    assert int(re.search(r'data-maps="(\d+)"', page_source)[1]) >= 1
    assert page_source.count('class="answer"') == 2
    assert "are you &lt;b&gt;sure" in page_source
    assert '<span class="error"' not in page_source
    assert '"broken" class="error"></p>' in page_source
    assert re.search(r'class="verdict">[^<]*answers', page_source)
    num_bars = len(re.findall(r'class="bar"', page_source))
    assert num_bars == len(engine.model.plan.shortcuts) - 1
    assert "<svg" in page_source
    assert " %</span>" in page_source


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_the_first_screen_of_a_phone_lets_choose_an_image_and_offers_examples(page_source):
    hint = re.search(r'data-hint="([^"]+)"', page_source)[1]
    assert "Choose an image" in hint
    assert "drop" not in hint.lower()
    first, second = EXAMPLES.questions
    sent = json.loads(html.unescape(re.search(r'data-sent="([^"]+)"', page_source)[1]))
    assert sent == [["I", second], "A", [first], "A"], "the image goes with the first question"


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed")
def test_the_page_fits_a_phone_and_its_text_can_be_read(page_source):
    assert float(re.search(r'data-over="([-\d.]+)"', page_source)[1]) <= 0
    assert float(re.search(r'data-smallest="([\d.]+)"', page_source)[1]) >= 11
