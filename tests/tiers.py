"""Which tier a test is in, by its file. A marker on a test, or a file's ``pytestmark``, says otherwise.

unit      one module of the runtime or a script, without torch and without a bundle
graph     what an export makes of a checkpoint, and what it refuses
parity    the same as something else: literal references, transformers, torch and ONNX Runtime
engines   sessions, compilers and plugins, over stand-ins and emulations
commands  command lines and scripts, from end to end
"""

from __future__ import annotations

TIERS = {
    "attacks": "commands",
    "attacks/test_chat_templates.py": "unit",
    "attacks/test_graph_bytes.py": "unit",
    "attacks/test_graphs.py": "unit",
    "attacks/test_inputs.py": "unit",
    "attacks/test_tokenizer_files.py": "unit",
    "export": "graph",
    "export/test_compile.py": "engines",
    "export/test_demo_model.py": "parity",
    "export/test_every_method.py": "parity",
    "export/test_export_refusals.py": "commands",
    "export/test_visual_flags.py": "commands",
    "export/test_internvl.py": "parity",
    "export/test_llava.py": "parity",
    "export/test_parity.py": "parity",
    "export/test_selection.py": "parity",
    "plugins": "engines",
    "runtime": "commands",
    "runtime/test_backends.py": "engines",
    "runtime/test_chat_template.py": "unit",
    "runtime/test_frames.py": "parity",
    "runtime/test_contact_sheet.py": "unit",
    "runtime/test_images.py": "unit",
    "runtime/test_budget.py": "unit",
    "runtime/test_messages.py": "unit",
    "runtime/test_picture.py": "unit",
    "runtime/test_picture_tiles.py": "unit",
    "runtime/test_preprocess.py": "parity",
    "runtime/test_prompt.py": "parity",
    "runtime/test_processor.py": "parity",
    "runtime/test_sampling.py": "unit",
    "runtime/test_statistics.py": "unit",
    "runtime/test_stopping.py": "unit",
    "runtime/test_token_boxes.py": "unit",
    "runtime/test_split_pattern.py": "unit",
    "runtime/test_video_messages.py": "unit",
    "runtime/test_videos.py": "unit",
    "runtime/test_tensorrt_session.py": "engines",
    "runtime/test_tensorrt_session_calls.py": "engines",
    "scripts": "commands",
    "test_imports.py": "unit",
    "scripts/test_models.py": "graph",
    "scripts/test_scenes.py": "unit",
    "test_tiers.py": "unit",
}
# What CI runs and a commit does not wait for (marker thorough): beginnings of the ids of tests, each with an export or
# more of its own, beside others of its kind that stay.
THOROUGH = (
    "attacks/test_code_in_checkpoints.py::test_code_that_would_be_used_is_refused",
    "attacks/test_fuzz.py::test_a_few_of_each_class",
    "export/test_budget_scope.py",
    "export/test_compile.py::test_one_process_builds_for_both",
    "export/test_compile.py::test_every_graph_becomes_an_engine[legacy]",
    "export/test_demo_model.py",
    "export/test_every_method.py::test_onnx_keeps_the_same_tokens[cdpruner]",
    "export/test_every_method.py::test_onnx_keeps_the_same_tokens[vispruner]",
    "export/test_every_method.py::test_onnx_keeps_the_same_tokens[visionzip]",
    "export/test_every_method.py::test_onnx_keeps_the_same_tokens[divprune]",
    "export/test_every_method.py::test_onnx_keeps_the_same_tokens[flashvlm-",
    "export/test_every_method.py::test_onnx_breaks_ties_the_same_way[cdpruner",
    "export/test_every_method.py::test_onnx_breaks_ties_the_same_way[vispruner",
    "export/test_every_method.py::test_onnx_breaks_ties_the_same_way[visionzip",
    "export/test_every_method.py::test_onnx_breaks_ties_the_same_way[divprune",
    "export/test_every_method.py::test_onnx_breaks_ties_the_same_way[flashvlm-",
    "export/test_export_refusals.py::test_something_else_arrives_meanwhile",
    "export/test_export_refusals.py::test_force_replaces_a_bundle_and_its_engines",
    "export/test_graph_operators.py::test_every_method",
    "export/test_killed.py",
    "export/test_llava.py::TestLlava",
    "export/test_llava_onevision.py",
    "export/test_onnx_export.py::test_two_exports_are_equal_byte_for_byte",
    "export/test_parity.py::test_",
    "export/test_plugin_nodes.py::test_a_partition_of_projected_tokens_reads_those",
    "export/test_polygraphy.py",
    "export/test_qwen2_5_vl.py",
    "export/test_testing.py::test_command_line",
    "export/test_toy_family.py::test_equal_to_torch",
    "export/test_toy_family.py::test_positions_have_three_axes",
    "export/test_toy_family.py::test_a_picture_of_each_image",
    "export/test_toy_family.py::test_the_manifest_says_all_of_it",
    "export/test_toy_family.py::test_a_plan_is_what_an_export_writes",
    "export/test_toy_family.py::test_the_stand_in_of_tensorrt_answers_alike",
    "export/test_toy_family.py::test_tensorrt_rtx_builds_it",
    "export/test_toy_video.py",
    "export/test_video_llava.py",
    "export/test_weights.py::test_a_tied_table_is_stored_once_and_gives_transformers_logits",
    "plugins/test_build.py::test_without_nvcc_the_emulation_is_built",
    "runtime/test_tensorrt_session.py::test_legacy_rows_are_placed_on_the_device",
    "scripts/test_gpu_check.py::test_the_emulation_is_checked_and_called_by_its_name",
    "scripts/test_quality.py::test_variants_share_the_weights_of_their_model",
    "scripts/test_quality.py::test_answers_are_those_of_the_variants_pipelines",
    "test_readme.py::test_the_demo_answers_and_draws",
    "test_readme.py::test_the_commands_of_the_readme_run",
)
NAMES = ("unit", "graph", "parity", "engines", "commands")
UNIT_LACKS = ("torch", "transformers")  # not importable in a run of this tier alone


def tier_of(path: str) -> str:
    """The tier of a file, named from tests/: its own, or that of its folder, or commands."""
    return TIERS.get(path) or TIERS.get(path.partition("/")[0], "commands")


def is_thorough(test: str) -> bool:
    """Whether a test, by its id from tests/, waits for CI. All over LLaVA's bundle of the older dialect do."""
    return test.startswith(THOROUGH) or "tiny_gqa_legacy" in test
