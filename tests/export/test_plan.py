"""flashvlm-export --plan: what it says before an export is what the export writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashvlm.bundle import Bundle
from flashvlm.manifest import EMBEDDINGS
from flashvlm.profiling.measure import kv_bytes
from flashvlm_export.cli.export import main
from flashvlm_export.families import configs
from flashvlm_export.families.contract import VisualOptions
from flashvlm_export.plan import Plan, PlanOptions, plan
from flashvlm_export.testing.presets import llava
from flashvlm_export.weights.layout import ALIGNMENT
from refusals import assert_refused, run


@pytest.mark.parametrize("kind", ["tiny", "tiny_gqa", "tiny_gqa_half"])
def test_planned_files_and_caches_are_those_of_the_bundle(kind: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle(request.getfixturevalue(f"{kind}_bundle"))
    model = bundle.manifest.model
    checkpoint = request.getfixturevalue(f"{kind.removesuffix('_half')}_checkpoint")
    options = PlanOptions(
        str(checkpoint), bundle.manifest.selection.budgets, model.dtypes.weights, new_tokens=2, text_tokens=2
    )
    found = plan(options)
    for part, file in (("vision", "vision.data"), ("decoder", "decoder.data")):
        size = bundle.manifest.files[file].size
        # To the byte but for the padding of one tensor: which of them a trace puts last, and so leaves unpadded.
        assert abs((found.parts[part].file_bytes or 0) - size) < ALIGNMENT
    assert found.parts["embedding"].file_bytes == bundle.manifest.files[EMBEDDINGS].size
    for budget in found.budgets:
        assert budget.kv_capacity == kv_bytes(bundle, budget.capacity)
    assert found.kv.bytes_at_max_positions == kv_bytes(bundle, found.kv.max_positions)
    stored = (checkpoint / "model.safetensors").stat().st_size
    assert 0 < stored - found.parameters * 4 < 64 << 10  # float32 checkpoints; the rest is their header
    assert found.candidates == bundle.manifest.candidates


def test_the_planned_cache_is_as_large_as_its_arrays(tiny_gqa_checkpoint: Path, tiny_gqa_half_bundle: Path) -> None:
    """Arrays of the decoder's own input shapes, filled in with the planned batch and capacity."""
    found = plan(PlanOptions(str(tiny_gqa_checkpoint), (5,), "float16", max_batch=2)).budgets[0]
    sizes = {"batch": 2, "capacity": found.capacity}
    past = [t for t in Bundle(tiny_gqa_half_bundle).graph("decoder").inputs if t.name.startswith("past_key_values.")]
    arrays = [np.zeros([sizes.get(str(d), d) for d in spec.shape], spec.dtype) for spec in past]
    assert found.kv_capacity == sum(array.nbytes for array in arrays) > 0


@pytest.mark.parametrize(("name", "parameters"), [("llava-1.5-7b", 7.06e9), ("llava-1.5-13b", 13.35e9)])
def test_public_models_need_no_network_and_match_their_presets(name: str, parameters: float) -> None:
    found = plan(PlanOptions(name, (64,)))
    assert found.dtype == "float16"
    assert found.parameters == pytest.approx(parameters, rel=1e-3)
    preset = llava.make_config(llava.PRESETS[name], "float16")
    assert found.parameters == sum(tensor.numel for tensor in llava.list_tensors(preset))
    for part in ("vision_config", "text_config"):
        for key, value in configs()[name][part].items():
            assert preset.to_dict()[part][key] == value, key
    assert found.kv.bytes_per_token == 2 * preset.text_config.num_hidden_layers * preset.text_config.hidden_size * 2


def test_the_recorded_7b_export() -> None:
    """docs/measurements.md: 7.06 B parameters, 14.13 GB of weights; vision 624.2 MB, its engine 630.1 MB."""
    found = plan(PlanOptions("llava-1.5-7b"))
    assert found.parameters * 2 == pytest.approx(14.13e9, abs=5e6)
    vision = found.parts["vision"]
    assert vision.file_bytes == pytest.approx(624.2e6, abs=5e4)
    assert vision.engine_bytes == pytest.approx(630.1e6, rel=1e-3)
    # A layer of the measured decoder of two: (1072.2 MB - head - norm) / 2.
    layer = (1072209920 - 32064 * 4096 * 2) / 2
    assert found.parts["decoder"].file_bytes == pytest.approx(32 * layer + 32064 * 4096 * 2, rel=1e-4)


def test_each_size_of_images_is_an_engine_with_the_weights_of_the_tower() -> None:
    sizes = ((448, 448), (672, 448))
    one, two = (plan(PlanOptions("qwen2.5-vl-3b", visual=VisualOptions(image_sizes=sizes[:n]))) for n in (1, 2))
    assert two.parts["vision"].file_bytes == one.parts["vision"].file_bytes
    assert two.parts["vision"].engine_bytes == pytest.approx(2 * (one.parts["vision"].engine_bytes or 0), abs=1)


def test_a_larger_budget_costs_more_and_a_wider_dtype_twice_as_much(tiny_checkpoint: Path) -> None:
    def planned(**options: Any) -> Plan:
        return plan(PlanOptions(str(tiny_checkpoint), (4, 7), **options))

    half, whole, legacy = planned(dtype="float16"), planned(), planned(dialect="legacy")
    assert whole.dtype == "float32"
    costs = [(b.prompt_tokens, b.prefill_flops, b.kv_used, b.activations) for b in whole.budgets]
    assert costs == sorted(costs)
    assert len(set(costs)) == 3
    assert whole.budgets[-1].prefill_share == 1
    assert (whole.kv.bytes_per_token, whole.host_bytes) == (2 * half.kv.bytes_per_token, 2 * half.host_bytes)
    assert legacy.budgets[0].engine_activations > whole.budgets[0].engine_activations  # scores are materialised
    wide = planned(max_batch=3)
    assert wide.budgets[0].kv_capacity == 3 * whole.budgets[0].kv_capacity
    fixed = planned(max_seq=200)
    assert {b.capacity for b in fixed.budgets} == {200}
    assert fixed.budgets[0].device_total > whole.budgets[0].device_total


def test_tied_embeddings_are_stored_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    tied, untied = plan(PlanOptions(str(folder), (4,))), plan(PlanOptions(str(tiny_checkpoint), (4,)))
    table = tied.parts["embedding"]
    assert untied.parameters - tied.parameters == table.parameters > 0
    assert (untied.parts["decoder"].file_bytes or 0) - (tied.parts["decoder"].file_bytes or 0) >= table.bytes
    assert tied.parts["decoder"].bytes == untied.parts["decoder"].bytes  # an engine has the table of its own
    assert tied.budgets[0].prefill_flops == untied.budgets[0].prefill_flops


def test_the_table_and_the_json_say_the_same(tiny_checkpoint: Path) -> None:
    command = ("--model", tiny_checkpoint, "--budget", "4,all", "--plan")
    table, raw = run(main, *command), run(main, *command, "--json")
    assert (table.code, raw.code) == (0, 0), table.stderr + raw.stderr
    found = Plan.model_validate_json(raw.stdout)
    assert [b.budget for b in found.budgets] == [4, "all"]
    for word in ("vision", "decoder", "embedding", "unused", f"{found.kv.bytes_per_token:,} bytes a token"):
        assert word in table.stdout
    assert "Traceback" not in table.stderr


def test_a_plan_reads_no_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    assert plan(PlanOptions(str(tmp_path), (4,))).parameters == plan(PlanOptions(str(tiny_checkpoint), (4,))).parameters
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model", "MODEL"), "or --plan, to see sizes without one"),
        (("--model", "MODEL", "--plan", "--budget", "17"), "expected 1 to 16"),
        (("--model", "MODEL", "--plan", "--budget", "4", "--max-seq", "9"), "needs 107 rows"),
        (("--model", "MODEL", "--plan", "--budget", "4", "--max-seq", "1000000"), "max_position_embeddings"),
        (("--model", "MODEL", "--plan", "--max-batch", "0"), "--max-batch 0: expected at least 1"),
        (("--model", "MODEL", "--plan", "--new-tokens", "0"), "--new-tokens 0: expected at least 1"),
        (("--model", "nowhere", "--plan"), "unknown model 'nowhere'"),
    ],
)
def test_plans_are_refused(tiny_checkpoint: Path, flags: tuple[str, ...], expected: str) -> None:
    assert_refused(run(main, *(str(tiny_checkpoint) if f == "MODEL" else f for f in flags)), expected)


def test_a_config_without_a_dtype_or_of_another_family_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    nameless = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    nameless["text_config"] = {k: v for k, v in config["text_config"].items() if k not in ("dtype", "torch_dtype")}
    other = config | {"model_type": "bert"}
    for changed, expected in ((nameless, "names no dtype"), (other, "'bert' is not supported")):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert_refused(run(main, "--model", tmp_path, "--plan", "--budget", "4"), expected)


def test_arguments_are_checked_before_torch_is_imported() -> None:
    code = """
import sys
sys.argv = ["flashvlm-export", "--model", "llava-1.5-7b", "--plan", "--max-batch", "0"]
from flashvlm_export.cli.export import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 2
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
