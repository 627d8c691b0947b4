// C += A B^T for a tile of 64 rows of A and 64 rows of B over a slice of their common width, by 256 threads.
//
// Both the text similarity and the Gram matrix are such products of row-major matrices. float32 stays on the FMA
// units: TF32 would be off by 5e-4, and the score divides by a temperature of 0.016. float16 and bfloat16 products
// are exact in float32 and go through mma.sync (Ampere and later). Tensor cores truncate when they accumulate, so
// their sums start anew every 64 elements and are added up in registers, rounded to nearest.
//
// Rows are staged through shared memory 128 bytes at a time, in two buffers: the next 128 bytes travel while the
// present ones are multiplied. 16 bytes of padding a row keep both ldmatrix and float4 reads free of bank conflicts.
#pragma once

#include "numbers.h"

namespace flashvlm {

constexpr int kTile = 64;
constexpr int kTileThreads = 256;
constexpr int kTileElements = kTile * kTile;
constexpr int kSliceUnit = 64;  // slices of the width are multiples of this, whatever the type
constexpr int kRowBytes = 128, kRowStride = kRowBytes + 16;
constexpr int kEach = kTileElements / kTileThreads;  // elements of C a thread holds

struct TileBuffers {
  alignas(16) unsigned char a[2][kTile * kRowStride];
  alignas(16) unsigned char b[2][kTile * kRowStride];
};

struct Sums {
  float of[kEach];
};
struct Squares {
  float a[2], b[2];  // sum of squares of this thread's share of rows t / 8 and t / 8 + 32
};
struct Staged {
  Vec16 a[2], b[2];
};

// The rows of a tile in memory; rows from `rows` on read as zero.
template <class T>
struct Rows {
  const typename T::Stored* first;
  int rows;
  int64_t width;
};

// ---- which elements of C a thread holds, and its product of one stage --------------------------------------------

template <class T>
struct Fragment;

template <>
struct Fragment<Float32> {
  static FV_DEVICE int row(int t, int e) { return t / 16 + 16 * (e / 4); }
  static FV_DEVICE int column(int t, int e) { return t % 16 + 16 * (e % 4); }

  static FV_DEVICE void multiply(const unsigned char* a, const unsigned char* b, int t, Sums& sums) {
    struct alignas(16) Four {
      float x, y, z, w;
    };
FV_UNROLL
    for (int k = 0; k < kRowBytes; k += 16) {
      Four left[4], right[4];
FV_UNROLL
      for (int i = 0; i < 4; ++i) {
        left[i] = *reinterpret_cast<const Four*>(a + (t / 16 + 16 * i) * kRowStride + k);
        right[i] = *reinterpret_cast<const Four*>(b + (t % 16 + 16 * i) * kRowStride + k);
      }
FV_UNROLL
      for (int e = 0; e < kEach; ++e) {
        const Four &l = left[e / 4], &r = right[e % 4];
        sums.of[e] += l.x * r.x;
        sums.of[e] += l.y * r.y;
        sums.of[e] += l.z * r.z;
        sums.of[e] += l.w * r.w;
      }
    }
  }
};

// The layout of mma.m16n8k16: warps 4 x 2, each 16 rows x 32 columns, four accumulators of 8 columns a thread.
template <class T>
struct MmaFragment {
  static FV_DEVICE int row(int t, int e) { return (t / 32 % 4) * 16 + (t % 32) / 4 + ((e >> 1) & 1) * 8; }
  static FV_DEVICE int column(int t, int e) { return (t / 128) * 32 + (e >> 2) * 8 + (t % 4) * 2 + (e & 1); }

  // Where a thread points ldmatrix to, in the first 16 elements of the rows. Matrix i comes from lanes 8 i to 8 i + 7.
  // Left: rows 0-7 and 8-15 of elements 0-7, then of elements 8-15. Right: elements 0-7 and 8-15 of columns 0-7, then
  // of columns 8-15.
  static FV_DEVICE int left_offset(int t) {
    const int lane = t % 32;
    return ((t / 32 % 4) * 16 + lane % 16) * kRowStride + (lane / 16) * 16;
  }
  static FV_DEVICE int right_offset(int t) {
    const int lane = t % 32;
    return ((t / 128) * 32 + lane % 8 + (lane / 16) * 8) * kRowStride + ((lane / 8) % 2) * 16;
  }

  static FV_DEVICE void multiply(const unsigned char* a, const unsigned char* b, int t, Sums& sums) {
    Sums part{};
    FV_UNROLL
    for (int k = 0; k < kRowBytes; k += 32) multiply16(a + k, b + k, t, part);
    FV_UNROLL
    for (int e = 0; e < kEach; ++e) sums.of[e] += part.of[e];
  }

#ifdef __CUDACC__
  static FV_DEVICE void multiply16(const unsigned char* a, const unsigned char* b, int t, Sums& sums) {
    __syncwarp();  // loads at the edge of the matrices diverge; what follows is for whole warps
    uint32_t left[4];
    load_matrices(a + left_offset(t), left);
    FV_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t right[4];
      load_matrices(b + right_offset(t) + half * 16 * kRowStride, right);
      T::mma(&sums.of[half * 8], left, right[0], right[1]);
      T::mma(&sums.of[half * 8 + 4], left, right[2], right[3]);
    }
  }

  static FV_DEVICE void load_matrices(const unsigned char* shared, uint32_t (&out)[4]) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
#else
  // What ldmatrix and mma do by the PTX ISA, from the same addresses: row r of matrix i is where lane 8 i + r points;
  // of the left operand, matrix i holds rows 8 (i % 2) and elements 8 (i / 2) on; of the right, element 8 i on.
  static void multiply16(const unsigned char* a, const unsigned char* b, int t, Sums& sums) {
    using Element = typename T::Element;
    const auto at = [](const unsigned char* row, int i) {
      return Element::value(reinterpret_cast<const uint16_t*>(row)[i]);
    };
    const int warp = t / 32 * 32, group = t % 32 / 4;
    for (int e = 0; e < kEach; ++e) {
      const int low_or_high = (e >> 1) & 1, half = e / 8, right_pair = e / 4 % 2, column = t % 4 * 2 + (e & 1);
      for (int k = 0; k < 16; ++k) {
        const int left_lane = (low_or_high + k / 8 * 2) * 8 + group, right_lane = (right_pair * 2 + k / 8) * 8 + column;
        sums.of[e] += at(a + left_offset(warp + left_lane), k % 8) *
                      at(b + right_offset(warp + right_lane) + half * 16 * kRowStride, k % 8);
      }
    }
  }
#endif
};

#define FV_MMA(type)                                                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                           \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                           \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

struct MmaFloat16 {
  using Element = Float16;
#ifdef __CUDACC__
  static FV_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { FV_MMA("f16"); }
#endif
};
struct MmaBFloat16 {
  using Element = BFloat16;
#ifdef __CUDACC__
  static FV_DEVICE void mma(float* c, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { FV_MMA("bf16"); }
#endif
};
#undef FV_MMA

template <>
struct Fragment<Float16> : MmaFragment<MmaFloat16> {};
template <>
struct Fragment<BFloat16> : MmaFragment<MmaBFloat16> {};

// ---- staging -----------------------------------------------------------------------------------------------------

template <class T>
FV_DEVICE Vec16 fetch(const Rows<T>& rows, int row, int64_t column, int64_t end) {
  // Widths are multiples of 8 elements, so 16 bytes are inside the slice or outside, never across its end.
  if (row >= rows.rows || column >= end) return Vec16{0, 0, 0, 0};
  return *reinterpret_cast<const Vec16*>(rows.first + row * rows.width + column);
}

template <class T>
FV_DEVICE float sum_of_squares(const Vec16& vector) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  float sum = 0.0f;
FV_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename T::Stored) == 4) {
      const float x = float_of(words[i]);
      sum += x * x;
    } else {
      const float low = T::value(static_cast<uint16_t>(words[i] & 0xFFFFu));
      const float high = T::value(static_cast<uint16_t>(words[i] >> 16));
      sum += low * low;
      sum += high * high;
    }
  }
  return sum;
}

// Adds the product over columns [begin, end) to nothing: sums and squares are set. kSquares: also sum squares.
template <class T, bool kSquares>
FV_DEVICE void tile_product(Block& block, TileBuffers& shared, const Rows<T>& a, const Rows<T>& b, int64_t begin,
                            int64_t end, PerThread<Sums, kTileThreads>& sums,
                            PerThread<Squares, kTileThreads>& squares) {
  constexpr int kVector = 16 / sizeof(typename T::Stored), kStage = kRowBytes / sizeof(typename T::Stored);
  PerThread<Staged, kTileThreads> staged;

  const auto load = [&](int t, int stage) {
    const int64_t column = begin + static_cast<int64_t>(stage) * kStage + (t % 8) * kVector;
FV_UNROLL
    for (int i = 0; i < 2; ++i) {
      staged[t].a[i] = fetch<T>(a, t / 8 + 32 * i, column, end);
      staged[t].b[i] = fetch<T>(b, t / 8 + 32 * i, column, end);
    }
  };
  const auto store = [&](int t, int stage) {
FV_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int at = (t / 8 + 32 * i) * kRowStride + (t % 8) * 16;
      *reinterpret_cast<Vec16*>(&shared.a[stage % 2][at]) = staged[t].a[i];
      *reinterpret_cast<Vec16*>(&shared.b[stage % 2][at]) = staged[t].b[i];
      if constexpr (kSquares) {
        squares[t].a[i] += sum_of_squares<T>(staged[t].a[i]);
        squares[t].b[i] += sum_of_squares<T>(staged[t].b[i]);
      }
    }
  };

  const int stages = static_cast<int>(divide_up<int64_t>(end - begin, kStage));
  block.each([&](int t) {
    sums[t] = Sums{};
    squares[t] = Squares{};
    load(t, 0);
    store(t, 0);
  });
  for (int stage = 0; stage < stages; ++stage) {
    block.each([&](int t) {
      if (stage + 1 < stages) load(t, stage + 1);
      Fragment<T>::multiply(shared.a[stage % 2], shared.b[stage % 2], t, sums[t]);
      if (stage + 1 < stages) store(t, stage + 1);
    });
  }
}

// How to cut the width so that about `blocks` blocks have work, given the tiles. Independent of the batch, so that an
// item's sums are rounded alike alone and in a batch; the same on every GPU for the same reason.
struct Slices {
  int count, width;
};
inline Slices slices_of(int64_t tiles, int width, int blocks) {
  const int units = divide_up(width, kSliceUnit);
  const int wanted = tiles >= blocks ? 1 : static_cast<int>(blocks / tiles);
  const int units_each = divide_up(units, wanted < units ? wanted : units);
  return {divide_up(units, units_each), units_each * kSliceUnit};
}
// At most so many tiles are stored for any shape that has no more tiles: monotone, unlike tiles x slices_of(tiles).
inline int64_t most_partial_tiles(int64_t tiles, int blocks) { return tiles > blocks ? tiles : blocks; }

constexpr int kFillBlocks = 144;  // 132 SMs of an H200; also fills smaller GPUs

}  // namespace flashvlm
