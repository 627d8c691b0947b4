"""Image features by content: vision runs once for an image, whatever is asked about it."""

from __future__ import annotations

import threading
from collections import OrderedDict

from flashvlm.sessions import ImageFeatures

Key = tuple[str, str]  # digest of the pixels, vision graph


class FeatureCache:
    """The features of the images used last, at most ``size``. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._features: OrderedDict[Key, ImageFeatures] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> ImageFeatures | None:
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def put(self, key: Key, features: ImageFeatures) -> None:
        with self._lock:
            self._features[key] = features
            self._features.move_to_end(key)
            if len(self._features) > self._size:
                self._features.popitem(last=False)

    def clear(self) -> None:
        with self._lock:
            self._features.clear()
