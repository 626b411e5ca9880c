"""Both kinds of processors give equal pixels for one image, by whatever way it is handed over."""

import base64
import io

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_llava, tiny_model
from PIL import Image, ImageOps
from transformers import AutoProcessor, CLIPImageProcessorPil

from sparsecut import load, upgrade
from sparsecut.building import save
from sparsecut.chat import Chat
from sparsecut.schema import UserError

SIDE = 16
LEVELS = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
PLAN = {"method": "sparsecut", "rank": 4}
ITEMS = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def models():
    """A built model and an upgraded one, without and with fine views, each with its processor."""
    base, processor = tiny_llava()
    fine, fine_processor = tiny_llava()
    processor.chat_template = fine_processor.chat_template = ITEMS
    return {
        "built": tiny_model({**PLAN, "tiles": 0}),
        "upgraded": upgrade(base, {**PLAN, "tiles": 0}, processor=processor),
        "fine": upgrade(fine, {**PLAN, "tiles": 2}, processor=fine_processor),
    }


@pytest.fixture(params=["built", "upgraded", "fine"])
def processor(models, request):
    return models[request.param][1]


def read(processor, images, **settings) -> torch.Tensor:
    """Pixels of one image or of several, [images, 3, H, W]; of views, the coarse one."""
    count = len(images) if isinstance(images, list) else 1
    text = " ".join(["<image>"] * count)
    inputs = processor(images=images, text=text, return_tensors="pt", **settings)
    pixels = inputs["pixel_values"]
    return pixels[:, 0] if pixels.ndim == 5 else pixels


def clip(images, **settings) -> torch.Tensor:
    """What CLIP's own processor makes of images that have its size."""
    own = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return own(images=images, return_tensors="pt", **settings)["pixel_values"]


CHANNELS_FIRST = np.ascontiguousarray(LEVELS.transpose(2, 0, 1))
EQUAL = {
    "PIL": Image.fromarray(LEVELS),
    "array": LEVELS,
    "array, channels first": CHANNELS_FIRST,
    "tensor": torch.from_numpy(CHANNELS_FIRST),
    "tensor, channels last": torch.from_numpy(LEVELS),
    "opaque": Image.fromarray(LEVELS).convert("RGBA"),
    "opaque array": np.concatenate([LEVELS, np.full((SIDE, SIDE, 1), 255, np.uint8)], axis=2),
    "uint16": LEVELS.astype(np.uint16) * 257,
    "int64": LEVELS.astype(np.int64),
    "int32 tensor": torch.from_numpy(CHANNELS_FIRST).int(),
    "fractions, float32": (LEVELS / 255).astype(np.float32),
    "fractions, float64": LEVELS / 255,
    "fractions, float16": (LEVELS / 255).astype(np.float16),
    "fractions, bfloat16": (torch.from_numpy(CHANNELS_FIRST) / 255).bfloat16(),
    "levels, float32": LEVELS.astype(np.float32),
    "levels, bfloat16": torch.from_numpy(CHANNELS_FIRST).bfloat16(),
}


@pytest.mark.parametrize("name", EQUAL)
def test_arrays_and_tensors_of_every_type_give_clip_s_own_pixels(processor, name):
    assert torch.equal(read(processor, EQUAL[name]), clip(Image.fromarray(LEVELS)))
    assert torch.equal(read(processor, [EQUAL[name]] * 2)[1:], clip(Image.fromarray(LEVELS)))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fractions_that_are_not_to_be_rescaled_give_clip_s_own_pixels(processor, kind):
    fractions = (LEVELS / 255).astype(kind)
    expected = clip(fractions.astype(np.float32), do_rescale=False)
    assert expected.abs().max() < 3
    for settings in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        pixels = read(processor, fractions, **settings)
        assert torch.allclose(pixels, expected, atol=1e-5)
    tensor = torch.from_numpy(fractions.transpose(2, 0, 1).copy())
    assert torch.allclose(read(processor, tensor, do_rescale=False), expected, atol=1e-5)
    raw = read(processor, LEVELS, do_rescale=False)
    assert torch.allclose(raw, clip(LEVELS, do_rescale=False))


def test_the_layout_is_obeyed_and_else_found(processor):
    three_rows = LEVELS[:3]
    expected = read(processor, Image.fromarray(three_rows))
    assert torch.equal(read(processor, three_rows), expected)
    first = three_rows.transpose(2, 0, 1)
    assert torch.equal(read(processor, torch.from_numpy(first.copy())), expected)
    for settings in (
        {"input_data_format": "channels_first"},
        {"images_kwargs": {"input_data_format": "channels_first"}},
    ):
        assert torch.equal(read(processor, first, **settings), expected)
    one_row = LEVELS[:1]
    assert torch.equal(read(processor, one_row), read(processor, Image.fromarray(one_row)))
    grey = LEVELS[..., 0]
    assert torch.equal(read(processor, grey), read(processor, Image.fromarray(grey)))
    for wrong in ("channels_last", "sideways"):
        with pytest.raises(UserError, match=wrong):
            read(processor, CHANNELS_FIRST[:, :9], input_data_format=wrong)


REFUSED = {
    "no size": Image.new("RGB", (0, 4)),
    "empty": np.zeros((0, 4, 3), np.uint8),
    "five channels": np.zeros((9, 9, 5), np.uint8),
    "one number": np.array(5),
    "normalized": np.linspace(-2, 2, 300, dtype=np.float32).reshape(10, 10, 3),
    "nan": np.full((9, 9, 3), np.nan),
    "words": np.array([["x"]]),
    "a number": 5,
    "a dictionary": {"a": 1},
    "no file": "nowhere.png",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(processor, name):
    for images in (REFUSED[name], [REFUSED[name]], [[REFUSED[name]]]):
        with pytest.raises(UserError):
            read(processor, images)


def test_none_and_lists_stand_for_the_images_of_their_text(processor):
    image = Image.fromarray(LEVELS)
    texts = ["<image> what", "what", "<image>"]
    settings = {"text": texts, "padding": True, "return_tensors": "pt"}
    expected = processor(images=[[image], [], [image]], **settings)
    for images in ([[image], None, [image]], [image, None, image], [[image], (), image]):
        inputs = processor(images=images, **settings)
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert "pixel_values" not in processor(images=[None, []], text=["what", "is"], padding=True)


def test_wrong_counts_and_nested_lists_are_refused(models):
    processor = models["built"][1]
    image = Image.fromarray(LEVELS)
    wrong = [
        ([[image]], ["<image>", "what"]),
        ([[image], [image]], "<image><image>"),
        ([image, image], "<image>"),
        ([[image, image], []], ["<image>", "<image>"]),
        ([[[image]]], "<image>"),
        ([[image, None]], "<image>"),
    ]
    for images, texts in wrong:
        with pytest.raises(UserError, match="image"):
            processor(images=images, text=texts, padding=True)


# --- orientation ---

TURNED = range(1, 9)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """By orientation, a file without losses, and what it shows."""
    folder = tmp_path_factory.mktemp("photographs")
    stored = Image.fromarray(np.kron(LEVELS[:4, :6], np.ones((3, 3, 1), np.uint8)))
    found = {}
    for orientation in TURNED:
        exif = Image.Exif()
        exif[274] = orientation
        path = folder / f"{orientation}.png"
        stored.save(path, exif=exif)
        with Image.open(path) as image:
            found[orientation] = path, ImageOps.exif_transpose(image).convert("RGB")
    return found


@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_photograph_is_upright_by_every_way(models, processor, photographs, orientation):
    path, shown = photographs[orientation]
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    expected = read(processor, np.asarray(shown))
    with Image.open(path) as opened:
        copies = [opened.convert("RGB"), opened.convert("RGBA"), opened.copy()]
        upright = ImageOps.exif_transpose(opened)
    ways = [str(path), path, data, url, Image.open(path), *copies, upright, upright.copy()]
    for way in ways:
        assert torch.equal(read(processor, [way]), expected)
    for way in (str(path), url, Image.open(path), copies[0]):
        key = "image" if isinstance(way, Image.Image) else "url"
        content = [{"type": "image", key: way}, {"type": "text", "text": "what"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        pixels = inputs["pixel_values"]
        assert torch.equal(pixels[:, 0] if pixels.ndim == 5 else pixels, expected)


@pytest.mark.parametrize("kind", ["built", "upgraded"])
def test_a_chat_turns_and_lays_images_like_files(models, photographs, kind):
    model, processor = models[kind]
    path, shown = photographs[6]
    for image in (path, Image.open(path), path.read_bytes()):
        chat = Chat(model, processor, max_new_tokens=1)
        chat.ask("what is it", image)
        assert np.array_equal(chat.images[0], shown)
    chat = Chat(model, processor, max_new_tokens=1)
    chat.ask("what is it", Image.new("LA", (9, 9)))
    assert np.asarray(chat.images[0]).min() == 255


# --- transparent images ---


def test_what_is_transparent_lies_on_the_processor_s_background(processor, tmp_path):
    nothing = np.zeros((SIDE, SIDE, 4), np.uint8)
    nothing[:8, :, 3] = 255  # black above
    Image.fromarray(nothing).save(tmp_path / "nothing.png")
    white, blue = np.zeros((2, SIDE, SIDE, 3), np.uint8)
    white[8:], blue[8:] = 255, (0, 0, 255)
    ways = [Image.fromarray(nothing), nothing, str(tmp_path / "nothing.png"), nothing / 255]
    for way in ways:
        assert torch.equal(read(processor, [way]), read(processor, white))
    processor.background = "blue"
    try:
        processor.save_pretrained(tmp_path)
        for same in (processor, AutoProcessor.from_pretrained(tmp_path)):
            for way in ways:
                assert torch.equal(read(same, [way]), read(processor, blue))
    finally:
        processor.background = "white"


def test_upgraded_processors_are_whole_after_saving_and_where_an_older_version_saved(
    models, photographs, tmp_path
):
    model, processor = models["upgraded"]
    turned = Image.open(photographs[6][0])
    expected = read(processor, turned)
    save(model, processor, tmp_path / "new")
    assert torch.equal(read(load(tmp_path / "new")[1], turned), expected)
    assert torch.equal(read(AutoProcessor.from_pretrained(tmp_path / "new"), turned), expected)
    model.save_pretrained(tmp_path / "old")
    plain = type(processor).base_processor_class.from_pretrained(tmp_path / "new")
    plain.save_pretrained(tmp_path / "old")
    assert not torch.equal(read(plain, turned), expected)
    assert torch.equal(read(load(tmp_path / "old")[1], turned), expected)


def test_a_request_s_image_that_is_transparent_lies_on_white(models):
    from sparsecut.serving.model_runner import ModelRunner

    for kind in ("built", "upgraded"):
        prepared = ModelRunner(*models[kind], 0).prepare_image(Image.new("RGBA", (9, 9)))
        white = ModelRunner(*models[kind], 0).prepare_image(Image.new("RGB", (9, 9), "white"))
        assert prepared.digest == white.digest


def test_files_in_memory_are_read_like_paths(processor):
    data = io.BytesIO()
    Image.fromarray(LEVELS).save(data, "PNG")
    assert torch.equal(read(processor, data.getvalue()), clip(Image.fromarray(LEVELS)))
