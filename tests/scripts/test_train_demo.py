"""Training of the demo model: a stage that was cut short goes on as if it had not been; losses read what they say."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from demo_model import batches, build, evaluate, ship, train
from demo_model.batches import Batches, Plan
from demo_model.stages import STAGES, Demo, Stage
from demo_model.turns import IGNORED, Turns
from demo_model.words import ATTRIBUTES, OF_THINGS
from flashvlm.text.processor import TextProcessor
from flashvlm_export.checkpoint import SHIPPED
from scenes.exam import conversations
from scenes.questions import NUMBERS, Question, ask
from scenes.world import sample_scene


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    build.save_processor(folder)
    return folder


def small(stage: str, **more: object) -> Stage:
    plan = Plan(scenes=2, questions=2, sides=(6,), **more)  # type: ignore[arg-type]
    return Stage(((0.0, plan),), STAGES[stage].trained, 1e-3)


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.slow
def test_a_killed_stage_resumes_to_the_same_weights(
    processor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "words", small("words", pixels=False, labels=True, grounds=(3, 3)))
    monkeypatch.setattr(train, "SAVED_EVERY", 2)
    folders = []
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        for file in processor.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        folders.append(folder)

    seen: list[int] = []

    def killing(step: int, losses: dict[str, float]) -> None:
        seen.append(step)
        if step == 3:
            raise Killed

    whole = train.train("words", 4, folders[0], (), lambda step, losses: None, 1, 0)
    with pytest.raises(Killed):
        train.train("words", 4, folders[1], (), killing, 1, 0)
    resumed = train.train("words", 4, folders[1], (), lambda step, losses: seen.append(step), 1, 0)
    assert seen == [1, 2, 3, 3, 4]
    a, b = load_file(whole), load_file(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_two_processes_average_their_gradients(
    processor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of two processes is the step that the mean of their gradients gives."""
    monkeypatch.setattr(train, "WARM_UP", 1)
    monkeypatch.setattr(train, "AVERAGED", 0.0)
    for file in processor.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = load_file(train.train_together(2, "words", 1, tmp_path, (), lambda step, losses: None, 1, 0))
    assert not list(tmp_path.glob(".words.*"))

    demo = train.load_demo(processor)
    named = {n: p for n, p in demo.named_parameters() if n.startswith(STAGES["words"].trained)}
    for rank in range(2):
        ((_, _, plan),) = [span for span in train._spans(STAGES["words"].plans, 1) if span[0] < span[1]]
        half = replace(plan, scenes=plan.scenes // 2)
        batch = Batches(half, f"words/{rank}" if rank else "words", range(1), processor)[0]
        torch.manual_seed(rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = demo("words", batch)
        ((losses["answer"] + losses["nouns"]) / 2).backward()
    torch.nn.utils.clip_grad_norm_(named.values(), train.CLIP)
    for optimizer in train._optimizers(named):
        for group in optimizer.param_groups:
            group["lr"] = STAGES["words"].learning_rate * (train.MUON if isinstance(optimizer, torch.optim.Muon) else 1)
        optimizer.step()
    for name, parameter in named.items():
        assert torch.allclose(parameter, found[name], atol=1e-4), name


def test_each_stage_moves_only_what_it_trains(processor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = train.load_demo(processor)
    plans = {
        "words": {"pixels": False, "labels": True, "grounds": (3, 3)},
        "tower": {"pixels": True, "labels": True},
        "align": {"pixels": True, "labels": True},
        "answer": {"pixels": True, "labels": True},
    }
    for name, plan in plans.items():
        batch = Batches(Plan(scenes=2, questions=9, sides=(6,), **plan), name, range(1), processor)[0]
        demo.zero_grad()
        losses = demo(name, batch)
        sum(value for key, value in losses.items() if key != "token accuracy").backward()
        moved = {n for n, p in demo.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(n.startswith(prefix) for n in moved for prefix in STAGES[name].trained)
        assert all(any(n.startswith(prefix) for n in moved) for prefix in STAGES[name].trained)


def test_a_stage_can_train_a_part_alone(processor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "words", small("words", pixels=False, labels=True, grounds=(3, 3)))
    for file in processor.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rates: list[float] = []

    def report(step: int, losses: dict[str, float]) -> None:
        rates.append(losses["rate"])

    written = load_file(train.train("words", 1, tmp_path, (), report, 1, 0, only=("nouns.",), pace=2.0))
    assert {name.split(".")[0] for name in written} == {"nouns"}
    assert rates == [2 * 1e-3 / train.WARM_UP]


def test_a_shipped_model_can_be_trained_on(processor: Path, tmp_path: Path) -> None:
    demo = train.load_demo(processor)
    with torch.no_grad():
        for parameter in demo.parameters():
            parameter.add_(0.01)
    ship.round_weights(demo)
    ship.ship(demo, tmp_path, "card")
    ship.unpack(tmp_path, tmp_path / "start")
    again = train.load_demo(processor, *(tmp_path / "start" / f"{stage}.safetensors" for stage in STAGES))
    for (name, a), b in zip(demo.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) or name.startswith(ship.HEADS), name


def test_targets_are_the_answers(processor: Path) -> None:
    turns = Turns(processor)
    encoded = turns.encode([[[("What color is the star?", "red")], [("Where is it?", "top left")]]], [5])
    assert (encoded["prefix_ids"][0] == turns.image_id).sum() == 5
    targets, number = encoded["targets"], encoded["number"]
    answers = [targets[(number == i) & (targets != IGNORED)].tolist() for i in range(2)]
    words = [turns.word_ids()[a, w].item() for a, w in ((0, 1), (7, 1), (8, 1))]  # red, top, left
    assert answers == [[words[0], turns.end_id], [words[1], words[2], turns.end_id]]
    together = turns.encode([[[("What color is the star?", "red"), ("Where is it?", "top left")]]], [5])["targets"]
    assert together[together != IGNORED].tolist() == [*answers[0], *answers[1]]


def test_a_conversation_is_what_the_chat_template_renders(processor: Path) -> None:
    turns, messages = Turns(processor), []
    for i, (question, answer) in enumerate(ASKED):
        content = [{"type": "image"}] * (not i) + [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        prompt = (
            TextProcessor.from_folder(processor).encode(messages[:-1], {"image": turns.image_id}).input_ids.tolist()
        )
        assert turns.prompt(ASKED[:i], question, 1).tolist() == prompt
    encoded = turns.encode([[ASKED]], [1])
    ids = [*encoded["prefix_ids"][0].tolist(), *encoded["question_ids"][encoded["number"] == 0].tolist()]
    assert ids[: len(prompt)] == prompt
    assert turns.decode(ids[len(prompt) : -1]) == ASKED[-1][1]
    assert ids[-1] == turns.end_id


def test_nouns_stand_for_the_things_they_name(processor: Path) -> None:
    """Read from the words: whatever a question says of a thing is so of the thing its noun points to."""
    batch = Batches(Plan(4, 30, (24,), pixels=False, labels=True), "words", range(1), processor)[0]
    turns, checked = Turns(processor), 0
    words = {turns._tokenizer.id_to_token(i).strip("▁"): i for i in range(turns._tokenizer.get_vocab_size())}
    known = {words[word]: (a, w) for a, name in enumerate(OF_THINGS[:4]) for w, word in enumerate(ATTRIBUTES[name], 1)}
    known[words["little"]], known[words["big"]] = known[words["small"]], known[words["large"]]
    for ids, things in zip(batch["question_ids"].flatten(0, 1), batch["thing"].flatten(0, 1), strict=True):
        for at in torch.nonzero(things >= 0).flatten().tolist():
            start = at - 1
            while ids[start].item() != words["the"]:
                start -= 1
            for said in ids[start + 1 : at + 1].tolist():
                if said == words["thing"]:
                    continue
                attribute, label = known[said]
                assert batch["things"][things[at], attribute] == label
                checked += 1
    assert checked > 50


def test_nouns_know_how_many_there_are(processor: Path) -> None:
    batch = Batches(Plan(4, 30, (24,), pixels=False, labels=True), "words", range(1), processor)[0]
    answer = {Turns(processor)._tokenizer.encode(word).ids[-1]: word for word in (*NUMBERS, "yes", "no")}
    counted = batch["number_of"] >= 0
    assert (batch["number_of"][counted] > 1).any()
    seen = set()
    for row, slot, at in torch.nonzero(counted).tolist():
        number, targets = batch["number"][row, slot], batch["targets"][row, slot]
        said = answer[int(targets[(batch["number"][row, slot] == number[at]) & (targets != IGNORED)][0])]
        known = int(batch["number_of"][row, slot, at])
        assert said == (NUMBERS[known] if said in NUMBERS else "yes" if known else "no")
        seen.add(said)
    assert seen == {*NUMBERS, "yes", "no"}


def test_questions_of_training_never_name_what_training_never_shows() -> None:
    assert Question("existence", "Is there a red dotted diamond?", "no", ()).names_held_out
    assert Question("counting", "How many red diamonds are there?", "zero", ()).names_held_out
    assert not Question("counting", "Count the checkered diamonds.", "zero", ()).names_held_out
    scene, rng = sample_scene("train/0", training=True), random.Random(0)
    assert any(ask(scene, rng, "existence").names_held_out for _ in range(300))
    rng = random.Random(0)
    assert not any(batches._ask(scene, rng, "existence").names_held_out for _ in range(300))


ASKED = [
    ("What color is the star?", "red"),
    ("Which is further left, the large purple striped ring or the small yellow plain moon?", "the small moon"),
    ("Which one is lower: the large purple striped ring or the small yellow plain moon?", "the large ring"),
    ("Is it?", "yes"),
]


def test_a_conversation_among_others_reads_as_it_would_alone(processor: Path) -> None:
    """Beside other questions and in a batch with a longer image, and as transformers' own attention reads it."""
    demo, turns = train.load_demo(processor).eval(), Turns(processor)
    visual = torch.randn(5 + 9, demo.config.text_config.hidden_size)
    chats = [[one] for one in ASKED] + [ASKED[:2], ASKED[1:]]
    with torch.no_grad():
        encoded = turns.encode([chats, chats[:1]], [5, 9])
        assert encoded["number"].shape[1] > 1  # slots
        states, targets = demo.read(encoded, visual)
        hidden = states[-1]
        model = demo.model.language_model
        model.config._attn_implementation = "eager"
        for i, chat in enumerate(chats):
            alone = turns.encode([[chat]], [5])
            ids = torch.cat([alone["prefix_ids"], alone["question_ids"][alone["number"] == 0][None]], 1)
            embedded = model.embed_tokens(ids)
            embedded[ids == turns.image_id] = visual[:5]
            own = model(inputs_embeds=embedded).last_hidden_state[:, alone["prefix_ids"].shape[1] : -1]
            wanted = alone["targets"][alone["number"] == 0][None, 1:] != IGNORED
            asked = (encoded["number"][0, :, 1:] == i) & (targets[0] != IGNORED)
            assert asked.any()
            assert torch.allclose(hidden[0][asked], own[wanted], atol=1e-5)


def test_plans_ask_some_questions_in_conversations(processor: Path) -> None:
    """Each turn of a conversation has its nouns, and answers of its own to learn."""
    batch = Batches(Plan(3, 9, (24,), pixels=True, labels=True, turns=(4, 2)), "answer", range(1), processor)[0]
    end = Turns(processor).end_id
    for number, targets in zip(batch["number"], batch["targets"], strict=True):
        assert [(targets[number == i] == end).sum() for i in range(5)] == [4, 2, 1, 1, 1]
    assert (batch["number"].max(), batch["position_ids"].max() > 576 + 64) == (4, True)


def test_own_answers_are_what_training_reads(processor: Path, tmp_path: Path) -> None:
    """Said one token at a time behind what was said before, with the shipped weights."""
    ship.unpack(SHIPPED["demo"], tmp_path)
    demo, turns = train.load_demo(processor, tmp_path / "answer.safetensors").eval(), Turns(processor)
    history: list[tuple[str, str]] = []
    with torch.inference_mode():
        (asked,) = conversations(7, 3)
        visual = evaluate._visual(demo, asked[0].scene)
        for item in asked:
            answer = evaluate._answer(demo, turns, visual, history, item.question.text)
            history.append((item.question.text, answer))
        states, targets = demo.read(turns.encode([[history]], [len(visual)]), visual)
        likeliest = demo.lm_head(states[-1]).argmax(-1)
    assert torch.equal(likeliest[targets != IGNORED], targets[targets != IGNORED])
    right = [float(answer == item.question.answer) for (_, answer), item in zip(history, asked, strict=True)]
    assert evaluate.accuracy_by_turn(demo, processor, 7, 3, "test") == right


def test_windows_see_their_own_place(processor: Path) -> None:
    """A whole scene through ``see`` is what transformers' own tower makes of it, features and CLS alike."""
    demo: Demo = train.load_demo(processor).eval()
    batch = Batches(Plan(1, 0, (24,), pixels=True, labels=False), "tower", range(1), processor)[0]
    with torch.no_grad():
        features, cls = demo.see(batch)
        tower = demo.model.vision_tower(batch["pixel_values"], output_hidden_states=True)
    assert torch.allclose(features, tower.hidden_states[-2][:, 1:], atol=1e-4)
    assert torch.allclose(cls, tower.last_hidden_state[:, 0], atol=1e-4)
