"""The twelve benchmarks in small: invented questions in the files and folders of LLaVA's
instructions.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def make_root(root: Path) -> Path:
    """Write the files of all benchmarks."""
    make_vqav2(root / "vqav2")
    make_gqa(root / "gqa")
    make_vizwiz(root / "vizwiz")
    make_scienceqa(root / "scienceqa")
    make_textvqa(root / "textvqa")
    make_pope(root / "pope")
    make_mme(root / "MME")
    make_mmbench(root / "mmbench")
    make_seed(root / "seed_bench")
    make_llava_bench(root / "llava-bench-in-the-wild")
    make_mmvet(root / "mm-vet")
    return root


def make_image(number: int) -> Image.Image:
    """An image of random pixels."""
    generator = np.random.default_rng(number)
    return Image.fromarray(generator.integers(0, 255, (20, 24, 3), dtype=np.uint8))


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image(number).save(path)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_json_lines(path: Path, values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def make_question(number, image: str, text: str, category: str = "default") -> dict:
    """A record of LLaVA's question files."""
    return {"question_id": number, "image": image, "text": text, "category": category}


def make_vqav2(folder: Path) -> None:
    questions = []
    for i in range(6):
        image = f"COCO_test2015_{i:012d}.jpg"
        questions.append(make_question(i, image, f"is it red {i}\n{SHORT}"))
        write_image(folder / "test2015" / image, i)
    write_json_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", questions)
    write_json_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", questions[:4])
    questions = []
    annotations = []
    for i in range(5):
        questions.append({"question_id": 10 * i, "image_id": i, "question": "what is it"})
        answers = []
        for k in range(10):
            answers.append({"answer": "two cats" if k < 8 else "dog", "answer_id": k})
        annotation = {
            "question_id": 10 * i,
            "image_id": i,
            "answers": answers,
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": "two cats",
        }
        annotations.append(annotation)
        write_image(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    question_file = folder / "v2_OpenEnded_mscoco_val2014_questions.json"
    write_json(question_file, {"questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def make_gqa(folder: Path) -> None:
    questions = []
    truth = {}
    for i in range(6):
        is_binary = i % 2 == 1
        write_image(folder / "data" / "images" / f"n{i}.jpg", i)
        questions.append(make_question(f"2013{i}", f"n{i}.jpg", f"is it a cat\n{SHORT}"))
        truth[f"2013{i}"] = {
            "question": "is it a cat",
            "answer": "yes" if is_binary else "cat",
            "isBalanced": True,
            "imageId": f"n{i}",
            "entailed": [],
            "types": {
                "structural": "verify" if is_binary else "query",
                "semantic": "obj",
                "detailed": "exist",
            },
            "groups": {"global": "animal"},
            "semantic": [
                {"operation": "select", "argument": "cat"},
                {"operation": "exist", "argument": "?"},
            ],
        }
    write_json_lines(folder / "llava_gqa_testdev_balanced.jsonl", questions)
    write_json(folder / "data" / "testdev_balanced_questions.json", truth)


def make_vizwiz(folder: Path) -> None:
    unsure = "When the provided information is insufficient, respond with 'Unanswerable'."
    questions = []
    for i in range(3):
        image = f"VizWiz_test_{i:08d}.jpg"
        questions.append(make_question(i, image, f"what is it\n{unsure}\n{SHORT}"))
        write_image(folder / "test" / image, i)
    write_json_lines(folder / "llava_test.jsonl", questions)


def make_scienceqa(folder: Path) -> None:
    problems = {}
    records = []
    for i in range(5):
        has_image = i % 2 == 1
        problems[str(i)] = {
            "question": "what is it",
            "choices": ["a cat", "a dog"],
            "answer": i % 2,
            "hint": "",
            "image": "image.png" if has_image else None,
            "subject": "natural science",
            "grade": "grade3",
            "topic": "biology",
            "split": "test",
        }
        text = "Context: N/A\nQuestion: what is it\nOptions: (A) a cat (B) a dog"
        record = {"id": str(i)}
        if has_image:
            text += "\n<image>"
            record["image"] = f"{i}/image.png"
            write_image(folder / "images" / "test" / record["image"], i)
        record["conversations"] = [
            {"from": "human", "value": text},
            {"from": "gpt", "value": "The answer is A."},
        ]
        records.append(record)
    problems["99"] = {**problems["0"], "split": "train"}
    write_json(folder / "llava_test_CQM-A.json", records)
    write_json(folder / "problems.json", problems)
    splits = {"train": ["99"], "test": [str(i) for i in range(5)]}
    write_json(folder / "pid_splits.json", splits)


def make_textvqa(folder: Path) -> None:
    """Two questions are about one image, and have one id."""
    questions = []
    data = []
    for i in range(4):
        image = f"{'abc'[i % 3]}0"
        question = f"What is it {i}"
        text = f"{question}\nReference OCR token: cat, dog\n{SHORT}"
        questions.append(make_question(image, f"{image}.jpg", text))
        answers = ["cat"] * 7 + ["dog"] * 3
        data.append({"image_id": image, "question": question, "question_id": i, "answers": answers})
        write_image(folder / "train_images" / f"{image}.jpg", i)
    write_json_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", questions)
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": data})


def make_pope(folder: Path) -> None:
    questions = []
    for split in ("random", "popular", "adversarial"):
        labels = []
        for i in range(4):
            image = f"COCO_val2014_{i:012d}.jpg"
            text = f"Is there a {'cat' if i % 2 else 'dog'} in the image?"
            label = ("no", "yes")[i % 2]
            labels.append({"question_id": i + 1, "image": image, "text": text, "label": label})
            questions.append(make_question(len(questions), image, f"{text}\n{SHORT}", split))
            write_image(folder / "val2014" / image, i)
        write_json_lines(folder / "coco" / f"coco_pope_{split}.json", labels)
    write_json_lines(folder / "llava_pope_test.jsonl", questions)


def make_mme(folder: Path) -> None:
    """Two tasks, whose text files are beside the images or in a folder of their own."""
    release = folder / "MME_Benchmark_release_version"
    questions = []
    for task in ("existence", "artwork"):
        is_separate = task == "artwork"
        for i in range(2):
            name = f"{task}/images/{i}.png" if is_separate else f"{task}/{i}.png"
            write_image(release / name, i)
            first = "Is it a cat?  Please answer yes or no."
            if not is_separate:
                first += " "
            second = "Is it a dog? Please answer yes or no."
            truth = release / task / f"{i}.txt"
            if is_separate:
                truth = release / task / "questions_answers_YN" / f"{i}.txt"
            truth.parent.mkdir(parents=True, exist_ok=True)
            truth.write_text(f"{first}\tYes\n{second}\tNo\n")
            for text in (first, second):
                prompt = " ".join(text.split()) + f"\n{SHORT}"
                questions.append(make_question(f"{task}/{i}.png", name, prompt, task))
    write_json_lines(folder / "llava_mme.jsonl", questions)


def make_mmbench(folder: Path) -> None:
    """Three questions in three rotations; rotations of the third name the row with its image."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    columns += ["source", "l2-category", "comment", "split"]
    options = ["a cat", "a dog", "red"]
    lines = ["\t".join(columns)]
    for i in (1, 2, 3):
        data = io.BytesIO()
        make_image(i).save(data, "PNG")
        image = base64.b64encode(data.getvalue()).decode()
        for turn in range(3):
            rotated = options[turn:] + options[:turn]
            row = {
                "index": str(1_000_000 * turn + i),
                "question": "what is it",
                "hint": "it is red" if i == 2 else "",
                **dict(zip("ABC", rotated, strict=True)),
                "D": "None",
                "answer": "ABC"[-turn % 3],
                "category": "ocr",
                "image": "3" if i == 3 and turn > 0 else image,
                "source": "here",
                "l2-category": "coarse_perception",
                "comment": "",
                "split": "dev",
            }
            lines.append("\t".join(row[column] for column in columns))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("mmbench_dev_20230712.tsv", "mmbench_dev_cn_20231003.tsv"):
        (folder / name).write_text("\n".join(lines) + "\n")


def make_seed(folder: Path) -> None:
    """Three questions about images and one about a video's frame."""
    questions = []
    truth = []
    for i in range(4):
        kind = "video" if i == 3 else "image"
        number = f"v{i}" if kind == "video" else i
        image = f"SEED-Bench-{'video-' if kind == 'video' else ''}image/{i}.png"
        text = f"what is it\nA. cat\nB. dog\n{LETTER}"
        questions.append(make_question(number, image, text, kind))
        write_image(folder / image, i)
        record = {
            "question_id": str(number),
            "answer": "AB"[i % 2],
            "question_type_id": 1 + i % 2,
            "data_type": kind,
        }
        truth.append(record)
    write_json_lines(folder / "llava-seed-bench.jsonl", questions)
    types = {"Scene": 1, "Action": 2}
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": truth})


def make_llava_bench(folder: Path) -> None:
    questions = []
    for i in range(2):
        questions.append(make_question(i, f"{i:03d}.jpg", "what is it", "conv"))
        write_image(folder / "images" / f"{i:03d}.jpg", i)
    write_json_lines(folder / "questions.jsonl", questions)


def make_mmvet(folder: Path) -> None:
    questions = []
    for i in range(2):
        questions.append(make_question(i, f"v1_{i}.png", "what is it"))
        write_image(folder / "images" / f"v1_{i}.png", i)
    write_json_lines(folder / "llava-mm-vet.jsonl", questions)
