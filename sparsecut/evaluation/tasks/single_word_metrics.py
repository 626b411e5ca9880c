"""Scores of POPE, MME, GQA and NLVR, which ask for one word: each equals the benchmark's own script
on the same input.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ...schema import UserError
from .open_ended_metrics import check_all_answered, mean


def pope(questions: Sequence[Mapping], answers: Sequence[Mapping]) -> dict:
    """POPE: accuracy, precision, recall, F1 of "yes", and the share of yes, all of 1
    (github.com/AoiDragon/POPE, evaluate.py).

    questions: `label` (yes or no) of each; answers: `answer` of each, in the same order. An answer
    is no where its first sentence has the word No, no or not, and yes otherwise. A ratio without a
    case is 0.
    """
    _check_as_many(questions, answers)
    said = ["no" if is_no(one["answer"]) else "yes" for one in answers]
    pairs = Counter(
        (one["label"] != "no", word == "yes") for one, word in zip(questions, said, strict=True)
    )
    tp, fp, tn, fn = (
        pairs[pair] for pair in ((True, True), (False, True), (False, False), (True, False))
    )
    precision, recall = (tp / total if total else 0.0 for total in (tp + fp, tp + fn))
    both = precision + recall
    return {
        **{"TP": tp, "FP": fp, "TN": tn, "FN": fn},
        "accuracy": (tp + tn) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_ratio": said.count("yes") / len(said),
    }


def is_no(answer: str) -> bool:
    """Whether POPE reads an answer as no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "no", "not"))


def mme(results: Mapping[str, Sequence[Sequence[str]]]) -> dict:
    """MME: accuracy, accuracy+ (both questions of a picture right) and their sum, in per cent, by
    task (MME's calculation.py).

    results: by task, rows (picture, question, truth, answer), two rows after each other for a
    picture. Returns `task` with score, acc, acc_plus and other (answers that are neither yes nor
    no), `perception_total` and `cognition_total`.
    """
    tasks = {}
    for task, rows in results.items():
        if len(rows) % 2 or any(a[0] != b[0] for a, b in zip(rows[::2], rows[1::2], strict=True)):
            raise UserError(
                f"MME asks two questions for each picture, one after the other, but the {len(rows)}"
                f" rows of {task} do not pair up"
            )
        said = [yes_or_no(row[3]) for row in rows]
        right = [word == row[2].strip().lower() for word, row in zip(said, rows, strict=True)]
        acc = mean(right, 100)
        plus = mean([a and b for a, b in zip(right[::2], right[1::2], strict=True)], 100)
        tasks[task] = {"score": acc + plus, "acc": acc, "acc_plus": plus, "other": said.count(None)}
    totals = {
        kind: sum(tasks[t]["score"] for t in names if t in tasks)
        for kind, names in MME_TASKS.items()
    }
    return {
        "task": tasks,
        "perception_total": totals["perception"],
        "cognition_total": totals["cognition"],
    }


MME_TASKS = {
    "perception": [
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ],
    "cognition": [
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    ],
}


def yes_or_no(answer: str) -> str | None:
    """What MME reads from an answer: yes or no by its first four characters, or neither."""
    return next((word for word in ("yes", "no") if word in answer.lower()[:4]), None)


def gqa(
    questions: Mapping[str, Mapping], predictions: Sequence[Mapping], choices: Mapping | None = None
) -> dict:
    """GQA: accuracy (binary, open), consistency, validity, plausibility in per cent, and
    distribution (lower is better), by eval.py.

    questions: by id, as in GQA's files; predictions: `questionId` and `prediction`, compared as
    they stand; choices: by id the lists `valid` and `plausible`. Only balanced questions count, but
    what they entail may be any; consistency is None unless every entailed question has a
    prediction, validity and plausibility are None without choices. Raises ValueError for a balanced
    one without prediction.
    """
    said = {one["questionId"]: one["prediction"] for one in predictions}
    balanced = {key: one for key, one in questions.items() if one["isBalanced"]}
    check_all_answered(list(balanced), said)
    right = {key: said[key] == questions[key]["answer"] for key in said if key in questions}
    scores = {key: float(right[key]) for key in balanced}
    kinds: dict[str, dict] = {name: defaultdict(list) for name in GQA_KINDS}
    parts: dict[str, list] = {"binary": [], "open": []}
    for key, one in balanced.items():
        parts["open" if one["types"]["structural"] == "query" else "binary"].append(scores[key])
        for name, of in GQA_KINDS.items():
            kinds[name][of(one)].append(scores[key])
    result = {name: mean(values, 100) for name, values in parts.items()} | {
        "accuracy": mean(list(scores.values()), 100)
    }
    result["consistency"] = _consistency(balanced, questions, right)
    for name, of in (("validity", "valid"), ("plausibility", "plausible")):
        fits = (
            [said[k] in _allowed(one, choices[k][of]) for k, one in balanced.items()]
            if choices is not None
            else None
        )
        result[name] = None if fits is None else mean(fits, 100)
    result["distribution"] = _distribution(balanced, said)
    tables = {
        name: {str(k): [mean(v, 100), len(v)] for k, v in sorted(by.items())}
        for name, by in kinds.items()
    }
    return {**result, **tables}


GQA_KINDS = {
    "Accuracy / structural type": lambda one: one["types"]["structural"],
    "Accuracy / semantic type": lambda one: one["types"]["semantic"],
    "Accuracy / steps number": lambda one: _steps(one["semantic"]),
    "Accuracy / words number": lambda one: len(one["question"].split()),
}


def _steps(program: Sequence[Mapping]) -> int:
    """Reasoning steps of a question, without the one that asks."""
    told = [f"{step['operation']}: {step['argument']}" for step in program]
    return sum(
        not any(asks in step for asks in ("exist", "query: name", "choose name")) for step in told
    )


def _consistency(balanced: Mapping, questions: Mapping, right: Mapping) -> float | None:
    """Mean over rightly answered questions of the share of what they entail that is right, too."""
    shares = []
    for key, one in balanced.items():
        entailed = [other for other in one.get("entailed", ()) if other != key]
        if any(other not in right for other in entailed):
            return None
        if right[key] and entailed:
            shares.append(mean([float(right[other]) for other in entailed]))
    return mean(shares, 100)


def _allowed(question: Mapping, listed: Sequence[str]) -> Sequence[str]:
    """A question of what two things have in common is answered by the kind of the property,
    whatever its list says.
    """
    return ("color", "material", "shape") if "Common" in question["types"]["detailed"] else listed


def _distribution(balanced: Mapping, said: Mapping) -> float:
    """Chi square of the answers given against those that are true, averaged over groups of
    questions by their size, over 100.
    """
    truth: dict[str, Counter] = defaultdict(Counter)
    given: dict[str, Counter] = defaultdict(Counter)
    for key, one in balanced.items():
        if (group := one["groups"]["global"]) is not None:
            truth[group][one["answer"]] += 1
            given[group][said[key]] += 1
    sizes = {group: sum(answers.values()) for group, answers in truth.items()}
    apart = {
        g: sum((given[g][a] - n) ** 2 / n for a, n in answers.items())
        for g, answers in truth.items()
    }
    return sum(apart[g] * sizes[g] for g in truth) / sum(sizes.values()) / 100 if truth else 0.0


def nlvr(examples: Sequence[Mapping], predictions: Mapping[str, str]) -> dict:
    """NLVR: share of pictures judged rightly, and of sentences judged rightly throughout, of 1
    (lil-lab/nlvr, metrics_images.py).

    examples: `identifier` (sentence-number) and `label`; predictions: by picture,
    "split-identifier-0.png" to "-5.png", the six orders of its boxes. Letter case does not count.
    """
    said = {name.split(".")[0].partition("-")[2]: word for name, word in predictions.items()}
    names = {one["identifier"]: [f"{one['identifier']}-{i}" for i in range(6)] for one in examples}
    check_all_answered([name for six in names.values() for name in six], said)
    right = {
        one["identifier"]: [
            said[n].lower() == one["label"].lower() for n in names[one["identifier"]]
        ]
        for one in examples
    }
    sentences: dict[str, bool] = {}
    for identifier, six in right.items():
        sentence = identifier.split("-")[0]
        sentences[sentence] = sentences.get(sentence, True) and all(six)
    every = [one for six in right.values() for one in six]
    return {"precision": mean(every), "consistency": mean(list(sentences.values()))}


def _check_as_many(asked: Sequence, answered: Sequence) -> None:
    if len(asked) != len(answered) or not asked:
        raise UserError(
            f"there are {len(asked)} questions and {len(answered)} answers; give as many of both,"
            " at least one"
        )
