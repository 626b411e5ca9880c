"""The twelve benchmarks in small: invented questions in the files and folders that LLaVA's
instructions make people download.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def picture(number: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    )


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number).save(path)


def write(path: Path, value) -> None:
    """JSON, or JSON Lines where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl" or path.parent.name == "coco"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in value) if lines else json.dumps(value)
    )


def asked(number, image: str, text: str, category: str = "default") -> dict:
    return {"question_id": number, "image": image, "text": text, "category": category}


def make_root(root: Path) -> Path:
    """All twelve."""
    for make in (
        vqav2,
        gqa,
        vizwiz,
        scienceqa,
        textvqa,
        pope,
        mme,
        mmbench,
        seed,
        llava_bench,
        mmvet,
    ):
        make(root)
    return root


def vqav2(root: Path) -> None:
    folder = root / "vqav2"
    test = [asked(i, f"COCO_test2015_{i:012d}.jpg", f"is it red {i}\n{SHORT}") for i in range(6)]
    write(folder / "llava_vqav2_mscoco_test2015.jsonl", test)
    write(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", test[:4])
    for one in test:
        draw(folder / "test2015" / one["image"], one["question_id"])
    questions, annotations = [], []
    for i in range(5):
        questions.append({"question_id": 10 * i, "image_id": i, "question": "what is it"})
        answers = [{"answer": "two cats" if k < 8 else "dog", "answer_id": k} for k in range(10)]
        more = {
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": "two cats",
        }
        annotations.append({"question_id": 10 * i, "image_id": i, "answers": answers, **more})
        draw(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def gqa(root: Path) -> None:
    folder, facts, questions = root / "gqa", {}, []
    for i in range(6):
        draw(folder / "data" / "images" / f"n{i}.jpg", i)
        questions.append(asked(f"2013{i}", f"n{i}.jpg", f"is it a cat\n{SHORT}"))
        kind = "verify" if i % 2 else "query"
        facts[f"2013{i}"] = {
            "question": "is it a cat",
            "answer": "yes" if i % 2 else "cat",
            "isBalanced": True,
            "imageId": f"n{i}",
            "entailed": [],
            "types": {"structural": kind, "semantic": "obj", "detailed": "exist"},
            "groups": {"global": "animal"},
            "semantic": [
                {"operation": "select", "argument": "cat"},
                {"operation": "exist", "argument": "?"},
            ],
        }
    write(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    write(folder / "data" / "testdev_balanced_questions.json", facts)


def vizwiz(root: Path) -> None:
    unsure = "When the provided information is insufficient, respond with 'Unanswerable'."
    lines = [
        asked(i, f"VizWiz_test_{i:08d}.jpg", f"what is it\n{unsure}\n{SHORT}") for i in range(3)
    ]
    write(root / "vizwiz" / "llava_test.jsonl", lines)
    for i, one in enumerate(lines):
        draw(root / "vizwiz" / "test" / one["image"], i)


def scienceqa(root: Path) -> None:
    folder, problems, records = root / "scienceqa", {}, []
    for i in range(5):
        shown = f"{i}/image.png" if i % 2 else None
        problems[str(i)] = {
            "question": "what is it",
            "choices": ["a cat", "a dog"],
            "answer": i % 2,
            "hint": "",
            "image": shown and "image.png",
            "subject": "natural science",
            "grade": "grade3",
            "topic": "biology",
            "split": "test",
        }
        text = "Context: N/A\nQuestion: what is it\nOptions: (A) a cat (B) a dog" + (
            "\n<image>" if shown else ""
        )
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "The answer is A."}]
        records.append(
            {"id": str(i), **({"image": shown} if shown else {}), "conversations": turns}
        )
        if shown:
            draw(folder / "images" / "test" / shown, i)
    problems["99"] = {**problems["0"], "split": "train"}
    write(folder / "llava_test_CQM-A.json", records)
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["99"], "test": [str(i) for i in range(5)]})


def textvqa(root: Path) -> None:
    folder, questions, data = root / "textvqa", [], []
    for i in range(4):
        image, asks = (
            f"{'abc'[i % 3]}0",
            f"What is it {i}",
        )  # two questions of one picture have one id
        questions.append(
            asked(image, f"{image}.jpg", f"{asks}\nReference OCR token: cat, dog\n{SHORT}")
        )
        data.append(
            {
                "image_id": image,
                "question": asks,
                "question_id": i,
                "answers": ["cat"] * 7 + ["dog"] * 3,
            }
        )
        draw(folder / "train_images" / f"{image}.jpg", i)
    write(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    write(folder / "TextVQA_0.5.1_val.json", {"data": data})


def pope(root: Path) -> None:
    folder, questions = root / "pope", []
    for k, split in enumerate(("random", "popular", "adversarial")):
        labels = []
        for i in range(4):
            image = f"COCO_val2014_{i:012d}.jpg"
            text, label = (
                f"Is there a {'cat' if i % 2 else 'dog'} in the image?",
                ("no", "yes")[i % 2],
            )
            labels.append({"question_id": i + 1, "image": image, "text": text, "label": label})
            questions.append(asked(4 * k + i, image, f"{text}\n{SHORT}", split))
            draw(folder / "val2014" / image, i)
        write(folder / "coco" / f"coco_pope_{split}.json", labels)
    write(folder / "llava_pope_test.jsonl", questions)


def mme(root: Path) -> None:
    folder, questions = root / "MME", []
    for task, apart in (("existence", False), ("artwork", True)):
        place = folder / "MME_Benchmark_release_version" / task
        for i in range(2):
            name = f"{task}/{'images/' if apart else ''}{i}.png"
            draw(folder / "MME_Benchmark_release_version" / name, i)
            pairs = [
                (f"Is it a cat?  Please answer yes or no.{'' if apart else ' '}", "Yes"),
                ("Is it a dog? Please answer yes or no.", "No"),
            ]
            truth = (place / "questions_answers_YN" if apart else place) / f"{i}.txt"
            truth.parent.mkdir(parents=True, exist_ok=True)
            truth.write_text("".join(f"{question}\t{answer}\n" for question, answer in pairs))
            for question, _ in pairs:
                plain = " ".join(question.split())
                questions.append(
                    {**asked(f"{task}/{i}.png", name, f"{plain}\n{SHORT}"), "category": task}
                )
    write(folder / "llava_mme.jsonl", questions)


def mmbench(root: Path) -> None:
    options = ["a cat", "a dog", "red", "None"]
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"):
        head = [
            "index",
            "question",
            "hint",
            *"ABCD",
            "answer",
            "category",
            "image",
            "source",
            "l2-category",
            "comment",
            "split",
        ]
        rows = [head]
        for i in (1, 2, 3):
            data = io.BytesIO()
            picture(i).save(data, "PNG")
            cell = base64.b64encode(data.getvalue()).decode()
            for turn in range(3):
                turned = options[:3][turn:] + options[:3][:turn]
                hint, shown = (
                    ("it is red" if i == 2 else ""),
                    (cell if i != 3 or turn == 0 else "3"),
                )
                last = [
                    options[3],
                    "ABC"[-turn % 3],
                    "ocr",
                    shown,
                    "here",
                    "coarse_perception",
                    "",
                    "dev",
                ]
                rows.append([str(1_000_000 * turn + i), "what is it", hint, *turned, *last])
        path = root / "mmbench" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join("\t".join(row) + "\n" for row in rows))


def seed(root: Path) -> None:
    folder, questions, facts = root / "seed_bench", [], []
    for i in range(4):
        kind = "video" if i == 3 else "image"
        number, image = (
            (f"v{i}" if kind == "video" else i),
            f"SEED-Bench-{'video-' if kind == 'video' else ''}image/{i}.png",
        )
        questions.append(asked(number, image, f"what is it\nA. cat\nB. dog\n{LETTER}", kind))
        draw(folder / image, i)
        facts.append(
            {
                "question_id": str(number),
                "answer": "AB"[i % 2],
                "question_type_id": 1 + i % 2,
                "data_type": kind,
            }
        )
    write(folder / "llava-seed-bench.jsonl", questions)
    write(
        folder / "SEED-Bench.json", {"question_type": {"Scene": 1, "Action": 2}, "questions": facts}
    )


def llava_bench(root: Path) -> None:
    folder = root / "llava-bench-in-the-wild"
    write(
        folder / "questions.jsonl",
        [asked(i, f"{i:03d}.jpg", "what is it", "conv") for i in range(2)],
    )
    for i in range(2):
        draw(folder / "images" / f"{i:03d}.jpg", i)


def mmvet(root: Path) -> None:
    folder = root / "mm-vet"
    write(folder / "llava-mm-vet.jsonl", [asked(i, f"v1_{i}.png", "what is it") for i in range(2)])
    for i in range(2):
        draw(folder / "images" / f"v1_{i}.png", i)
