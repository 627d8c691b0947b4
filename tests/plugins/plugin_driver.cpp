// What TensorRT does with a plugin, as far as it goes without TensorRT: create, clone, negotiate types, configure,
// serialise, create again for the run, attach, run. Linked with the emulated kernels, so it runs on any machine.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "plugin.h"

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

namespace {

using namespace nvinfer1;

struct Logger : ILogger {
  std::string lines;
  void log(Severity, const char* line) noexcept override { lines += std::string(line) + "\n"; }
};
struct Finder : ILoggerFinder {
  Logger logger;
  ILogger* findLogger() override { return &logger; }
};
Finder finder;

IPluginCreatorV3One* find_creator(const char* name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    const bool ours = std::strcmp(creator->getPluginNamespace(), "flashvlm") == 0;
    if (ours && std::strcmp(creator->getPluginName(), name) == 0) return creator;
  }
  return nullptr;
}

template <class Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

}  // namespace

struct DriverTensor {
  int32_t type, rank;
  int64_t dims[4];
  void* data;
};

// 0, or the step that refused.
enum Step { kDone, kFind, kCreate, kIdentity, kTypes, kConfigure, kSerialise, kShapes, kRun, kOverrun };

extern "C" __attribute__((visibility("default"))) const char* driver_log() {
  static std::string last;
  last = finder.logger.lines;
  finder.logger.lines.clear();
  return last.c_str();
}

extern "C" __attribute__((visibility("default"))) int32_t drive(const char* name, const PluginField* fields,
                                                                int32_t field_count, const DriverTensor* tensors,
                                                                int32_t inputs, int32_t outputs) {
  setLoggerFinder(&finder);
  IPluginCreatorV3One* const creator = find_creator(name);
  if (creator == nullptr) return kFind;
  const PluginFieldCollection given{field_count, fields};
  const std::unique_ptr<IPluginV3> first(creator->createPlugin("node", &given, TensorRTPhase::kBUILD));
  if (first == nullptr) return kCreate;
  const std::unique_ptr<IPluginV3> plugin(first->clone());
  auto* const core = capability<IPluginV3OneCore>(*plugin, PluginCapabilityType::kCORE);
  auto* const build = capability<IPluginV3OneBuild>(*plugin, PluginCapabilityType::kBUILD);
  if (std::strcmp(core->getPluginName(), name) != 0 || std::strcmp(core->getPluginVersion(), "1") != 0 ||
      build->getNbOutputs() != outputs) {
    return kIdentity;
  }

  std::vector<DynamicPluginTensorDesc> dynamic(inputs + outputs);
  std::vector<PluginTensorDesc> actual(inputs + outputs);
  std::vector<DataType> types(inputs + outputs);
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    Dims dims{};
    dims.nbDims = tensors[i].rank;
    std::memcpy(dims.d, tensors[i].dims, sizeof tensors[i].dims);
    types[i] = static_cast<DataType>(tensors[i].type);
    actual[i] = PluginTensorDesc{dims, types[i], TensorFormat::kLINEAR, 1.0f};
    dynamic[i] = DynamicPluginTensorDesc{actual[i], dims, dims, dims};
  }
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    if (!build->supportsFormatCombination(i, dynamic.data(), inputs, outputs)) return kTypes;
    dynamic[i].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(i, dynamic.data(), inputs, outputs)) return kTypes;
    dynamic[i].desc.format = TensorFormat::kLINEAR;
  }
  std::vector<DataType> output_types(outputs);
  if (build->getOutputDataTypes(output_types.data(), outputs, types.data(), inputs) != 0) return kTypes;
  if (!std::equal(output_types.begin(), output_types.end(), types.begin() + inputs)) return kTypes;
  if (build->configurePlugin(dynamic.data(), inputs, dynamic.data() + inputs, outputs) != 0) return kConfigure;
  const size_t bytes = build->getWorkspaceSize(dynamic.data(), inputs, dynamic.data() + inputs, outputs);

  const PluginFieldCollection* const saved =
      capability<IPluginV3OneRuntime>(*plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  const std::unique_ptr<IPluginV3> loaded(creator->createPlugin("node", saved, TensorRTPhase::kRUNTIME));
  if (loaded == nullptr) return kSerialise;
  const std::unique_ptr<IPluginV3> attached(
      capability<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr));
  auto* const runtime = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
  if (runtime->onShapeChange(actual.data(), inputs, actual.data() + inputs, outputs) != 0) return kShapes;

  constexpr size_t kGuard = 256;
  const std::unique_ptr<unsigned char, decltype(&std::free)> workspace(
      static_cast<unsigned char*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256 + kGuard)), &std::free);
  std::memset(workspace.get(), 0xFF, bytes + kGuard);
  std::vector<const void*> in;
  std::vector<void*> out;
  for (int32_t i = 0; i < inputs; ++i) in.push_back(tensors[i].data);
  for (int32_t i = inputs; i < inputs + outputs; ++i) out.push_back(tensors[i].data);
  if (runtime->enqueue(actual.data(), actual.data() + inputs, in.data(), out.data(), workspace.get(), nullptr) != 0) {
    return kRun;
  }
  for (size_t i = 0; i < kGuard; ++i) {
    if (workspace.get()[bytes + i] != 0xFF) return kOverrun;
  }
  return kDone;
}
