// flashvlm::TextGuidedScore: projected, query, query_mask, saliency, valid -> scores.
#include "plugin.h"

namespace flashvlm {
namespace {

struct ScoreParameters {
  float eta, temperature, pool_temperature, eps;

  static ScoreParameters read(FieldReader& reader) {
    return {reader.number("eta", 0.0f, 1.0f), reader.number("temperature", 1e-6f, 1e6f),
            reader.number("pool_temperature", 1e-6f, 1e6f), reader.number("eps", 1e-30f, 0.5f)};
  }
  std::vector<PluginField> fields() const {
    return {{"eta", &eta, PluginFieldType::kFLOAT32, 1},
            {"temperature", &temperature, PluginFieldType::kFLOAT32, 1},
            {"pool_temperature", &pool_temperature, PluginFieldType::kFLOAT32, 1},
            {"eps", &eps, PluginFieldType::kFLOAT32, 1}};
  }
};

class TextGuidedScore : public Plugin<TextGuidedScore, ScoreParameters> {
 public:
  static constexpr char kName[] = "TextGuidedScore";
  enum Input { kProjected, kQuery, kQueryMask, kSaliency, kValid, kInputs };
  static constexpr int kOutputs = 1;

  using Plugin::Plugin;

  template <class TypeOf>
  static bool allows(int position, TypeOf type_of) {
    switch (position) {
      case kProjected: return is_float(type_of(kProjected));
      case kQuery: return type_of(kQuery) == type_of(kProjected);
      case kQueryMask: return is_mask(type_of(kQueryMask));
      case kValid: return type_of(kValid) == type_of(kQueryMask);
      default: return type_of(position) == DataType::kFLOAT;  // saliency, scores
    }
  }

  bool check(const Dims* dims) const {
    static constexpr const char* kAxes[] = {"BND", "BLD", "BL", "BN", "BN"};
    return dims_agree(kName, dims, kAxes, kInputs) && width_fits(kName, "D", dims[kProjected].d[2]) &&
           size_within(kName, "B", dims[kProjected].d[0], 1, FLASHVLM_MAX_BATCH) &&
           size_within(kName, "N", dims[kProjected].d[1], 1, FLASHVLM_MAX_TOKENS) &&
           size_within(kName, "L", dims[kQuery].d[1], 1, FLASHVLM_MAX_TEXT);
  }

  size_t workspace(const Dims* dims) const {
    return flashvlm_score_workspace(static_cast<int32_t>(dims[kProjected].d[0]),
                                    static_cast<int32_t>(dims[kProjected].d[1]),
                                    static_cast<int32_t>(dims[kQuery].d[1]),
                                    static_cast<int32_t>(dims[kProjected].d[2]));
  }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType*, int32_t) const noexcept override {
    if (outputs != kOutputs) return 1;
    types[0] = DataType::kFLOAT;
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept override {
    if (inputs != kInputs || outputs != kOutputs || in[kProjected].nbDims != 3) return 1;
    out[0].nbDims = 2;
    out[0].d[0] = in[kProjected].d[0];
    out[0].d[1] = in[kProjected].d[1];
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace_bytes, cudaStream_t stream) noexcept override {
    flashvlm_score_call call{};
    call.batch = static_cast<int32_t>(in[kProjected].dims.d[0]);
    call.tokens = static_cast<int32_t>(in[kProjected].dims.d[1]);
    call.text = static_cast<int32_t>(in[kQuery].dims.d[1]);
    call.width = static_cast<int32_t>(in[kProjected].dims.d[2]);
    call.dtype = dtype_of(in[kProjected].type);
    call.mask_bytes = mask_bytes(in[kQueryMask].type);
    call.eta = parameters().eta;
    call.temperature = parameters().temperature;
    call.pool_temperature = parameters().pool_temperature;
    call.eps = parameters().eps;
    call.projected = inputs[kProjected];
    call.query = inputs[kQuery];
    call.query_mask = inputs[kQueryMask];
    call.saliency = static_cast<const float*>(inputs[kSaliency]);
    call.valid = inputs[kValid];
    call.scores = static_cast<float*>(outputs[0]);
    // TensorRT gave what workspace() asked for; the same function of the actual sizes is never more.
    const size_t bytes = flashvlm_score_workspace(call.batch, call.tokens, call.text, call.width);
    return explained(flashvlm_score(&call, workspace_bytes, bytes, stream));
  }
};

}  // namespace

nvinfer1::IPluginCreatorV3One& text_guided_score_creator() {
  static Creator<TextGuidedScore, ScoreParameters> creator;
  return creator;
}

}  // namespace flashvlm
