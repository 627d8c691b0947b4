#include "fields.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace flashvlm {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;
using Severity = nvinfer1::ILogger::Severity;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void report_line(Severity severity, const char* line) {
  nvinfer1::ILoggerFinder* const finder = logger_finder.load();
  nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(severity, line);
  } else {
    std::fprintf(stderr, "%s\n", line);
  }
}

}  // namespace

void report(Severity severity, const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  report_line(severity, line);
}

FieldReader::FieldReader(const char* plugin, const nvinfer1::PluginFieldCollection* fields)
    : plugin_(plugin), fields_(fields) {
  if (fields == nullptr || (fields->nbFields > 0 && fields->fields == nullptr)) {
    refuse("expected attributes, found none");
  }
}

void FieldReader::refuse(const char* format, ...) {
  if (!good_) return;
  good_ = false;
  char reason[384];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(reason, sizeof reason, format, arguments);
  va_end(arguments);
  report(Severity::kERROR, "flashvlm::%s: %s", plugin_, reason);
}

const PluginField* FieldReader::find(const char* name) {
  if (!good_) return nullptr;
  const PluginField* found = nullptr;
  for (int32_t i = 0; i < fields_->nbFields; ++i) {
    const PluginField& field = fields_->fields[i];
    if (field.name == nullptr || std::strcmp(field.name, name) != 0) continue;
    if (found != nullptr) {
      refuse("attribute %s: expected once, found twice", name);
      return nullptr;
    }
    found = &field;
  }
  if (found == nullptr) {
    refuse("attribute %s: missing", name);
  } else if (found->data == nullptr || found->length != 1) {
    refuse("attribute %s: expected one value, found %d", name, static_cast<int>(found->length));
    return nullptr;
  }
  return found;
}

float FieldReader::number(const char* name, float low, float high) {
  const PluginField* const field = find(name);
  if (field == nullptr) return 0.0f;
  if (field->type != PluginFieldType::kFLOAT32) {
    refuse("attribute %s: expected float32, found PluginFieldType %d", name, static_cast<int>(field->type));
    return 0.0f;
  }
  float value;
  std::memcpy(&value, field->data, sizeof value);
  if (!(low <= value && value <= high)) {  // also where it is NaN
    refuse("attribute %s: expected %g to %g, found %g", name, low, high, value);
  }
  return value;
}

int32_t FieldReader::integer(const char* name, int32_t low, int32_t high) {
  const PluginField* const field = find(name);
  if (field == nullptr) return 0;
  int64_t value = 0;
  if (field->type == PluginFieldType::kINT32) {
    int32_t narrow;
    std::memcpy(&narrow, field->data, sizeof narrow);
    value = narrow;
  } else if (field->type == PluginFieldType::kINT64) {  // as ONNX has them
    std::memcpy(&value, field->data, sizeof value);
  } else {
    refuse("attribute %s: expected int32 or int64, found PluginFieldType %d", name, static_cast<int>(field->type));
    return 0;
  }
  if (value < low || value > high) {
    refuse("attribute %s: expected %d to %d, found %lld", name, low, high, static_cast<long long>(value));
    return 0;
  }
  return static_cast<int32_t>(value);
}

}  // namespace flashvlm

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  flashvlm::logger_finder = finder;
}
