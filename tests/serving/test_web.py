"""The server's page: what it asks of the server, and, where Chromium is there, a question asked in
it.
"""

import asyncio
import base64
import json
import re
import shutil
import subprocess

import pytest
import torch
from fastapi.responses import HTMLResponse
from helpers.clients import data_url, openai, picture, served, turn
from helpers.example_bases import build_example_base
from helpers.tiny import tiny_model

from sparsecut import upgrade
from sparsecut.data.examples import Example
from sparsecut.evaluation.ablation import measure_additions
from sparsecut.serving.engine import Engine
from sparsecut.serving.web import add_page, page

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
# Chromium writes the page down when it has loaded, which the picture at the end delays until the
# answers are there.
DRIVER = """<img src="hold" alt="" hidden><script>
const until = async test => { while (!test()) await new Promise(r => setTimeout(r, 20)); };
(async () => {
  await until(() => plan);
  add([new File(["a"], "notes.txt", {type: "text/plain"})]);
  document.body.dataset.left = $("unread").textContent;
  add([]);
  waiting = [PICTURE];
  showWaiting();
  $("text").value = "what is it";
  $("shortcut1").click();
  await ask();
  $("text").value = "are you <b>sure</b>";
  $("shortcut1").click();
  await ask();
  document.body.dataset.over = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  await fetch("finished");
})();
</script>"""


def drive(app, engine, settings):
    add_page(app, engine, settings)
    driver = DRIVER.replace("PICTURE", json.dumps(data_url(picture(5).resize((120, 90)))))

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
        return HTMLResponse(page() + driver)


@pytest.fixture(scope="module")
def client():
    model, processor = tiny_model()
    with torch.no_grad():
        for path in model.fusion.paths:
            path.linear_2.weight.normal_(0, 2)
    engine = Engine(model, processor)
    with served(engine, drive) as client:
        client.engine = engine
        yield client
    engine.close()


def get(client, path: str, **body):
    root = str(client.base_url).removesuffix("v1/")
    with openai.DefaultHttpxClient() as web:
        return web.post(f"{root}{path}", json=body) if body else web.get(f"{root}{path}")


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(client):
    response = get(client, "")
    assert (
        response.text == page()
        and "default-src 'none'" in response.headers["content-security-policy"]
    )
    assert not re.search(r'(src|href)="?https?:|@import|url\(', page())
    assert "innerHTML" not in page()  # what a model writes is never read as HTML


def test_the_plan_is_told_as_it_is(client):
    facts, plan = get(client, "sparsecut/plan").json(), client.engine.model.plan
    assert [(s["layer"], s["mix"]) for s in facts["shortcuts"]] == [
        (s.layer, s.mix) for s in plan.shortcuts
    ]
    assert facts["vision_depth"] == 6 and facts["language_depth"] == 4
    assert all(0 <= tap <= 6 for s in facts["shortcuts"] for tap in s["taps"])


def test_strengths_are_those_of_explain(client):
    found = get(client, "sparsecut/strengths", messages=turn("what is it", picture(5))).json()[
        "shortcuts"
    ]
    model, processor = client.engine.model, client.engine.processor
    data = base64.b64decode(data_url(picture(5)).split(",")[1])
    example = Example("one", [data], [{"role": "user", "content": "<image>\nwhat is it"}])
    for told, own in zip(found, measure_additions(model, processor, [example], None), strict=True):
        assert told["ratio"] == pytest.approx(own["ratio"]) and told["norm"] == pytest.approx(
            own["norm"]
        )


def test_strengths_of_no_picture_are_refused(client):
    response = get(client, "sparsecut/strengths", messages=turn("what is it"))
    assert response.status_code == 400 and "hold no picture" in response.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_an_upgraded_model_has_a_page_too(kind):
    base, processor = build_example_base(kind)
    model, processor = upgrade(base, processor=processor)
    engine = Engine(model, processor)
    try:
        with served(engine, add_page) as client:
            shortcuts = get(client, "sparsecut/plan").json()["shortcuts"]
            assert [s["can_be_off"] for s in shortcuts] == [
                s.mix != "base" for s in model.plan.shortcuts
            ]
            assert not all(
                s["can_be_off"] for s in shortcuts
            )  # what the base feeds to its input itself stays
            found = get(
                client, "sparsecut/strengths", messages=turn("what is it", picture(5))
            ).json()["shortcuts"]
            assert [s["number"] for s in found] == list(range(len(shortcuts)))
    finally:
        engine.close()


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_question_in_the_browser_is_answered_with_and_without_a_shortcut(client, tmp_path):
    url = str(client.base_url).removesuffix("v1/") + "driven"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --dump-dom"
        " --window-size=500,900"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}", url]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert 'data-done="2"' in dom, dom[-2000:]
    assert 'data-over="0"' in dom  # as wide as a phone, nothing stands out
    assert 'data-left="notes.txt: no picture, left out' in dom
    assert dom.count('class="answer without"') == 1 and dom.count('class="answer"') == 2
    assert (
        "are you &lt;b&gt;sure" in dom
        and '<span class="error"' not in dom
        and '"broken" class="error"></p>' in dom
    )
    assert re.search(r"The answers differ|Both answers are the same", dom)
    assert len(re.findall(r'class="bar"', dom)) == len(client.engine.model.plan.shortcuts) - 1
    assert "<svg" in dom and " %</span>" in dom
