"""The selection methods as literal loops: one item at a time, float64 numpy, without padding.

A method is ref_*(item, K) -> (indices chosen by score, all chosen indices), in no particular order.
"""

from __future__ import annotations

import math

import numpy as np


def cosine(a, b):
    return float(a @ b) / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-300)


def minmax(x):
    return (x - x.min()) / max(x.max() - x.min(), 1e-300)


PUBLISHED = {"temperature": 0.01 / 2.5, "pool_temperature": 0.05}


def ref_relevance(projected, query, pool_temperature=0.05):
    out = []
    for token in projected:
        sims = [cosine(token, word) for word in query]
        weights = [math.exp(s / pool_temperature) for s in sims]
        out.append(sum(w * s for w, s in zip(weights, sims, strict=True)) / sum(weights) if sims else 0.0)
    return np.array(out)


def ref_contrast(projected, query):
    sims = np.array([[cosine(token, word) for word in query] for token in projected])
    words = [column - column.mean() for column in sims.T]
    weights = [column.max() ** 2 for column in words]
    return sum(w * column for w, column in zip(weights, words, strict=True)) / sum(weights)


def ref_score(projected, query, saliency, eta=0.5, temperature=0.016, pool_temperature=1.0, eps=1e-6):
    return ref_fuse(ref_relevance(projected, query, pool_temperature), saliency, eta, temperature, eps)


def ref_fuse(r, saliency, eta=0.5, temperature=0.016, eps=1e-6):
    a = minmax(saliency)
    return np.array(
        [
            (1 - eta) * math.log(max(a[i], eps)) + eta * max((r[i] - r.max()) / temperature, math.log(eps))
            for i in range(len(r))
        ]
    )


def best(score, count, among=None):
    among = range(len(score)) if among is None else among
    return sorted(among, key=lambda i: (-score[i], i))[:count]


def first_largest(values):
    """Both members of a pair are equally close to their centroid: ties go to the first."""
    return next(i for i, value in enumerate(values) if value >= max(values) - 1e-5)


def ref_kmeans(features, free, clusters, iterations=4):
    """Spherical k-means in feature space; the members nearest to their centroids."""
    x = [f / np.linalg.norm(f) for f in features]
    groups = [[free[(2 * j + 1) * len(free) // (2 * clusters)]] for j in range(clusters)]
    for _ in range(iterations):
        centroids = [sum(x[i] for i in group) if group else None for group in groups]
        groups = [[] for _ in range(clusters)]
        for i in free:
            near = [-9.0 if c is None else float(x[i] @ c) / np.linalg.norm(c) for c in centroids]
            groups[first_largest(near)].append(i)
    groups = [group for group in groups if group]
    return [g[first_largest([cosine(x[i], sum(x[j] for j in g)) for i in g])] for g in groups]


def ref_bipartite(features, score, free, target):
    order = sorted(free, key=lambda i: (-score[i], i))
    while len(order) > target:
        evens, odds = order[0::2], order[1::2]
        duplication = {i: max(cosine(features[i], features[j]) for j in odds) for i in evens}
        drop = min(8, len(order) - target)
        order = sorted(evens, key=lambda i, d=duplication: -d[i])[drop:] + odds
    return order


def ref_flashvlm(x, K):
    return ref_top_and_representatives(x, ref_score(x.projected, x.query, x.saliency), K)


def ref_flashvlm_contrast(x, K):
    return ref_top_and_representatives(x, ref_fuse(ref_contrast(x.projected, x.query), x.saliency), K)


def ref_top_and_representatives(x, score, K):
    top = best(score, K // 2)
    free = [i for i in range(len(score)) if i not in top]
    chosen = top + ref_kmeans(x.features, free, K - len(top))
    return top, chosen + best(score, K - len(chosen), [i for i in free if i not in chosen])


def ref_published(x, K):
    r = ref_relevance(x.projected, x.query)
    score = ref_score(x.projected, x.query, x.saliency, **PUBLISHED)
    for i in best(r, math.ceil(len(r) / 200)):
        score[i] += 0.5 * math.log(10)
    return ref_halves(x, score, K)


def ref_vispruner(x, K):
    return ref_halves(x, minmax(x.saliency), K)


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
    q = minmax(ref_relevance(x.projected, x.query))
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
    order = best(ref_relevance(x.projected, x.query), K)
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
