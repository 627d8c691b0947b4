// Attributes of a plugin and what is said about bad ones.
#pragma once

#include <NvInfer.h>

#include <cstdint>

namespace flashvlm {

// One line to TensorRT's logger where the library has been given one, else to standard error.
void report(nvinfer1::ILogger::Severity severity, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Reads attributes out of a collection. The first bad one is reported; good() is false from then on.
class FieldReader {
 public:
  FieldReader(const char* plugin, const nvinfer1::PluginFieldCollection* fields);
  float number(const char* name, float low, float high);
  int32_t integer(const char* name, int32_t low, int32_t high);
  void refuse(const char* format, ...) __attribute__((format(printf, 2, 3)));
  bool good() const { return good_; }

 private:
  const nvinfer1::PluginField* find(const char* name);

  const char* plugin_;
  const nvinfer1::PluginFieldCollection* fields_;
  bool good_ = true;
};

}  // namespace flashvlm
