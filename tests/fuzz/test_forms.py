"""A record of any form, changed in any way, is understood or refused in a sentence."""

import json

from helpers.forms import FORMS, make_data_url, make_pair
from helpers.fuzzing import JUNK, TEXTS, draw_changed
from hypothesis import strategies as st
from PIL import Image

from sparsecut.config.source import RECORD_KEYS
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import parse_record
from sparsecut.data.form_choice import Columns
from sparsecut.data.images import ImageStore
from sparsecut.schema import UserError

PART_KEYS = ("type", "text", "image", "image_url", "url", "path", "bytes", "base64", "index")
TURN_KEYS = ("from", "value", "role", "content", "user", "assistant", "tool_calls", "weight")
KEYS = st.sampled_from([*RECORD_KEYS, *PART_KEYS, *TURN_KEYS, "audio", "tools", "label", "chosen"])
NAMES = ["frage", "bild", "question", "image", "answer"]
COLUMNS = st.dictionaries(st.sampled_from(RECORD_KEYS), st.sampled_from(NAMES), max_size=3)


def test_changed_records_of_every_form(fuzz, tmp_path):
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    values = ["a.png", make_data_url(data), {"bytes": data, "path": None}, data, {"path": "a.png"}]
    store = ImageStore(tmp_path)

    def draw(chosen):
        name, image = chosen
        return draw_changed(make_pair(name, image, image)[0], words=KEYS)

    def check(example):
        record, columns = example
        try:
            understood = parse_record(record, "here", store, columns=Columns(columns))
            images = understood.load_images()
        except RecordError as error:
            assert error.where == "here" and error.problem
        else:
            assert len(images) == str(understood.messages).count("<image>")
            json.dumps([understood.id, understood.messages, understood.group, understood.level])

    forms = st.tuples(st.sampled_from(list(FORMS)), st.sampled_from(values))
    fuzz(check, st.tuples(forms.flatmap(draw), COLUMNS))


def test_records_of_anything(fuzz, tmp_path):
    store = ImageStore(tmp_path)
    records = st.dictionaries(st.one_of(KEYS, TEXTS), JUNK, max_size=5)

    def check(record):
        try:
            parse_record(record, "here", store)
        except UserError as error:
            assert str(error).startswith("here: ")

    fuzz(check, records)
