"""What could go wrong in silence with images of any size: order, grids, limits, batches."""

import io

import pytest
import torch
from helpers.any_size import build_tiny, draw_image
from PIL import Image
from transformers import AutoProcessor, pipeline

from sparsecut.pixels import open_image, read_size
from sparsecut.schema import UserError

TEXTS = ["<image> what <image> is", "it"]


@pytest.fixture(scope="module")
def tiled():
    """A CLIP encoder of 2 x 2 patches; images have 4 to 30 of them."""
    return build_tiny(coarse="native", min_pixels=256, max_pixels=1920)


@pytest.fixture(scope="module")
def images():
    return [draw_image(10, 40, 1), draw_image(40, 30, 2)]


@pytest.fixture
def inputs(tiled, images):
    _, processor = tiled
    return dict(processor(images=[images, []], text=TEXTS, return_tensors="pt", padding=True))


def test_images_in_another_order_than_their_placeholders_are_refused(tiled, images, inputs):
    model, processor = tiled
    exchanged = inputs | processor.prepare_images(images[::-1])
    with pytest.raises(UserError, match="image 0"):
        model(**exchanged)
    grids = exchanged["image_grids"]
    features = model.get_image_features(exchanged["pixel_values"], image_grids=grids)
    with pytest.raises(UserError, match="image 0"):
        model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})


def test_images_whose_tokens_run_on_into_the_next_row_are_refused(tiled, images):
    model, processor = tiled
    texts = ["a <image>", "<image> a"]
    inputs = dict(processor(images=images, text=texts, return_tensors="pt", padding=True))
    inputs["input_ids"] = inputs["input_ids"].flip(0)
    inputs["attention_mask"] = inputs["attention_mask"].flip(0)
    with pytest.raises(UserError, match=r"image \d"):
        model(**inputs)


@pytest.mark.parametrize(
    "grids",
    [[2, 8], [[2.0, 8.0], [4.0, 4.0]], [[1, 5, 1]], [[-1, -5], [4, 5]], [[0, 5], [5, 5]], "grid"],
    ids=str,
)
def test_grids_that_are_none_are_refused(tiled, inputs, grids):
    model, _ = tiled
    inputs["image_grids"] = grids if isinstance(grids, str) else torch.tensor(grids)
    with pytest.raises(UserError, match="image_grids"):
        model(**inputs)


def test_states_without_their_grids_are_refused(tiled, inputs):
    model, _ = tiled
    states = model.encode(inputs.pop("pixel_values"), inputs["image_grids"])
    for grids in (None, [[2, 2], [4, 5]]):
        with pytest.raises(UserError, match="image_grids"):
            model(**inputs | {"image_grids": grids}, vision_states=states)
    squashed, processor = build_tiny()
    views = processor.prepare_images([draw_image(16, 16)])["pixel_values"]
    with pytest.raises(UserError, match="image_grids"):
        squashed.get_image_features(vision_states=squashed.encode(views), image_grids=[[2, 2]])


def test_pixels_without_their_grids_are_told_what_is_missing(tiled, inputs):
    model, _ = tiled
    del inputs["image_grids"]
    with pytest.raises(UserError, match="image_grids"):
        model(**inputs)


def test_limits_for_one_call_are_refused_and_those_at_loading_hold(tiled, images, tmp_path):
    model, processor = tiled
    for settings in ({"max_pixels": 640}, {"images_kwargs": {"max_pixels": 640}}):
        with pytest.raises(UserError, match="max_pixels"):
            processor(images=images[:1], text="<image> a", **settings)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path, max_pixels=640)
    assert again.choose_grid(500, 500) == (3, 3)
    assert (again.max_pixels, again.num_image_tokens) == (640, 10)
    with pytest.raises(UserError, match="max_pixels"):
        AutoProcessor.from_pretrained(tmp_path, max_pixels=63)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_size_of_a_turned_file_is_that_of_its_image(name, orientation):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw_image(10, 40).save(file, name, exif=exif)
    expected = open_image(file.getvalue()).size
    assert expected == ((10, 40) if orientation > 4 else (40, 10))
    file.seek(0)
    assert read_size(file, "the image", upright=True) == expected


def test_a_pipeline_answers_in_batches_as_alone(tiled, images):
    model, processor = tiled
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    settings = {"max_new_tokens": 4, "do_sample": False, "return_full_text": False}
    chats = []
    for image in [*images, draw_image(1, 300)]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what is"}]
        chats.append([{"role": "user", "content": content}])
    alone = [answer(text=chat, **settings)[0]["generated_text"] for chat in chats]
    together = answer(text=chats, batch_size=3, **settings)
    assert [answers[0]["generated_text"] for answers in together] == alone


def test_sampled_sequences_and_assistants_see_their_own_images(tiled, images):
    model, processor = tiled
    inputs = processor(
        images=[images, images[:1]],
        text=["<image> what <image> is", "<image> a"],
        return_tensors="pt",
        padding=True,
    )
    settings = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, **settings, use_cache=use_cache))
    assert torch.equal(*answers)
    alone = processor(images=[images], text=TEXTS[0], return_tensors="pt")
    settings = {"max_new_tokens": 5, "do_sample": False}
    assisted = model.generate(**alone, **settings, assistant_model=model)
    assert torch.equal(assisted, model.generate(**alone, **settings))
