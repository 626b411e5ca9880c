"""The interval of one evaluation is over images where several questions share one."""

import numpy as np
import pytest
from scipy import stats

from sparsecut.evaluation.exact_match import compute_accuracy, compute_scores, format_scores
from sparsecut.evaluation.intervals import _get_student, estimate_interval, wilson_interval
from sparsecut.evaluation.statistics import estimate_accuracy
from sparsecut.evaluation.variant_answers import Answers


def test_wilson_intervals():
    assert wilson_interval(0, 10) == pytest.approx([0, 0.27753], abs=1e-4)
    assert wilson_interval(8, 10) == pytest.approx([0.49016, 0.94332], abs=1e-4)
    assert wilson_interval(10, 10)[1] == 1
    assert wilson_interval(0, 69)[0] == 0


def test_quantiles_of_student():
    for degrees in (1, 2, 3, 4, 10, 200):
        assert _get_student(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=0.004)


def draw_answers(generator, num_images: int, per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers that depend on the image: some images are easy, some hard."""
    ease = generator.beta(1.4, 0.6, num_images)
    images = np.repeat(np.arange(num_images), generator.integers(1, 2 * per_image, num_images))
    return (generator.random(len(images)) < ease[images]).astype(int), images


@pytest.mark.parametrize("num_images", [12, 80])
def test_intervals_over_images_hold_the_true_value(num_images):
    generator = np.random.default_rng(0)
    held = {"images": 0, "questions": 0}
    for _ in range(400):
        correct, images = draw_answers(generator, num_images, 6)
        for name, groups in (("images", images), ("questions", np.arange(len(images)))):
            result = estimate_interval(correct.tolist(), groups.tolist())
            low, high = result["interval"]
            assert result["interval_over"] == name
            held[name] += low <= 0.7 <= high
    assert held["images"] / 400 > 0.925
    assert held["questions"] / 400 < 0.85  # what is wrong without


def test_the_interval_is_that_of_the_bootstrap_by_image():
    correct, images = draw_answers(np.random.default_rng(1), 300, 5)
    ids = [str(number) for number in range(len(images))]
    answers = Answers(correct[None], images.tolist(), ["all"] * len(ids), ids, [0])
    drawn = estimate_accuracy(answers).average
    low, high = estimate_interval(correct.tolist(), images.tolist())["interval"]
    assert (low, high) == pytest.approx((drawn.low, drawn.high), abs=0.006)


def test_an_image_for_each_question_is_the_interval_over_questions():
    correct = [1, 1, 1, 0, 1, 0, 1, 1]
    result = estimate_interval(correct, list("abcdefgh"))
    assert result["interval"] == wilson_interval(6, 8)
    assert (result["interval_over"], result["num_images"]) == ("questions", 8)


def test_one_image_alone_says_nothing_of_others_so_the_interval_is_over_questions():
    result = estimate_interval([1, 0, 1], ["a", "a", "a"])
    assert (result["interval_over"], result["num_images"]) == ("questions", 1)


def test_equal_answers_count_images():
    result = estimate_interval([1] * 60, [number // 6 for number in range(60)])
    assert result["interval"] == wilson_interval(10, 10)


def test_copies_of_every_question_add_no_certainty():
    correct = [1, 1, 0, 1, 0, 1, 1, 0, 1, 1] * 4
    images = list(range(40))
    once = estimate_interval(correct, images)["interval"]
    copied = estimate_interval(correct * 5, images * 5)["interval"]
    assert copied[1] - copied[0] >= once[1] - once[0]


def test_scores_that_are_no_whole_numbers_are_over_images_too():
    values = [0.3, 0.3, 0.9, 0.9, 0.6, 0.6, 1.0, 1.0] * 3
    images = [number // 2 for number in range(len(values))]
    alone = estimate_interval(values, range(len(values)))["interval"]
    shared = estimate_interval(values, images)["interval"]
    assert shared[1] - shared[0] > 1.3 * (alone[1] - alone[0])
    assert sum(shared) / 2 == pytest.approx(np.mean(values))


def make_record(right: bool, image: str | None, level: str) -> dict:
    return {"correct": right, "group": None, "level": level, "images": [image] if image else []}


def test_each_row_says_what_its_interval_is_over():
    answers = [(True, "a"), (False, "a"), (True, "b"), (True, "b"), (False, "c"), (False, "c")]
    records = [make_record(right, image, "shared") for right, image in answers]
    records += [make_record(True, image, "single") for image in ("d", None, None)]
    scores = compute_scores(records)
    levels = scores["levels"]
    assert (scores["interval_over"], scores["num_images"]) == ("images", 6)
    assert (levels["shared"]["interval_over"], levels["shared"]["num_images"]) == ("images", 3)
    assert levels["single"]["interval_over"] == "questions"
    rows = format_scores(scores).splitlines()
    assert [row.split()[-1] for row in rows[1:4]] == ["images", "images", "questions"]
    assert "3 recordings" in format_scores({**scores, "medium": "audio"})


def test_a_list_of_answers_alone_has_an_image_for_each():
    assert compute_accuracy([True, False])["interval_over"] == "questions"
