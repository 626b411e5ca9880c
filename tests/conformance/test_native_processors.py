"""Every kind of base's own processor goes from a recipe to answers."""

import json

import pytest
import torch
from helpers.native import PROCESSORS, build_base
from helpers.runs import log, stage, write_records

from sparsecut import train
from sparsecut.config.recipe import parse_recipe
from sparsecut.data.examples import read_examples
from sparsecut.evaluation.evaluator import evaluate


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_goes_from_a_recipe_to_answers(name, tmp_path):
    processor = PROCESSORS[name]()
    if name == "paligemma":
        processor.image_seq_length = 16
    base = build_base(name, processor)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    write_records(tmp_path)
    data = tmp_path / "data.json"
    if name == "paligemma":  # takes no texts alone
        records = [record for record in json.loads(data.read_text()) if record["image"]]
        data.write_text(json.dumps(records))
    args = {"max_steps": 12, "per_device_train_batch_size": 5}
    recipe = parse_recipe(
        {
            "model": {"base": "given"},
            "stages": [stage(tmp_path, args=args)],
            "output": str(tmp_path / "out"),
        }
    )
    model, processor = train(recipe, model=base, processor=processor, shown=False)
    losses = [line["loss"] for line in log(tmp_path) if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])
    for key, value in base.state_dict().items():
        assert torch.equal(before[key], value), key
    examples = read_examples(data)
    predictions = []
    for size in (1, 5):
        out = tmp_path / str(size)
        evaluate(model, processor, examples, max_new_tokens=4, batch_size=size, out=out)
        predictions.append((out / "predictions.jsonl").read_text())
    assert predictions[0] == predictions[1]
