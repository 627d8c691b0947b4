// flashvlm::MaskedLloyd: features, scores, valid -> kept, is_top.
//
// is_top is int32: plugin outputs of type bool are documented as unsupported up to TensorRT 11.1.
#include "plugin.h"

namespace flashvlm {
namespace {

struct LloydParameters {
  int32_t budget, top_count, iterations;

  static LloydParameters read(FieldReader& reader) {
    LloydParameters parameters{};
    parameters.budget = reader.integer("budget", 1, FLASHVLM_MAX_TOKENS);
    // A count, not a ratio: floor(budget * ratio) in float32 and in Python differ (10 * 0.7f is 6.9999999).
    parameters.top_count = reader.integer("top_count", 0, FLASHVLM_MAX_TOKENS);
    parameters.iterations = reader.integer("iterations", 0, 100);
    if (parameters.top_count > parameters.budget) {
      reader.refuse("attribute top_count: expected 0 to budget = %d, found %d", parameters.budget,
                    parameters.top_count);
    }
    return parameters;
  }
  std::vector<PluginField> fields() const {
    return {{"budget", &budget, PluginFieldType::kINT32, 1},
            {"top_count", &top_count, PluginFieldType::kINT32, 1},
            {"iterations", &iterations, PluginFieldType::kINT32, 1}};
  }
};

class MaskedLloyd : public Plugin<MaskedLloyd, LloydParameters> {
 public:
  static constexpr char kName[] = "MaskedLloyd";
  enum Input { kFeatures, kScores, kValid, kInputs };
  enum Output { kKept, kIsTop, kOutputs };

  using Plugin::Plugin;

  template <class TypeOf>
  static bool allows(int position, TypeOf type_of) {
    switch (position) {
      case kFeatures: return is_float(type_of(kFeatures));
      case kScores: return type_of(kScores) == DataType::kFLOAT;
      case kValid: return is_mask(type_of(kValid));
      default: return type_of(position) == DataType::kINT32;  // kept, is_top
    }
  }

  bool check(const Dims* dims) const {
    static constexpr const char* kAxes[] = {"BND", "BN", "BN"};
    return dims_agree(kName, dims, kAxes, kInputs) && width_fits(kName, "Dv", dims[kFeatures].d[2]) &&
           size_within(kName, "B", dims[kFeatures].d[0], 1, FLASHVLM_MAX_BATCH) &&
           size_within(kName, "N", dims[kFeatures].d[1], parameters().budget, FLASHVLM_MAX_TOKENS);
  }

  size_t workspace(const Dims* dims) const {
    return flashvlm_lloyd_workspace(static_cast<int32_t>(dims[kFeatures].d[0]),
                                    static_cast<int32_t>(dims[kFeatures].d[1]),
                                    static_cast<int32_t>(dims[kFeatures].d[2]), parameters().budget,
                                    parameters().top_count);
  }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType*, int32_t) const noexcept override {
    if (outputs != kOutputs) return 1;
    types[kKept] = types[kIsTop] = DataType::kINT32;
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override {
    if (inputs != kInputs || outputs != kOutputs || in[kFeatures].nbDims != 3) return 1;
    for (int i = 0; i < kOutputs; ++i) {
      out[i].nbDims = 2;
      out[i].d[0] = in[kFeatures].d[0];
      out[i].d[1] = builder.constant(parameters().budget);
    }
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace_bytes, cudaStream_t stream) noexcept override {
    flashvlm_lloyd_call call{};
    call.batch = static_cast<int32_t>(in[kFeatures].dims.d[0]);
    call.tokens = static_cast<int32_t>(in[kFeatures].dims.d[1]);
    call.width = static_cast<int32_t>(in[kFeatures].dims.d[2]);
    call.dtype = dtype_of(in[kFeatures].type);
    call.mask_bytes = mask_bytes(in[kValid].type);
    call.budget = parameters().budget;
    call.top_count = parameters().top_count;
    call.iterations = parameters().iterations;
    call.features = inputs[kFeatures];
    call.scores = static_cast<const float*>(inputs[kScores]);
    call.valid = inputs[kValid];
    call.kept = static_cast<int32_t*>(outputs[kKept]);
    call.is_top = static_cast<int32_t*>(outputs[kIsTop]);
    // TensorRT gave what workspace() asked for; the same function of the actual sizes is never more.
    const size_t bytes =
        flashvlm_lloyd_workspace(call.batch, call.tokens, call.width, call.budget, call.top_count);
    return explained(flashvlm_lloyd(&call, workspace_bytes, bytes, stream));
  }
};

}  // namespace

nvinfer1::IPluginCreatorV3One& masked_lloyd_creator() {
  static Creator<MaskedLloyd, LloydParameters> creator;
  return creator;
}

}  // namespace flashvlm

// What trtexec --dynamicPlugins and IPluginRegistry::loadLibrary look for.
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&flashvlm::text_guided_score_creator(),
                                                                &flashvlm::masked_lloyd_creator()};
  count = 2;
  return creators;
}
