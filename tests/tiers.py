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
    "scripts/test_scenes.py": "unit",
    "test_tiers.py": "unit",
}
NAMES = ("unit", "graph", "parity", "engines", "commands")
UNIT_LACKS = ("torch", "transformers")  # not importable in a run of this tier alone


def tier_of(path: str) -> str:
    """The tier of a file, named from tests/: its own, or that of its folder, or commands."""
    return TIERS.get(path) or TIERS.get(path.partition("/")[0], "commands")
