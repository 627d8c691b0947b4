// The constants of flashvlm_export.selection.ops, element types, masks, and block-wide reductions.
#pragma once

#include "block.h"

namespace flashvlm {

constexpr float kLow = -1e30f, kHigh = 1e30f;  // finite stand-ins for infinity
constexpr float kTiny = 1e-12f;                // smallest norm that is divided by
constexpr float kTie = 1e-5f;                  // cosines closer than this count as equal, the first of them wins
constexpr int kMaxTokens = 4096;
constexpr int kMaxText = 512;

// An element type: what lies in memory, and its value.
struct Float32 {
  using Stored = float;
  static FV_DEVICE float value(float x) { return x; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static FV_DEVICE float value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
};

#ifdef __CUDACC__
struct Float16 {
  using Stored = uint16_t;
  static FV_DEVICE float value(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};
#else
inline std::vector<float> all_float16() {
  std::vector<float> values(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = (bits >> 10) & 31;
    const float fraction = static_cast<float>(bits & 1023) / 1024.0f;
    float x = exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1.0f + fraction, exponent - 15);
    if (exponent == 31) x = (bits & 1023) ? NAN : INFINITY;
    values[bits] = bits & 0x8000 ? -x : x;
  }
  return values;
}
struct Float16 {
  using Stored = uint16_t;
  static float value(uint16_t bits) {
    static const std::vector<float> values = all_float16();
    return values[bits];
  }
};
#endif

// A boolean tensor: TensorRT's bool has 1 byte, and where a plugin cannot have bool, int32 takes its place.
struct Mask {
  const void* data;
  int bytes;
  FV_DEVICE bool at(int64_t i) const {
    return bytes == 1 ? static_cast<const uint8_t*>(data)[i] != 0 : static_cast<const int32_t*>(data)[i] != 0;
  }
};

// Integers in the order of the floats; -0 equals 0, and NaN has a place too, so that ranks are always a permutation.
FV_DEVICE uint32_t ordered(float x) {
  const uint32_t bits = bits_of(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
FV_DEVICE float unordered(uint32_t key) { return float_of(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key); }

FV_DEVICE float inverse_norm(float sum_of_squares) { return 1.0f / fmaxf(sqrtf(sum_of_squares), kTiny); }

// Exclusive prefix sum of counts[0, kCount), in place. Returns the total.
template <int kCount>
FV_DEVICE int block_scan(Block& block, int* counts, int* groups) {
  constexpr int kGroups = 32, kEach = kCount / kGroups;
  static_assert(kCount % kGroups == 0, "whole groups");
  block.each([&](int t) {
    if (t >= kGroups) return;
    int sum = 0;
    for (int i = 0; i < kEach; ++i) sum += counts[t * kEach + i];
    groups[t] = sum;
  });
  block.each([&](int t) {
    if (t != 0) return;
    int sum = 0;
    for (int g = 0; g < kGroups; ++g) {
      const int count = groups[g];
      groups[g] = sum;
      sum += count;
    }
    groups[kGroups] = sum;
  });
  block.each([&](int t) {
    if (t >= kGroups) return;
    int sum = groups[t];
    for (int i = 0; i < kEach; ++i) {
      const int count = counts[t * kEach + i];
      counts[t * kEach + i] = sum;
      sum += count;
    }
  });
  return groups[kGroups];
}
constexpr int kScanGroups = 33;  // the 32 groups and the total

}  // namespace flashvlm
