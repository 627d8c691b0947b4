// One source, two builds: a kernel is a sequence of phases between barriers, and runs on a GPU or in a host emulation.
//
//     template <class Block> FV_DEVICE static void run(Block& block, Shared& shared, const Args& args) {
//       block.each([&](int t) { shared.x[t] = ...; });        // one phase: every thread t, then a barrier
//       block.each([&](int t) { ... = shared.x[t ^ 1]; });
//     }
//
// On the GPU each() is the body followed by __syncthreads(); in the emulation it is a loop over the threads. What
// stands outside each() must be the same for all threads of a block. What a thread keeps from one phase to the next
// is a PerThread. The emulation poisons shared memory and PerThreads, and can run the threads of a phase backwards or
// shuffled, so that a missing barrier or an uninitialised read shows as a wrong result in tests that need no GPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__

#define FV_DEVICE __device__ __forceinline__
#define FV_BOTH __host__ __device__ __forceinline__
#define FV_UNROLL _Pragma("unroll")

namespace flashvlm {

struct Block {
  int x, y, z;
  template <class Phase>
  __device__ __forceinline__ void each(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

template <class T, int kThreads>
struct PerThread {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
};

// Largest and smallest do not depend on the order of the threads, so these leave results reproducible.
FV_DEVICE void keep_largest(uint32_t& slot, uint32_t value) { atomicMax(&slot, value); }
FV_DEVICE void keep_smallest(uint32_t& slot, uint32_t value) { atomicMin(&slot, value); }

FV_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FV_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

using Vec16 = uint4;

// Asks for one block an SM: left to itself, ptxas 13.0 spills ScoreTiles<Float32> on sm_100 so that three fit.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1) kernel(const typename Kernel::Args args) {
  __shared__ typename Kernel::Shared shared;
  Block block{static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z)};
  Kernel::run(block, shared, args);
}

struct Grid {
  int x, y, z;
};

// Status of the launch; the first failed one of a call is reported.
template <class Kernel>
inline int32_t launch(Grid grid, const typename Kernel::Args& args, void* stream) {
  kernel<Kernel><<<dim3(grid.x, grid.y, grid.z), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return static_cast<int32_t>(cudaGetLastError());
}

}  // namespace flashvlm

#else  // host emulation

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#define FV_DEVICE inline
#define FV_BOTH inline
#define FV_UNROLL

namespace flashvlm {

struct Emulation {
  int order = 0;     // of the threads within a phase: 0 forwards, 1 backwards, 2 shuffled
  int launches = 0;  // since the counter was last read
};
inline Emulation emulation;

struct Block {
  int x, y, z;
  const int* threads;  // the order to run them in
  int thread_count;
  template <class Phase>
  void each(Phase phase) const {
    for (int i = 0; i < thread_count; ++i) phase(threads[i]);
  }
};

constexpr int kPoison = 0xFF;  // NaN as float, -1 as integer

template <class T, int kThreads>
struct PerThread {
  std::unique_ptr<T[]> values{new T[kThreads]};
  PerThread() { std::memset(static_cast<void*>(values.get()), kPoison, sizeof(T) * kThreads); }
  T& operator[](int t) { return values[t]; }
};

inline void keep_largest(uint32_t& slot, uint32_t value) { slot = std::max(slot, value); }
inline void keep_smallest(uint32_t& slot, uint32_t value) { slot = std::min(slot, value); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct alignas(16) Vec16 {
  uint32_t x, y, z, w;
};

struct Grid {
  int x, y, z;
};

template <class Kernel>
inline int32_t launch(Grid grid, const typename Kernel::Args& args, void* /*stream*/) {
  using Shared = typename Kernel::Shared;
  std::vector<int> order(Kernel::kThreads);
  for (int t = 0; t < Kernel::kThreads; ++t) {
    // 193 is odd, so multiplying by it permutes any power of two of threads.
    const int shuffled = static_cast<int>((t * 193u + 71u) % Kernel::kThreads);
    order[t] = emulation.order == 0 ? t : emulation.order == 1 ? Kernel::kThreads - 1 - t : shuffled;
  }
  const std::unique_ptr<Shared> shared(new Shared);
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; ++x) {
        std::memset(static_cast<void*>(shared.get()), kPoison, sizeof(Shared));
        Block block{x, y, z, order.data(), Kernel::kThreads};
        Kernel::run(block, *shared, args);
      }
    }
  }
  ++emulation.launches;
  return 0;
}

}  // namespace flashvlm

#endif

namespace flashvlm {

template <class T>
FV_BOTH constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace flashvlm
