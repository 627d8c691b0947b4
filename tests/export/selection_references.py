"""The selection methods as literal loops: one item at a time, float64 numpy, without padding.

The score and the choice of flashvlm are those of flashvlm_export.testing.references, which the kernels are held to too.

A method is ref_*(item, K) -> (indices chosen by score, all chosen indices), in no particular order.
"""

from __future__ import annotations

import math

import numpy as np

from flashvlm_export.selection import SelectionParams
from flashvlm_export.testing.references import DEFAULTS, choice64, fused64, minmax64, relevance64


def cosine(a, b):
    return float(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)


PUBLISHED = SelectionParams(temperature=0.01 / 2.5, pool_temperature=0.05)


def ref_relevance(x):
    """Of the methods of other authors."""
    return relevance64(x.projected, x.query, PUBLISHED.pool_temperature)


def ref_score(x, params=DEFAULTS):
    return fused64(relevance64(x.projected, x.query, params.pool_temperature), x.saliency, params)


def ref_contrast(projected, query):
    sims = np.array([[cosine(token, word) for word in query] for token in projected])
    words = [column - column.mean() for column in sims.T]
    weights = [column.max() ** 2 for column in words]
    return sum(w * column for w, column in zip(weights, words, strict=True)) / sum(weights)


def best(score, count, among=None):
    among = range(len(score)) if among is None else among
    return sorted(among, key=lambda i: (-score[i], i))[:count]


def ref_bipartite(features, score, free, target):
    order = sorted(free, key=lambda i: (-score[i], i))
    while len(order) > target:
        evens, odds = order[0::2], order[1::2]
        duplication = {i: max(cosine(features[i], features[j]) for j in odds) for i in evens}
        drop = min(8, len(order) - target)
        order = sorted(evens, key=lambda i, d=duplication: -d[i])[drop:] + odds
    return order


def ref_flashvlm(x, K):
    return ref_top_and_representatives(x, ref_score(x), K)


def ref_flashvlm_contrast(x, K):
    return ref_top_and_representatives(x, fused64(ref_contrast(x.projected, x.query), x.saliency), K)


def ref_top_and_representatives(x, score, K):
    choice = choice64(x.features, score, np.ones(len(score), bool), K, K // 2, DEFAULTS.iterations)
    return choice.kept[choice.is_top], choice.kept


def ref_published(x, K):
    r = ref_relevance(x)
    score = ref_score(x, PUBLISHED)
    for i in best(r, math.ceil(len(r) / 200)):
        score[i] += 0.5 * math.log(10)
    return ref_halves(x, score, K)


def ref_vispruner(x, K):
    return ref_halves(x, minmax64(x.saliency), K)


def ref_halves(x, score, K):
    top = best(score, K // 2)
    free = [i for i in range(len(score)) if i not in top]
    return top, top + ref_bipartite(x.features, score, free, K - len(top))


def ref_divprune(x, K):
    tokens = range(len(x.projected))
    d = [[1 - cosine(x.projected[i], x.projected[j]) for j in tokens] for i in tokens]
    chosen = [max(tokens, key=lambda i: min(d[i][j] for j in tokens if j != i))]
    while len(chosen) < K:
        others = [i for i in tokens if i not in chosen]
        chosen.append(max(others, key=lambda i: min(d[i][j] for j in chosen)))
    return [], chosen


def ref_cdpruner(x, K):
    """Greedy MAP by the determinants themselves."""
    q = minmax64(ref_relevance(x))
    tokens = range(len(q))
    kernel = np.array([[q[i] * cosine(x.projected[i], x.projected[j]) * q[j] for j in tokens] for i in tokens])
    chosen: list[int] = []
    while len(chosen) < K:
        others = [i for i in tokens if i not in chosen]
        chosen.append(max(others, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    return [], chosen


def ref_visionzip(x, K):
    top = best(x.saliency, K * 54 // 64)
    free = [i for i in range(len(x.saliency)) if i not in top]
    count = K - len(top)
    stride = max(1, len(free) // count)
    return top, top + free[::stride][:count]


def ref_trim(x, K):
    order = best(ref_relevance(x), K)
    return order[: K - 1], order


REFERENCES = {
    "flashvlm": ref_flashvlm,
    "flashvlm-contrast": ref_flashvlm_contrast,
    "flashvlm-published": ref_published,
    "vispruner": ref_vispruner,
    "divprune": ref_divprune,
    "cdpruner": ref_cdpruner,
    "visionzip": ref_visionzip,
    "trim": ref_trim,
}
