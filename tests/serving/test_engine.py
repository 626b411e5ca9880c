"""The engine with models of other kinds: the built-in backbones, and an upgraded model."""

from helpers.engine_checks import answer_together, check_answers, make_question, randomize_fusion
from helpers.example_bases import build_example_base

from sparsecut import build, upgrade
from sparsecut.serving.engine import Engine


def test_the_built_in_backbones_answer_many_as_they_answer_one():
    model, processor = build("shapes", "shapes", "sparsecut")
    model.generation_config.eos_token_id = None  # longer answers than it would give
    engine = Engine(randomize_fusion(model), processor, max_batch=32)
    try:
        questions = [make_question(processor, i, size=(96, 96)) for i in range(5)]
        assert len(set(check_answers(engine, questions, length=6))) > 2
        assert engine.counts["batches"] < 5
    finally:
        engine.close()


def test_an_upgraded_model_answers_many_as_it_answers_one():
    base, processor = build_example_base("llava")
    model, processor = upgrade(base, processor=processor)
    engine = Engine(randomize_fusion(model), processor, max_batch=8)
    try:
        questions = [make_question(processor, i) for i in range(5)]
        expected = check_answers(engine, questions, length=6)
        assert len(set(expected)) > 2
        before = engine.runner.counts.copy()
        assert answer_together(engine, questions, length=6) == expected  # the same images again
        num_images = engine.runner.counts["images"] - before["images"]
        num_cached = engine.runner.counts["cached_images"] - before["cached_images"]
        assert num_images == num_cached > 3
        without = answer_together(engine, questions, length=6, shortcuts_off=model.fusion.gated)
        assert without != expected
    finally:
        engine.close()
