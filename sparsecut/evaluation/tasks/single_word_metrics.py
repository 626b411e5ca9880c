"""Scores of POPE, MME, GQA and NLVR, whose answers are one word.

Each function returns what the benchmark's own script computes from the same input.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ...schema import UserError
from .open_ended_metrics import check_all_answered, mean

MME_TASKS = {
    "perception": (
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
    ),
    "cognition": (
        "commonsense_reasoning",
        "numerical_calculation",
        "text_translation",
        "code_reasoning",
    ),
}


def pope(questions: Sequence[Mapping], answers: Sequence[Mapping]) -> dict:
    """POPE: accuracy, precision, recall and F1 of "yes", and the fraction of yes, each 0 to 1.

    Source: evaluate.py of github.com/AoiDragon/POPE. An answer is no where its first sentence has
    the word No, no or not, and yes otherwise. A ratio with an empty denominator is 0.

    Args:
        questions: `label` (yes or no) of every question.
        answers: `answer` of every question, in the same order.

    Raises:
        UserError: There is no question, or not one answer for each.
    """
    if len(questions) != len(answers) or not questions:
        raise UserError(
            f"there are {len(questions)} questions and {len(answers)} answers; give one answer for"
            " each question, and at least one question"
        )
    pairs: Counter = Counter()  # (the truth is yes, the answer is yes)
    for question, answer in zip(questions, answers, strict=True):
        pairs[question["label"] != "no", not is_no(answer["answer"])] += 1
    tp = pairs[True, True]
    fp = pairs[False, True]
    tn = pairs[False, False]
    fn = pairs[True, False]
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    total = precision + recall
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "accuracy": (tp + tn) / len(answers),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "yes_ratio": (tp + fp) / len(answers),
    }


def is_no(answer: str) -> bool:
    """Whether POPE reads an answer as no."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "no", "not"))


def mme(results: Mapping[str, Sequence[Sequence[str]]]) -> dict:
    """MME: accuracy, accuracy+ (both questions of an image right) and their sum, in per cent.

    Source: calculation.py of MME's eval_tool.

    Args:
        results: By task, rows (image, question, truth, answer); the two rows of an image follow
            each other.

    Returns:
        `task`: by task `score`, `acc`, `acc_plus` and `other` (answers that are neither yes nor
        no); `perception_total` and `cognition_total`.

    Raises:
        UserError: The rows of a task are not pairs.
    """
    by_task = {task: _score_mme_task(task, rows) for task, rows in results.items()}
    totals = {}
    for kind, tasks in MME_TASKS.items():
        totals[kind] = sum(by_task[task]["score"] for task in tasks if task in by_task)
    return {
        "task": by_task,
        "perception_total": totals["perception"],
        "cognition_total": totals["cognition"],
    }


def _score_mme_task(task: str, rows: Sequence[Sequence[str]]) -> dict:
    """Accuracy and accuracy+ of one task."""
    images = [row[0] for row in rows]
    if images[::2] != images[1::2]:
        raise UserError(
            f"MME has two questions about each image, one after the other, but the {len(rows)}"
            f" rows of {task} do not pair up"
        )
    right = []
    num_other = 0
    for _, _, truth, answer in rows:
        read = read_yes_or_no(answer)
        num_other += read is None
        right.append(read == truth.strip().lower())
    both_right = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    accuracy = mean(right, 100)
    accuracy_plus = mean(both_right, 100)
    return {
        "score": accuracy + accuracy_plus,
        "acc": accuracy,
        "acc_plus": accuracy_plus,
        "other": num_other,
    }


def read_yes_or_no(answer: str) -> str | None:
    """What MME reads from the first four characters of an answer: "yes", "no" or None."""
    start = answer.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


def gqa(
    questions: Mapping[str, Mapping], predictions: Sequence[Mapping], choices: Mapping | None = None
) -> dict:
    """GQA: accuracy and the benchmark's other figures, in per cent.

    Source: eval.py of GQA (cs.stanford.edu/people/dorarad/gqa). Only balanced questions count.

    Args:
        questions: The questions by id, as in GQA's files. What a balanced question entails may be
            any question of them.
        predictions: `questionId` and `prediction` of every question, compared as they stand.
        choices: By id, the lists `valid` and `plausible`.

    Returns:
        `binary`, `open` and `accuracy`. `consistency`: None unless every entailed question has a
        prediction. `validity` and `plausibility`: None without choices. `distribution`: chi
        square, lower is better. Further, accuracy and the number of questions by four kinds.

    Raises:
        UserError: A balanced question has no prediction.
    """
    answers = {item["questionId"]: item["prediction"] for item in predictions}
    balanced = {key: item for key, item in questions.items() if item["isBalanced"]}
    check_all_answered(list(balanced), answers)
    right = {}
    for key, answer in answers.items():
        if key in questions:
            right[key] = answer == questions[key]["answer"]
    by_form: dict[str, list[float]] = {"binary": [], "open": []}
    for key, question in balanced.items():
        is_open = question["types"]["structural"] == "query"
        by_form["open" if is_open else "binary"].append(float(right[key]))
    return {
        "binary": mean(by_form["binary"], 100),
        "open": mean(by_form["open"], 100),
        "accuracy": mean([float(right[key]) for key in balanced], 100),
        "consistency": _compute_consistency(balanced, right),
        "validity": _compute_fitting(balanced, answers, choices, "valid"),
        "plausibility": _compute_fitting(balanced, answers, choices, "plausible"),
        "distribution": _compute_distribution(balanced, answers),
        **_score_gqa_kinds(balanced, right),
    }


def _score_gqa_kinds(balanced: Mapping, right: Mapping) -> dict:
    """Accuracy and number of questions by kind, as eval.py prints them."""
    kinds = {
        "Accuracy / structural type": lambda question: question["types"]["structural"],
        "Accuracy / semantic type": lambda question: question["types"]["semantic"],
        "Accuracy / steps number": lambda question: _count_steps(question["semantic"]),
        "Accuracy / words number": lambda question: len(question["question"].split()),
    }
    tables = {}
    for title, get_kind in kinds.items():
        by_kind = defaultdict(list)
        for key, question in balanced.items():
            kind = get_kind(question)
            by_kind[kind].append(float(right[key]))
        table = {}
        for kind in sorted(by_kind):
            scores = by_kind[kind]
            table[str(kind)] = [mean(scores, 100), len(scores)]
        tables[title] = table
    return tables


def _count_steps(program: Sequence[Mapping]) -> int:
    """Reasoning steps of a question, without the last one, which is the query."""
    count = 0
    for step in program:
        text = f"{step['operation']}: {step['argument']}"
        is_query = any(phrase in text for phrase in ("exist", "query: name", "choose name"))
        count += not is_query
    return count


def _compute_consistency(balanced: Mapping, right: Mapping) -> float | None:
    """Right answers to what a question entails, averaged over rightly answered questions."""
    fractions = []
    for key, question in balanced.items():
        entailed = [other for other in question.get("entailed", ()) if other != key]
        if any(other not in right for other in entailed):
            return None
        if right[key] and entailed:
            scores = [float(right[other]) for other in entailed]
            fractions.append(mean(scores))
    return mean(fractions, 100)


def _compute_fitting(
    balanced: Mapping, answers: Mapping, choices: Mapping | None, name: str
) -> float | None:
    """Answers that are in a question's list of valid or plausible ones, in per cent."""
    if choices is None:
        return None
    fits = []
    for key, question in balanced.items():
        allowed = choices[key][name]
        kind = question["types"]["detailed"]
        if "Common" in kind:
            # What two things have in common is answered by the kind of the property.
            allowed = ("color", "material", "shape")
        fits.append(answers[key] in allowed)
    return mean(fits, 100)


def _compute_distribution(balanced: Mapping, answers: Mapping) -> float:
    """Chi square of the predictions against the true answers, over 100.

    It is averaged over groups of questions, weighted by their size.
    """
    truth: dict[str, Counter] = defaultdict(Counter)
    observed: dict[str, Counter] = defaultdict(Counter)
    for key, question in balanced.items():
        group = question["groups"]["global"]
        if group is not None:
            truth[group][question["answer"]] += 1
            observed[group][answers[key]] += 1
    if not truth:
        return 0.0
    weighted = []
    sizes = []
    for group, counts in truth.items():
        chi_squared = 0.0
        for answer, expected in counts.items():
            count = observed[group][answer]
            chi_squared += (count - expected) ** 2 / expected
        size = sum(counts.values())
        weighted.append(chi_squared * size)
        sizes.append(size)
    return sum(weighted) / sum(sizes) / 100


def nlvr(examples: Sequence[Mapping], predictions: Mapping[str, str]) -> dict:
    """NLVR: fractions of images, and of sentences throughout, that were judged rightly.

    Source: metrics_images.py of github.com/lil-lab/nlvr. Case does not count.

    Args:
        examples: `identifier` ("sentence-number") and `label` of every example.
        predictions: Answers by image, "split-identifier-0.png" to "-5.png", which are the six
            orders of an example's boxes.

    Returns:
        `precision` over images and `consistency` over sentences, 0 to 1.

    Raises:
        UserError: An image has no prediction.
    """
    answers = {}
    for name, answer in predictions.items():
        answers[name.split(".")[0].partition("-")[2]] = answer
    images = {}
    for example in examples:
        identifier = example["identifier"]
        images[identifier] = [f"{identifier}-{i}" for i in range(6)]
    check_all_answered([name for names in images.values() for name in names], answers)
    right_by_identifier = {}
    for example in examples:
        names = images[example["identifier"]]
        label = example["label"].lower()
        right_by_identifier[example["identifier"]] = [answers[n].lower() == label for n in names]
    sentences: dict[str, bool] = {}
    all_right = []
    for identifier, right in right_by_identifier.items():
        sentence = identifier.split("-")[0]
        sentences[sentence] = sentences.get(sentence, True) and all(right)
        all_right += right
    return {"precision": mean(all_right), "consistency": mean(list(sentences.values()))}
