"""Files as trtexec writes them."""

# As samples/common/sampleReporting.cpp prints them: spaces around colons, commas before entries.
TIMES = """[
  { "startEnqMs" : 10.5, "endEnqMs" : 10.9, "startH2dMs" : 0, "endH2dMs" : 0, "startComputeMs" : 11, "endComputeMs" : 13
, "startD2hMs" : 0, "endD2hMs" : 0, "h2dMs" : 0, "computeMs" : 2, "d2hMs" : 0, "latencyMs" : 2 }
, { "startEnqMs" : 13.5, "endEnqMs" : 13.9, "startComputeMs" : 14, "endComputeMs" : 17
, "h2dMs" : 0, "computeMs" : 3, "d2hMs" : 0, "latencyMs" : 3 }
, { "startEnqMs" : 17.5, "endEnqMs" : 17.9, "startComputeMs" : 18, "endComputeMs" : 22
, "h2dMs" : 0, "computeMs" : 4, "d2hMs" : 0, "latencyMs" : 4 }
]
"""
PROFILE = """[
  { "count" : 310 }
, { "name" : "Reformatting CopyNode for Input Tensor 0 to /vision/vision_tower/embeddings/patch_embedding/Conv", "timeMs" : 31, "averageMs" : 0.1, "medianMs" : 0.1, "percentage" : 5 }
, { "name" : "/decoder/language_model/layers.0/self_attn/q_proj/MatMul + /decoder/language_model/layers.0/self_attn/Reshape", "timeMs" : 124, "averageMs" : 0.5, "medianMs" : 0.4, "percentage" : 20 }
, { "name" : "__myl_MulAddSum_myl0_3", "timeMs" : 310, "averageMs" : 1.1, "medianMs" : 1, "percentage" : 50 }
, { "name" : "{ForeignNode[/decoder/language_model/layers.1/mlp/gate_proj/MatMul.../decoder/language_model/layers.1/mlp/Mul]}", "timeMs" : 155, "averageMs" : 0.6, "medianMs" : 0.5, "percentage" : 25 }
]
"""  # noqa: E501
LAYERS = """{"Layers": [{
  "Name": "__myl_MulAddSum_myl0_3", "LayerType": "kgen", "Inputs": [], "Outputs": [], "TacticName": "__myl_MulAddSum",
  "StreamId": 0,
  "Metadata": "[ONNX Layer: /decoder/language_model/layers.0/mlp/Mul]\x1f[ONNX Layer: /decoder/language_model/layers.0/mlp/down_proj/MatMul]\x1e[ONNX Layer: /decoder/language_model/layers.0/Add]"
}],
"Bindings": ["inputs_embeds"
,"logits"
]}
"""  # noqa: E501
NAMES_ONLY = '{"Layers": ["/vision/Add"\n,"__myl_Move_myl0_0"\n],\n"Bindings": ["pixel_values"\n]}\n'
