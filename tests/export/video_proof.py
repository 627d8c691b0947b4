"""What a family that takes videos has to show beside ``FamilyProof``, over the same bundle."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from family_proof import QUESTION, STEPS, FamilyProof, Message, Reference, text, user
from test_parity import TOLERANCE, Recorded, picture

from flashvlm.errors import VideoError


def film(frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Frames of noise, each another."""
    return [picture(size, 100 + number) for number in range(frames)]


class VideoProof(FamilyProof):
    """``options`` of such a family ask for frames."""

    video: ClassVar[list[np.ndarray]] = film(11, (40, 52))
    fps: ClassVar[float] = 5.0
    video_budget: ClassVar[int] = 7

    # --- what a family says literally ---

    def shown(self) -> list[int]:
        """Which frames of ``video`` its processor takes."""
        raise NotImplementedError

    def video_inputs(self, reference: Reference, messages: list[Message], frames: list[np.ndarray]) -> Any:
        """What transformers' processor makes of a prompt with one video, whose frames these are."""
        raise NotImplementedError

    def messages(self, video: Any = None) -> list[Message]:
        shown = {"type": "video"} if video is None else {"type": "video", "video": video, "fps": self.fps}
        return [user(text("Watch:"), shown, text(QUESTION))]

    def prompt_of_video(self, reference: Reference) -> tuple[list[Message], list[Message], list[np.ndarray], Any]:
        frames = [self.video[i] for i in self.shown()]
        theirs = self.messages()
        return self.messages(self.video), theirs, frames, self.video_inputs(reference, theirs, frames)

    # --- tests ---

    def test_video_with_all_tokens(self, recorded: Recorded, reference: Reference) -> None:
        ours, _, _, inputs = self.prompt_of_video(reference)
        said, logits = reference.generate(inputs)
        answer = recorded.chat(ours, budget="all", max_new_tokens=1 + STEPS)
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert list(answer.token_ids) == said
        assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE

    def test_video_with_some_tokens(self, recorded: Recorded, reference: Reference) -> None:
        ours, theirs, frames, inputs = self.prompt_of_video(reference)
        answer = recorded.chat(ours, budget=self.video_budget, max_new_tokens=1 + STEPS)
        (selection,) = answer.selections
        video: Any = np.stack(frames)
        chosen = self.chosen(reference, theirs, [video], inputs, [selection.count], self.video_budget)
        assert selection.kept.tolist() == chosen[0].tolist()
        keep = recorded.pipeline.bundle.manifest.selection.positions == "keep"
        logits = np.stack([row.numpy() for row in self.pruned(reference, inputs, chosen, [selection.count], keep)])
        assert list(answer.token_ids) == logits.argmax(-1).tolist()
        assert np.abs(np.concatenate(recorded.logits) - logits).max() <= TOLERANCE

    def test_video_with_too_few_frames(self, recorded: Recorded) -> None:
        with pytest.raises(VideoError, match="expected a video of at least"):
            recorded.chat(self.messages(self.video[:1]), max_new_tokens=1)
