// How much each visual token matters for the question: primitives.text_guided_score in three launches.
//
//     ScoreTiles  token tiles x text tiles, times slices of the width: partial dot products, partial squared norms
//     ScorePool   8 tokens a block: cosines, softmax-weighted mean over the question's tokens; largest of the block
//     ScoreFuse   256 tokens a block: distance to the best token, min-max saliency, logarithms
//
// The slices are what fills the GPU: 576 x 64 is only 9 tiles. Their partial sums go through the L2 cache instead of
// atomics, and are added in a fixed order.
#pragma once

#include "tile_product.h"

namespace flashvlm {

constexpr int kPoolTokens = 8, kPoolLanes = 32;
constexpr int kFuseThreads = 256;

struct ScoreArgs {
  int tokens, text, width;
  int token_tiles, text_tiles, slices, slice_width, pool_blocks;
  float eta, temperature, pool_temperature, eps;
  const void *projected, *query;
  Mask query_mask, valid;
  const float* saliency;
  float* scores;
  // Workspace, every one with the batch in front.
  float* partial;          // [slices, token tile, text tile, 64, 64]
  float* token_squares;    // [slices, N]
  float* text_squares;     // [slices, L]
  float* pooled;           // [N], r of text_guided_score
  float* best_of_block;    // [pool_blocks]
};

template <class T>
struct ScoreTiles {
  static constexpr int kThreads = kTileThreads;
  using Args = ScoreArgs;
  struct Shared {
    TileBuffers tiles;
    float squares[2][kTile][8];
  };

  // x: tile, y: slice, z: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int token_tile = block.x / args.text_tiles, text_tile = block.x % args.text_tiles;
    const int64_t item = block.z, first_token = token_tile * kTile, first_text = text_tile * kTile;
    const int64_t begin = static_cast<int64_t>(block.y) * args.slice_width;
    const int64_t end = begin + args.slice_width < args.width ? begin + args.slice_width : args.width;
    using Stored = typename T::Stored;
    const Rows<T> tokens{static_cast<const Stored*>(args.projected) + (item * args.tokens + first_token) * args.width,
                         static_cast<int>(args.tokens - first_token), args.width};
    const Rows<T> text{static_cast<const Stored*>(args.query) + (item * args.text + first_text) * args.width,
                       static_cast<int>(args.text - first_text), args.width};

    PerThread<Sums, kThreads> sums;
    PerThread<Squares, kThreads> squares;
    const bool needs_squares = text_tile == 0 || token_tile == 0;
    if (needs_squares) {
      tile_product<T, true>(block, shared.tiles, tokens, text, begin, end, sums, squares);
    } else {
      tile_product<T, false>(block, shared.tiles, tokens, text, begin, end, sums, squares);
    }

    const int64_t slice = item * args.slices + block.y;
    const int64_t tile = slice * args.token_tiles * args.text_tiles + block.x;
    float* const partial = args.partial + tile * kTileElements;
    block.each([&](int t) {
FV_UNROLL
      for (int e = 0; e < kEach; ++e) {
        partial[Fragment<T>::row(t, e) * kTile + Fragment<T>::column(t, e)] = sums[t].of[e];
      }
      for (int i = 0; i < 2; ++i) {
        shared.squares[0][t / 8 + 32 * i][t % 8] = squares[t].a[i];
        shared.squares[1][t / 8 + 32 * i][t % 8] = squares[t].b[i];
      }
    });
    if (!needs_squares) return;
    block.each([&](int t) {
      if (t >= 2 * kTile) return;
      const int side = t / kTile, row = t % kTile;
      float sum = 0.0f;
      for (int part = 0; part < 8; ++part) sum += shared.squares[side][row][part];
      if (side == 0 && text_tile == 0 && row < tokens.rows) {
        args.token_squares[slice * args.tokens + first_token + row] = sum;
      }
      if (side == 1 && token_tile == 0 && row < text.rows) {
        args.text_squares[slice * args.text + first_text + row] = sum;
      }
    });
  }
};

struct ScorePool {
  static constexpr int kThreads = kPoolTokens * kPoolLanes;
  using Args = ScoreArgs;
  struct Shared {
    float text_inverse[kMaxText];  // negative: masked out
    float token_inverse[kPoolTokens];
    float similarity[kPoolTokens][kMaxText];
    float largest[kPoolTokens][kPoolLanes];
    float weight[kPoolTokens][kPoolLanes];    // sum of softmax numerators
    float weighted[kPoolTokens][kPoolLanes];  // sum of numerators times similarity
    float pooled[kPoolTokens];
  };

  // x: 8 tokens, y: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int64_t item = block.y, first = static_cast<int64_t>(block.x) * kPoolTokens;
    const int64_t slice0 = item * args.slices, tiles = static_cast<int64_t>(args.token_tiles) * args.text_tiles;

    block.each([&](int t) {
      for (int j = t; j < args.text; j += kThreads) {
        float squares = 0.0f;
        for (int s = 0; s < args.slices; ++s) squares += args.text_squares[(slice0 + s) * args.text + j];
        shared.text_inverse[j] = args.query_mask.at(item * args.text + j) ? inverse_norm(squares) : -1.0f;
      }
      const int64_t i = first + t;
      if (t < kPoolTokens && i < args.tokens) {
        float squares = 0.0f;
        for (int s = 0; s < args.slices; ++s) squares += args.token_squares[(slice0 + s) * args.tokens + i];
        shared.token_inverse[t] = inverse_norm(squares);
      }
    });

    block.each([&](int t) {
      const int token = t / kPoolLanes, lane = t % kPoolLanes;
      const int64_t i = first + token;
      float largest = kLow;
      if (i < args.tokens) {
        const int64_t tile_row = (i / kTile) * args.text_tiles;
        for (int j = lane; j < args.text; j += kPoolLanes) {
          // Padding of the question may hold anything, NaN too: selected away, never multiplied by zero.
          if (shared.text_inverse[j] < 0.0f) continue;
          const float* element = args.partial + (slice0 * tiles + tile_row + j / kTile) * kTileElements +
                                 (i % kTile) * kTile + j % kTile;
          float dot = 0.0f;
          for (int s = 0; s < args.slices; ++s) dot += element[s * tiles * kTileElements];
          const float similarity = dot * shared.token_inverse[token] * shared.text_inverse[j];
          shared.similarity[token][j] = similarity;
          largest = fmaxf(largest, similarity);
        }
      }
      shared.largest[token][lane] = largest;
    });

    block.each([&](int t) {
      const int token = t / kPoolLanes, lane = t % kPoolLanes;
      float largest = kLow;
      for (int other = 0; other < kPoolLanes; ++other) largest = fmaxf(largest, shared.largest[token][other]);
      float weight = 0.0f, weighted = 0.0f;
      if (first + token < args.tokens) {
        for (int j = lane; j < args.text; j += kPoolLanes) {
          if (shared.text_inverse[j] < 0.0f) continue;
          const float similarity = shared.similarity[token][j];
          const float numerator = expf((similarity - largest) / args.pool_temperature);
          weight += numerator;
          weighted += numerator * similarity;
        }
      }
      shared.weight[token][lane] = weight;
      shared.weighted[token][lane] = weighted;
    });

    block.each([&](int t) {
      if (t >= kPoolTokens) return;
      const int64_t i = first + t;
      float pooled = kLow;
      if (i < args.tokens) {
        float weight = 0.0f, weighted = 0.0f;
        for (int lane = 0; lane < kPoolLanes; ++lane) {
          weight += shared.weight[t][lane];
          weighted += shared.weighted[t][lane];
        }
        const float relevance = weight > 0.0f ? weighted / weight : 0.0f;  // no question: relevance 0 everywhere
        args.pooled[item * args.tokens + i] = relevance;
        if (args.valid.at(item * args.tokens + i)) pooled = relevance;
      }
      shared.pooled[t] = pooled;
    });

    block.each([&](int t) {
      if (t != 0) return;
      float best = kLow;
      for (int token = 0; token < kPoolTokens; ++token) best = fmaxf(best, shared.pooled[token]);
      args.best_of_block[item * args.pool_blocks + block.x] = best;
    });
  }
};

struct ScoreFuse {
  static constexpr int kThreads = kFuseThreads;
  using Args = ScoreArgs;
  struct Range {
    float best, low, high;
    FV_DEVICE void include(const Range& other) {
      best = fmaxf(best, other.best);
      low = fminf(low, other.low);
      high = fmaxf(high, other.high);
    }
  };
  struct Shared {
    Range ranges[kFuseThreads];
    Range groups[32];
    Range all;
  };

  static FV_DEVICE float clamped(float saliency) { return fminf(fmaxf(saliency, kLow), kHigh); }

  // x: 256 tokens, y: item. Every block finds the range over all tokens for itself: cheaper than one more launch.
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int64_t row = static_cast<int64_t>(block.y) * args.tokens;
    block.each([&](int t) {
      Range range{kLow, kHigh, kLow};
      for (int i = t; i < args.tokens; i += kThreads) {
        if (!args.valid.at(row + i)) continue;
        const float saliency = clamped(args.saliency[row + i]);
        range.include({kLow, saliency, saliency});
      }
      for (int i = t; i < args.pool_blocks; i += kThreads) {
        range.best = fmaxf(range.best, args.best_of_block[static_cast<int64_t>(block.y) * args.pool_blocks + i]);
      }
      shared.ranges[t] = range;
    });
    block.each([&](int t) {
      if (t >= 32) return;
      Range range = shared.ranges[t];
      for (int other = t + 32; other < kThreads; other += 32) range.include(shared.ranges[other]);
      shared.groups[t] = range;
    });
    block.each([&](int t) {
      if (t != 0) return;
      Range range = shared.groups[0];
      for (int other = 1; other < 32; ++other) range.include(shared.groups[other]);
      shared.all = range;
    });
    block.each([&](int t) {
      const int i = block.x * kThreads + t;
      if (i >= args.tokens) return;
      const Range all = shared.all;
      const float floor = logf(args.eps);
      float score = floor;
      if (args.valid.at(row + i)) {
        const float scaled = (clamped(args.saliency[row + i]) - all.low) / fmaxf(all.high - all.low, 1.0f / kHigh);
        const float relevance = fmaxf((args.pooled[row + i] - all.best) / args.temperature, floor);
        score = (1.0f - args.eta) * logf(fmaxf(scaled, args.eps)) + args.eta * relevance;
      }
      args.scores[row + i] = score;
    });
  }
};

}  // namespace flashvlm
