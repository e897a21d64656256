"""POPE and MME: replies read as yes or no, and their scores."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from moe_vlm_jax.evaluation.rules import punctuation
from moe_vlm_jax.evaluation.rules import rule as rule_lib

PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")

_POPE_RULES: tuple[rule_lib.Rule, ...] = ("llava", "vlmevalkit", "lmms_eval")
_MME_RULES: tuple[rule_lib.Rule, ...] = ("official", "vlmevalkit", "lmms_eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeReply:
    """split: random, popular or adversarial; label: yes or no."""

    split: str
    prediction: str
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class YesNoScores:
    """Fractions in [0, 1]; where nothing can be divided by, 0 (LLaVA's script stops there)."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    count: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeScores:
    """overall: the mean of the splits' values under llava, all replies pooled under the other rules."""

    overall: YesNoScores
    per_split: Mapping[str, YesNoScores]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeReply:
    """image: what the two questions of one image share within its category; label: Yes or No."""

    category: str
    image: str
    prediction: str
    label: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmeScores:
    """per_category: accuracy*100 + accuracy_plus*100, at most 200, of the categories that have replies.

    perception sums the ten of PERCEPTION, at most 2000, cognition the four of COGNITION, at most 800; without those in
    missing. accuracy and accuracy_plus are fractions.
    """

    perception: float
    cognition: float
    per_category: Mapping[str, float]
    accuracy: Mapping[str, float]
    accuracy_plus: Mapping[str, float]
    missing: Sequence[str]


def parse_pope(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns yes/no (llava), Yes/No/Unknown (vlmevalkit) or the reply, stripped and lower (lmms_eval).

    LLaVA looks for the words No, no and not, between single blanks, before the first period: all else is a yes.

    >>> [parse_pope("NO.", rule=rule) for rule in ("llava", "vlmevalkit", "lmms_eval")]
    ['yes', 'No', 'no.']
    """
    rule_lib.require(rule, benchmark="pope", known=_POPE_RULES)
    if rule == "vlmevalkit":
        return _whole_word(prediction)
    if rule == "lmms_eval":
        return prediction.lower().strip()
    words = prediction.partition(".")[0].replace(",", "").split(" ")
    return "yes" if {"No", "not", "no"}.isdisjoint(words) else "no"


def pope_correct(prediction: str, label: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right."""
    return parse_pope(prediction, rule=rule).lower() == _label(label)


def pope_scores(replies: Sequence[PopeReply], *, rule: rule_lib.Rule) -> PopeScores:
    """Returns accuracy, precision, recall, F1 and yes-ratio, overall and by split.

    Under lmms_eval a yes-question whose reply is neither yes nor no is left out of recall, and the yes-ratio is that of
    the labels, not of the replies: it says nothing about a model.
    """
    if not replies:
        raise ValueError("0 POPE replies; a mean needs at least 1.")
    of_split = collections.defaultdict(list)
    for reply in replies:
        of_split[reply.split].append((parse_pope(reply.prediction, rule=rule).lower(), _label(reply.label)))
    per_split = {split: _yes_no_scores(pairs, rule) for split, pairs in sorted(of_split.items())}
    if rule == "llava":
        overall = _mean_scores(list(per_split.values()))
    else:
        overall = _yes_no_scores([pair for pairs in of_split.values() for pair in pairs], rule)
    return PopeScores(overall=overall, per_split=per_split)


def parse_mme(prediction: str, *, rule: rule_lib.Rule) -> str:
    """Returns yes/no/other (official, lmms_eval) or Yes/No/Unknown (vlmevalkit).

    The first two look into the first four characters, so "not sure" is a no; lmms_eval strips blanks and periods first
    and takes y and n. MoE-LLaVA's script runs the official tool.

    >>> [parse_mme(" ..Yes", rule=rule) for rule in ("official", "lmms_eval", "vlmevalkit")]
    ['other', 'yes', 'Yes']
    """
    rule_lib.require(rule, benchmark="mme", known=_MME_RULES)
    if rule == "vlmevalkit":
        return _whole_word(prediction)
    text = prediction.lower()
    if rule == "lmms_eval":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme_correct(prediction: str, label: str, *, rule: rule_lib.Rule) -> bool:
    """Returns whether one reply counts as right."""
    return parse_mme(prediction, rule=rule).lower() == _label(label)


def mme_scores(replies: Sequence[MmeReply], *, rule: rule_lib.Rule) -> MmeScores:
    """Returns the scores by category and their sums; accuracy_plus counts images of which both questions are right."""
    rights = collections.defaultdict(lambda: collections.defaultdict(list))
    for reply in replies:
        right = mme_correct(reply.prediction, reply.label, rule=rule)
        rights[reply.category][reply.image].append(right)
    _check_mme(rights)
    accuracy, accuracy_plus = {}, {}
    for category, of_image in rights.items():
        accuracy[category] = sum(sum(pair) for pair in of_image.values()) / (2 * len(of_image))
        accuracy_plus[category] = sum(all(pair) for pair in of_image.values()) / len(of_image)
    points = {category: 100 * accuracy[category] + 100 * accuracy_plus[category] for category in rights}
    return MmeScores(
        perception=sum(points.get(category, 0.0) for category in PERCEPTION),
        cognition=sum(points.get(category, 0.0) for category in COGNITION),
        per_category=points,
        accuracy=accuracy,
        accuracy_plus=accuracy_plus,
        missing=[category for category in (*PERCEPTION, *COGNITION) if category not in points],
    )


def _whole_word(prediction: str) -> str:
    words = punctuation.drop_vlmevalkit(prediction.lower()).split()
    found = [word for word in ("Yes", "No") if word.lower() in words]
    return found[0] if len(found) == 1 else "Unknown"


def _label(label: str) -> str:
    plain = label.strip().lower()
    if plain not in ("yes", "no"):
        raise ValueError(f"label={label!r} must be yes or no; correct the annotation file.")
    return plain


def _yes_no_scores(pairs: Sequence[tuple[str, str]], rule: rule_lib.Rule) -> YesNoScores:
    """Returns the scores of pairs (parsed reply, label), both in lower case."""
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    predicted = sum(parsed == "yes" for parsed, _ in pairs)
    positive = sum(label == "yes" for _, label in pairs)
    recalled = sum(pair in (("yes", "yes"), ("no", "yes")) for pair in pairs) if rule == "lmms_eval" else positive
    precision, recall = _ratio(hits, predicted), _ratio(hits, recalled)
    return YesNoScores(
        accuracy=_ratio(sum(parsed == label for parsed, label in pairs), len(pairs)),
        precision=precision,
        recall=recall,
        f1=_ratio(2 * precision * recall, precision + recall),
        yes_ratio=_ratio(positive if rule == "lmms_eval" else predicted, len(pairs)),
        count=len(pairs),
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_scores(scores: Sequence[YesNoScores]) -> YesNoScores:
    names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    means = {name: sum(getattr(each, name) for each in scores) / len(scores) for name in names}
    return YesNoScores(**means, count=sum(each.count for each in scores))


def _check_mme(rights: Mapping[str, Mapping[str, Sequence[bool]]]) -> None:
    if not rights:
        raise ValueError("0 MME replies; a mean needs at least 1.")
    _check_categories(rights)
    for category, of_image in rights.items():
        for image, pair in of_image.items():
            if len(pair) != 2:
                raise ValueError(
                    f"image {image!r} of MME's {category} has {len(pair)} replies; give both of its questions."
                )


def _check_categories(categories: Iterable[str]) -> None:
    unknown = sorted(set(categories) - {*PERCEPTION, *COGNITION})
    if unknown:
        raise ValueError(f"MME has no categories {unknown}; it has {', '.join((*PERCEPTION, *COGNITION))}.")
