// The choice of tokens, first half: ranks of the scores, Gram matrix of the features, first assignment.
//
//     GramTilesAndRanks    64 x 64 tiles of X X^T, upper triangle, times slices of the width; and, in blocks of the
//                          same launch, the rank of every score
//     GramAndFirstLabels   the slices added up, normalised and mirrored; and, in blocks of the same launch, the
//                          clusters of the tokens nearest to evenly spaced free tokens
//
// Norms are the diagonal of X X^T, so the features are read once, by the tiles.
#pragma once

#include "tile_product.h"

namespace flashvlm {

constexpr int kRankTokens = 32, kRankParts = 8;
constexpr int kNearRows = 8, kNearParts = 32;  // tokens of a block that looks for nearest centroids; threads a token
constexpr int kSumRows = 32;                   // tokens of a block of ClusterSums
constexpr int kNoCluster = -1;

struct LloydArgs {
  int tokens, width, budget, top_count, clusters, iterations;
  int token_tiles, gram_tiles, slices, slice_width, rank_blocks, near_blocks, sum_blocks;
  const void* features;
  const float* scores;
  Mask valid;
  int32_t *kept, *is_top;
  // Workspace, every one with the batch in front.
  float* partial;     // [slices, gram_tiles, 64, 64]
  float* gram;        // [N, N] cosines
  float* sums;        // [clusters, N], token . sum of the cluster's unit vectors
  float* norm_parts;  // [sum_blocks, clusters], parts of the squared norms of those sums
  int32_t* rank;      // [N] 0 for the best score
  int32_t* label;     // [N] the cluster of a free token, else kNoCluster
  int32_t* seeds;     // [clusters] tokens that the clusters start from, or -1

  FV_DEVICE bool is_top_token(int64_t item, int i) const {
    return rank[item * tokens + i] < top_count && valid.at(item * tokens + i);
  }
  FV_DEVICE bool is_free(int64_t item, int i) const {
    return rank[item * tokens + i] >= top_count && valid.at(item * tokens + i);
  }
  // x_i . x_j, before normalisation
  FV_DEVICE float dot(int64_t item, int i, int j) const {
    if (i < j) {
      const int swap = i;
      i = j;
      j = swap;
    }
    const int64_t tile = static_cast<int64_t>(i / kTile) * (i / kTile + 1) / 2 + j / kTile;
    const float* element =
        partial + (item * slices * gram_tiles + tile) * kTileElements + (i % kTile) * kTile + j % kTile;
    float sum = 0.0f;
    for (int s = 0; s < slices; ++s) sum += element[static_cast<int64_t>(s) * gram_tiles * kTileElements];
    return sum;
  }
};

// The tile of the lower triangle, row by row: 0 is (0, 0), 1 is (1, 0), 2 is (1, 1), ...
FV_DEVICE void tile_position(int tile, int& row, int& column) {
  row = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > tile) --row;  // the square root may be off by one either way
  while ((row + 1) * (row + 2) / 2 <= tile) ++row;
  column = tile - row * (row + 1) / 2;
}

template <class T>
struct GramTilesAndRanks {
  static constexpr int kThreads = kTileThreads;
  using Args = LloydArgs;
  struct Ranks {
    uint32_t keys[kMaxTokens];
    int better[kRankParts][kRankTokens];
  };
  union Shared {
    TileBuffers tiles;
    Ranks ranks;
  };

  // x: tile, then 32 tokens to rank; y: slice; z: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    if (block.x < args.gram_tiles) {
      multiply(block, shared.tiles, args);
    } else if (block.y == 0) {
      rank(block, shared.ranks, args);
    }
  }

  static FV_DEVICE void multiply(Block& block, TileBuffers& shared, const Args& args) {
    int row_tile, column_tile;
    tile_position(block.x, row_tile, column_tile);
    const int64_t item = block.z, begin = static_cast<int64_t>(block.y) * args.slice_width;
    const int64_t end = begin + args.slice_width < args.width ? begin + args.slice_width : args.width;
    const auto* features = static_cast<const typename T::Stored*>(args.features) + item * args.tokens * args.width;
    const int row = row_tile * kTile, column = column_tile * kTile;
    const Rows<T> left{features + static_cast<int64_t>(row) * args.width, args.tokens - row, args.width};
    const Rows<T> right{features + static_cast<int64_t>(column) * args.width, args.tokens - column, args.width};
    PerThread<Sums, kThreads> sums;
    PerThread<Squares, kThreads> squares;
    tile_product<T, false>(block, shared, left, right, begin, end, sums, squares);
    const int64_t tile = (item * args.slices + block.y) * args.gram_tiles + block.x;
    float* const partial = args.partial + tile * kTileElements;
    block.each([&](int t) {
FV_UNROLL
      for (int e = 0; e < kEach; ++e) {
        partial[Fragment<T>::row(t, e) * kTile + Fragment<T>::column(t, e)] = sums[t].of[e];
      }
    });
  }

  // The rank is the number of better tokens; of equal scores the lower index is better, as in ONNX TopK.
  static FV_DEVICE void rank(Block& block, Ranks& shared, const Args& args) {
    const int64_t row = static_cast<int64_t>(block.z) * args.tokens;
    const int first = (block.x - args.gram_tiles) * kRankTokens;
    block.each([&](int t) {
      for (int i = t; i < args.tokens; i += kThreads) {
        shared.keys[i] = ordered(args.valid.at(row + i) ? args.scores[row + i] : kLow);
      }
    });
    block.each([&](int t) {
      const int token = t % kRankTokens, part = t / kRankTokens, i = first + token;
      int better = 0;
      if (i < args.tokens) {
        const uint32_t own = shared.keys[i];
        for (int j = part; j < args.tokens; j += kRankParts) {
          const uint32_t key = shared.keys[j];
          better += key > own || (key == own && j < i);
        }
      }
      shared.better[part][token] = better;
    });
    block.each([&](int t) {
      if (t >= kRankTokens || first + t >= args.tokens) return;
      int better = 0;
      for (int part = 0; part < kRankParts; ++part) better += shared.better[part][t];
      args.rank[row + first + t] = better;
    });
  }
};

// The cluster of each of 8 tokens: the first of those within kTie of the most similar.
struct NearShared {
  float largest[kNearParts][kNearRows];
  int cluster[kNearParts][kNearRows];
};
template <class Similarity>
FV_DEVICE void label_nearest(Block& block, NearShared& shared, const LloydArgs& args, int64_t item, int first,
                             Similarity similarity) {
  // Eight neighbouring threads take eight neighbouring tokens: 32 bytes of one row of `sums`.
  block.each([&](int t) {
    const int row = t % kNearRows, part = t / kNearRows, i = first + row;
    float largest = kLow;
    if (i < args.tokens) {
      for (int k = part; k < args.clusters; k += kNearParts) largest = fmaxf(largest, similarity(row, i, k));
    }
    shared.largest[part][row] = largest;
  });
  block.each([&](int t) {
    const int row = t % kNearRows, part = t / kNearRows, i = first + row;
    float largest = kLow;
    for (int other = 0; other < kNearParts; ++other) largest = fmaxf(largest, shared.largest[other][row]);
    int cluster = args.clusters;
    if (i < args.tokens) {
      for (int k = part; k < args.clusters; k += kNearParts) {
        if (similarity(row, i, k) >= largest - kTie) {
          cluster = k;
          break;
        }
      }
    }
    shared.cluster[part][row] = cluster;
  });
  block.each([&](int t) {
    const int i = first + t;
    if (t >= kNearRows || i >= args.tokens) return;
    int cluster = args.clusters;
    for (int part = 0; part < kNearParts; ++part) {
      cluster = shared.cluster[part][t] < cluster ? shared.cluster[part][t] : cluster;
    }
    const bool labelled = cluster < args.clusters && args.is_free(item, i);
    args.label[item * args.tokens + i] = labelled ? cluster : kNoCluster;
  });
}

struct GramAndFirstLabels {
  static constexpr int kThreads = 256;
  using Args = LloydArgs;
  struct Tile {
    float inverse[2][kTile];              // inverse norms of the tile's rows and columns
    float cosine[kTile][kTile + 1];
  };
  struct Labels {
    int16_t token[kMaxTokens];            // first the free tokens in order, then the seeds
    float scale[kMaxTokens];              // of a seed: 1 / its norm and the norm of its cosine; 0: no centroid
    int counts[kThreads], groups[kScanGroups];
    float inverse[kNearRows];
    NearShared near;
  };
  union Shared {
    Tile tile;
    Labels labels;
  };

  // x: tile, then 8 tokens to label; y: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    if (block.x < args.gram_tiles) {
      normalise(block, shared.tile, args);
    } else {
      label(block, shared.labels, args);
    }
  }

  static FV_DEVICE void normalise(Block& block, Tile& shared, const Args& args) {
    int row_tile, column_tile;
    tile_position(block.x, row_tile, column_tile);
    const int64_t item = block.y;
    const int first_row = row_tile * kTile, first_column = column_tile * kTile;
    block.each([&](int t) {
      if (t >= 2 * kTile) return;
      const int i = (t < kTile ? first_row : first_column) + t % kTile;
      shared.inverse[t / kTile][t % kTile] = i < args.tokens ? inverse_norm(args.dot(item, i, i)) : 0.0f;
    });
    float* const gram = args.gram + item * args.tokens * args.tokens;
    block.each([&](int t) {
      for (int e = t; e < kTileElements; e += kThreads) {
        const int row = e / kTile, column = e % kTile, i = first_row + row, j = first_column + column;
        if (i >= args.tokens || j >= args.tokens) continue;
        // In a tile on the diagonal either half stands for both, so that the matrix is exactly symmetric.
        const float cosine = args.dot(item, i, j) * (shared.inverse[0][row] * shared.inverse[1][column]);
        shared.cosine[row][column] = cosine;
        gram[static_cast<int64_t>(i) * args.tokens + j] = cosine;
      }
    });
    if (row_tile == column_tile) return;
    block.each([&](int t) {
      for (int e = t; e < kTileElements; e += kThreads) {
        const int row = e % kTile, column = e / kTile, i = first_row + row, j = first_column + column;
        if (i >= args.tokens || j >= args.tokens) continue;
        gram[static_cast<int64_t>(j) * args.tokens + i] = shared.cosine[row][column];
      }
    });
  }

  static FV_DEVICE void label(Block& block, Labels& shared, const Args& args) {
    const int64_t item = block.y;
    const int first = (block.x - args.gram_tiles) * kNearRows;
    const int each = divide_up(args.tokens, kThreads);
    block.each([&](int t) {
      int count = 0;
      for (int i = t * each; i < (t + 1) * each && i < args.tokens; ++i) count += args.is_free(item, i);
      shared.counts[t] = count;
      if (t < kNearRows && first + t < args.tokens) {
        shared.inverse[t] = inverse_norm(args.dot(item, first + t, first + t));
      }
    });
    const int free_count = block_scan<kThreads>(block, shared.counts, shared.groups);
    block.each([&](int t) {
      int at = shared.counts[t];
      for (int i = t * each; i < (t + 1) * each && i < args.tokens; ++i) {
        if (args.is_free(item, i)) shared.token[at++] = static_cast<int16_t>(i);
      }
    });
    // The seeds replace the list in place, by way of registers: a seed can lie on either side of its list position.
    PerThread<int16_t[kMaxTokens / kThreads], kThreads> seeds;
    block.each([&](int t) {
FV_UNROLL
      for (int u = 0; u < kMaxTokens / kThreads; ++u) {
        const int k = t + u * kThreads;
        seeds[t][u] = -1;
        if (k >= args.clusters) continue;
        const float rank = floorf(static_cast<float>(2 * k + 1) * static_cast<float>(free_count) /
                                  static_cast<float>(2 * args.clusters));
        if (static_cast<int>(rank) < free_count) seeds[t][u] = shared.token[static_cast<int>(rank)];
      }
    });
    block.each([&](int t) {
FV_UNROLL
      for (int u = 0; u < kMaxTokens / kThreads; ++u) {
        const int k = t + u * kThreads, seed = seeds[t][u];
        if (k >= args.clusters) continue;
        shared.token[k] = static_cast<int16_t>(seed);
        float scale = 0.0f;
        if (seed >= 0) {
          const float squares = args.dot(item, seed, seed), inverse = inverse_norm(squares);
          const float own = squares * (inverse * inverse);
          if (own > kTiny) scale = inverse / sqrtf(own);
        }
        shared.scale[k] = scale;
        if (first == 0) args.seeds[item * args.clusters + k] = seed;
      }
    });
    label_nearest(block, shared.near, args, item, first, [&](int row, int i, int k) {
      const float scale = shared.scale[k];
      return scale == 0.0f ? kLow : args.dot(item, i, shared.token[k]) * (shared.inverse[row] * scale);
    });
  }
};

}  // namespace flashvlm
