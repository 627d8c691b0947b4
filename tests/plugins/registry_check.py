"""Load a plugin library into the registry of a real TensorRT and ask its creators; run by test_build.py.

    python registry_check.py tensorrt_rtx|tensorrt LIBRARY

Prints as JSON what was found: {plugin: {"fields": [...], "results": [created or not, for each collection tried]}}.
"""

import importlib
import json
import sys

import numpy as np


def main() -> None:
    trt = importlib.import_module(sys.argv[1])
    types = {float: (trt.PluginFieldType.FLOAT32, np.float32), int: (trt.PluginFieldType.INT32, np.int32)}

    def collection(values: dict) -> object:
        fields = []
        for name, value in values.items():
            kind, dtype = types[type(value)]
            fields.append(trt.PluginField(name, np.array([value], dtype), kind))
        return trt.PluginFieldCollection(fields)

    registry = trt.get_plugin_registry()
    registry.load_library(sys.argv[2])
    found = {}
    for name, tries in json.load(sys.stdin).items():
        creator = registry.get_creator(name, "1", "flashvlm")
        results = []
        for values in tries:
            plugin = creator.create_plugin("node", collection(values), trt.TensorRTPhase.BUILD)
            core = plugin and plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
            results.append(bool(core) and (core.plugin_name, core.plugin_namespace) == (name, "flashvlm"))
        found[name] = {"fields": [field.name for field in creator.field_names], "results": results}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
