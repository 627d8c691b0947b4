"""What timings are called, for those who take them and those who judge them."""

from __future__ import annotations

SELECTION, SCORE, LLOYD = "whole selection", "score", "choice"
EAGER, PUBLISHED, COMPILED = "torch eager flashvlm", "torch eager flashvlm-published", "torch.compile flashvlm"
FLOOR = "memory floor"
HOT, COLD, LAUNCHES = "graph, hot", "graph, cold", "launches"
