"""Feedback units of records: scores over a whole source, the centre, and pairs from ratings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from una_fast.data.records import Record
from una_fast.data.settings import RecordOptions
from una_fast.feedback import Feedback
from una_fast.score_maps import mid_ranks

Scores = tuple[float, ...]


def source_scores(records: Sequence[Record], options: RecordOptions) -> list[Scores]:
    """Return the final scores of every record of a source, () for a record without scores.

    score_map=quantile turns ratings into mid-ranks among all ratings of the source.
    """
    if options.score_map != "quantile":
        return [record.scores or () for record in records]
    ratings = [record.ratings or () for record in records]
    of_source = list(itertools.chain.from_iterable(ratings))
    ranks = iter(mid_ranks(of_source, among=of_source))
    return [tuple(itertools.islice(ranks, len(own))) for own in ratings]


def score_offset(
    scores: Sequence[Scores], options: RecordOptions, *, require_unit_scores: bool, path: str
) -> tuple[float | None, float]:
    """Return the centre c of the scores, and the offset of score units for c.

    The offset is f(x) + c of the UNA paper (arXiv 2408.15339): with the offset, an unchanged policy
    (r = 0) stands at score c. The centre is None, and the offset 0, without score_center or scores.

    scores: per record, after score_map
    require_unit_scores: the objective compares scores with sigmoid(r); the offset is then logit(c)
    path: the source, for the message

    Raises ValueError for a centre outside (0, 1) if scores are compared with sigmoid(r).
    """
    as_units = [own for own in scores if gives_scores(own, options)]
    values = list(itertools.chain.from_iterable(as_units))
    if options.score_center == "none" or not values:
        return None, 0.0
    if options.score_center == "dataset":
        center = float(np.mean(values))
    else:
        center = float(options.score_center)
    if not require_unit_scores:
        return center, center
    if not 0 < center < 1:
        raise ValueError(
            f"{path}: score_center={options.score_center} gives {center}, but it must lie strictly "
            "between 0 and 1, as scores are compared with sigmoid(r); give another score_center "
            "or none"
        )
    return center, float(np.log(center) - np.log1p(-center))


def gives_scores(scores: Scores, options: RecordOptions) -> bool:
    """Return whether the scores of a record become score units, besides any pairs."""
    return options.feedback != "pairs" or len(scores) == 1


def record_feedback(
    record: Record, scores: Scores, options: RecordOptions, offset: float
) -> tuple[Feedback, int]:
    """Return the units of a record, and the number of dropped ties.

    record: a label, a preference or ratings, for responses 0..K-1
    scores: [K] final scores, () for a record without ratings
    options: settings of the source, resolved
    offset: of score units, from `score_offset`
    """
    if not scores:
        if record.label is not None:
            return Feedback.binary([0], [record.label], weight=record.weight), 0
        return Feedback.pairs([0], [1], margin=record.margin, weight=record.weight), 0
    units = []
    ties_dropped = 0
    if options.feedback != "scores" and len(scores) > 1:
        pairs, ties_dropped = _rated_pairs(record, scores, options)
        units.append(pairs)
    if gives_scores(scores, options):
        responses = range(len(scores))
        units.append(Feedback.scores(responses, scores, weight=record.weight, offset=offset))
    return Feedback.merge(units), ties_dropped


def _rated_pairs(record: Record, scores: Scores, options: RecordOptions) -> tuple[Feedback, int]:
    """Return every pair of a record's responses, and the number of dropped ties.

    The order within a pair is the order of the ratings: a score map may round two ratings to the
    same score.
    """
    ratings = record.ratings
    chosen, rejected = [], []
    targets, margins = [], []
    ties_dropped = 0
    for i, j in itertools.combinations(range(len(scores)), 2):
        tied = ratings[i] == ratings[j]
        if tied and options.ties == "drop":
            ties_dropped += 1
            continue
        better, worse = (i, j) if ratings[i] >= ratings[j] else (j, i)
        margin = record.margin
        if margin is None:
            margin = scores[better] - scores[worse] if options.margin == "rating_gap" else 0.0
        chosen.append(better)
        rejected.append(worse)
        targets.append(0.5 if tied else 1.0)
        margins.append(margin)
    pairs = Feedback.pairs(chosen, rejected, target=targets, margin=margins, weight=record.weight)
    return pairs, ties_dropped
