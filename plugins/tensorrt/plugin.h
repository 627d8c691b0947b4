// What the two plugins have in common: IPluginV3 with its capabilities, and the creator.
//
// Derived gives: kName, kInputs, kOutputs; Parameters, read(FieldReader&), fields(Parameters&);
// allows(position, type, types), bool check(dims, report), output_shapes, workspace, run.
#pragma once

#include <array>
#include <new>
#include <vector>

#include "../kernels/flashvlm_kernels.h"
#include "fields.h"

namespace flashvlm {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;
using Severity = nvinfer1::ILogger::Severity;

constexpr char kNamespace[] = "flashvlm";
constexpr char kVersion[] = "1";

inline bool is_float(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

// TensorRT's headers say that plugins have no bool tensors, TensorRT itself has let them have some: both are offered.
inline bool is_mask(DataType type) { return type == DataType::kBOOL || type == DataType::kINT32; }
inline int32_t mask_bytes(DataType type) { return type == DataType::kBOOL ? 1 : 4; }

inline flashvlm_dtype dtype_of(DataType type) {
  if (type == DataType::kHALF) return FLASHVLM_FLOAT16;
  return type == DataType::kBF16 ? FLASHVLM_BFLOAT16 : FLASHVLM_FLOAT32;
}

// Whether the dimensions are of that rank and agree by name: equal letters are equal sizes, -1 agrees with all.
inline bool dims_agree(const char* plugin, const Dims* dims, const char* const* axes, int count) {
  std::array<int64_t, 128> sizes{};
  for (int i = 0; i < count; ++i) {
    int axis = 0;
    for (const char* letter = axes[i]; *letter != '\0'; ++letter, ++axis) {
      if (axis >= dims[i].nbDims) break;
      const int64_t size = dims[i].d[axis];
      int64_t& known = sizes[static_cast<size_t>(*letter)];
      if (known > 0 && size > 0 && known != size) {
        report(Severity::kERROR, "flashvlm::%s: input %d: expected %c = %lld as in the inputs before it, found %lld",
               plugin, i, *letter, static_cast<long long>(known), static_cast<long long>(size));
        return false;
      }
      if (size > 0) known = size;
    }
    if (axes[i][axis] != '\0' || dims[i].nbDims != axis) {
      report(Severity::kERROR, "flashvlm::%s: input %d: expected dimensions %s, found %d of them", plugin, i, axes[i],
             static_cast<int>(dims[i].nbDims));
      return false;
    }
  }
  return true;
}

inline bool size_within(const char* plugin, const char* name, int64_t size, int64_t low, int64_t high) {
  if (low <= size && size <= high) return true;
  report(Severity::kERROR, "flashvlm::%s: %s: expected %lld to %lld, found %lld", plugin, name,
         static_cast<long long>(low), static_cast<long long>(high), static_cast<long long>(size));
  return false;
}

inline bool width_fits(const char* plugin, const char* name, int64_t width) {
  if (width % 8 == 0) return size_within(plugin, name, width, 8, FLASHVLM_MAX_WIDTH);
  report(Severity::kERROR, "flashvlm::%s: %s: expected a multiple of 8, found %lld", plugin, name,
         static_cast<long long>(width));
  return false;
}

template <class Derived, class Parameters>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuild,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(const Parameters& parameters) : parameters_(parameters) {}
  Plugin(const Plugin& other) : Plugin(other.parameters_) {}  // each clone owns the fields that it hands out
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Derived(derived()); }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  int32_t getNbOutputs() const noexcept override { return Derived::kOutputs; }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != Derived::kInputs || outputs != Derived::kOutputs || position >= inputs + outputs) return false;
    const auto type_of = [&](int i) { return tensors[i].desc.type; };
    return tensors[position].desc.format == nvinfer1::TensorFormat::kLINEAR && Derived::allows(position, type_of);
  }

  // At build time of the largest and smallest sizes of the profile, at run time of the actual ones.
  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) noexcept override {
    if (!right_counts(inputs, outputs)) return 1;
    Dims largest[Derived::kInputs], smallest[Derived::kInputs];
    for (int i = 0; i < Derived::kInputs; ++i) {
      largest[i] = in[i].max;
      smallest[i] = in[i].min;
    }
    return derived().check(largest) && derived().check(smallest) ? 0 : 1;
  }
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t inputs, const PluginTensorDesc*,
                        int32_t outputs) noexcept override {
    if (!right_counts(inputs, outputs)) return 1;
    Dims actual[Derived::kInputs];
    for (int i = 0; i < Derived::kInputs; ++i) actual[i] = in[i].dims;
    return derived().check(actual) ? 0 : 1;
  }
  size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t inputs, const DynamicPluginTensorDesc*,
                          int32_t outputs) const noexcept override {
    if (!right_counts(inputs, outputs)) return 0;
    Dims largest[Derived::kInputs];
    for (int i = 0; i < Derived::kInputs; ++i) largest[i] = in[i].max;
    return derived().workspace(largest);
  }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    fields_ = parameters_.fields();
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 protected:
  const Parameters& parameters() const { return parameters_; }

  // Of a run: the kernels' status is TensorRT's, and is explained once.
  static int32_t explained(int32_t status) {
    if (status != 0) report(Severity::kERROR, "flashvlm::%s: %s", Derived::kName, flashvlm_status_text(status));
    return status;
  }

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  static bool right_counts(int32_t inputs, int32_t outputs) {
    if (inputs == Derived::kInputs && outputs == Derived::kOutputs) return true;
    report(Severity::kERROR, "flashvlm::%s: expected %d inputs and %d outputs, found %d and %d", Derived::kName,
           Derived::kInputs, Derived::kOutputs, inputs, outputs);
    return false;
  }

  Parameters parameters_;
  std::vector<PluginField> fields_;  // points into parameters_
  PluginFieldCollection collection_{};
};

template <class Derived, class Parameters>
class Creator : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() : fields_(Parameters().fields()) {
    for (PluginField& field : fields_) field.data = nullptr;  // names and types only
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }
  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    FieldReader reader(Derived::kName, fields);
    const Parameters parameters = Parameters::read(reader);
    return reader.good() ? new (std::nothrow) Derived(parameters) : nullptr;
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

nvinfer1::IPluginCreatorV3One& text_guided_score_creator();
nvinfer1::IPluginCreatorV3One& masked_lloyd_creator();

}  // namespace flashvlm
