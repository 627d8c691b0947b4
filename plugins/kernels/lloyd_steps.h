// The choice of tokens, second half: Lloyd's iteration over the Gram matrix, and the tokens that are kept.
//
//     ClusterSums      32 tokens x 8 clusters a block: their products with the sums of the clusters' unit vectors
//     NearestCentroid  8 tokens a block: the cluster whose centroid is nearest
//     KeepTokens       one block an item: representatives, what fills empty clusters, ascending indices
//
// An assignment is a list of labels, so G A is a sum of N rows of G whatever the number of clusters: no matrix
// product. ClusterSums gives every thread its own bins in shared memory, so that nothing is added atomically.
#pragma once

#include "lloyd_gram.h"

namespace flashvlm {

struct ClusterSums {
  static constexpr int kWarps = 32, kLanes = 32, kThreads = kWarps * kLanes;
  static constexpr int kClusters = 8;  // of a block: 32 warps x 8 clusters x 32 lanes of float are 32 KiB
  static constexpr int kUnroll = 8;    // loads of G in flight for a thread
  using Args = LloydArgs;
  struct Shared {
    float bins[kWarps][kClusters][kLanes];
    int16_t label[kMaxTokens];
  };
  static_assert(kLanes == kSumRows, "a lane is a token");

  // x: 32 tokens, y: 8 clusters, z: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int64_t item = block.z;
    const int first_token = block.x * kSumRows, first_cluster = block.y * kClusters;
    const float* const gram = args.gram + item * args.tokens * args.tokens;
    block.each([&](int t) {
      for (int j = t; j < args.tokens; j += kThreads) {
        shared.label[j] = static_cast<int16_t>(args.label[item * args.tokens + j]);
      }
FV_UNROLL
      for (int k = 0; k < kClusters; ++k) shared.bins[t / kLanes][k][t % kLanes] = 0.0f;
    });
    block.each([&](int t) {
      const int warp = t / kLanes, lane = t % kLanes, i = first_token + lane;
      if (i >= args.tokens) return;
      // All lanes of a warp have the same j: the branches are uniform, and G is read as whole lines. G is symmetric.
      for (int begin = warp; begin < args.tokens; begin += kWarps * kUnroll) {
        float cosine[kUnroll];
        int cluster[kUnroll];
FV_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          const int j = begin + u * kWarps;
          cluster[u] = j < args.tokens ? shared.label[j] - first_cluster : -1;
          const bool mine = cluster[u] >= 0 && cluster[u] < kClusters;
          if (!mine) cluster[u] = -1;
          cosine[u] = mine ? gram[static_cast<int64_t>(j) * args.tokens + i] : 0.0f;
        }
FV_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          if (cluster[u] >= 0) shared.bins[warp][cluster[u]][lane] += cosine[u];
        }
      }
    });
    block.each([&](int t) {
      const int k = t / kLanes, lane = t % kLanes;
      if (k >= kClusters) return;
      float sum = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.bins[warp][k][lane];
      shared.bins[0][k][lane] = sum;
      if (first_token + lane < args.tokens && first_cluster + k < args.clusters) {
        args.sums[(item * args.clusters + first_cluster + k) * args.tokens + first_token + lane] = sum;
      }
    });
    // |sum of the members|^2 is the sum of the members' products with it.
    block.each([&](int t) {
      const int cluster = first_cluster + t;
      if (t >= kClusters || cluster >= args.clusters) return;
      float part = 0.0f;
      for (int lane = 0; lane < kLanes && first_token + lane < args.tokens; ++lane) {
        if (shared.label[first_token + lane] == cluster) part += shared.bins[0][t][lane];
      }
      args.norm_parts[(item * args.sum_blocks + block.x) * args.clusters + cluster] = part;
    });
  }
};

// 1 / norm of a cluster's sum, 0 where there is no centroid.
FV_DEVICE float centroid_scale(const LloydArgs& args, int64_t item, int cluster) {
  float squares = 0.0f;
  for (int part = 0; part < args.sum_blocks; ++part) {
    squares += args.norm_parts[(item * args.sum_blocks + part) * args.clusters + cluster];
  }
  return squares > kTiny ? 1.0f / sqrtf(squares) : 0.0f;
}

struct NearestCentroid {
  static constexpr int kThreads = kNearRows * kNearParts;
  using Args = LloydArgs;
  struct Shared {
    float scale[kMaxTokens];
    NearShared near;
  };

  // x: 8 tokens, y: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int64_t item = block.y;
    block.each([&](int t) {
      for (int k = t; k < args.clusters; k += kThreads) shared.scale[k] = centroid_scale(args, item, k);
    });
    const float* const sums = args.sums + item * args.clusters * args.tokens;
    label_nearest(block, shared.near, args, item, block.x * kNearRows, [&](int, int i, int k) {
      const float scale = shared.scale[k];
      return scale == 0.0f ? kLow : sums[static_cast<int64_t>(k) * args.tokens + i] * scale;
    });
  }
};

struct KeepTokens {
  static constexpr int kThreads = 1024, kEach = kMaxTokens / kThreads;
  static constexpr uint8_t kKept = 1, kTop = 2;
  using Args = LloydArgs;
  struct Shared {
    union {
      float scale[kMaxTokens];       // of a cluster's centroid; then
      uint32_t closest[kMaxTokens];  // of a cluster: its representative
    };
    uint32_t best[kMaxTokens];  // of a cluster: its largest similarity; then, of a rank: the token
    uint8_t flags[kMaxTokens];
    int counts[kThreads], groups[kScanGroups];
  };

  // y: item
  static FV_DEVICE void run(Block& block, Shared& shared, const Args& args) {
    const int64_t item = block.y, row = item * args.tokens;
    block.each([&](int t) {
      for (int i = t; i < args.tokens; i += kThreads) {
        shared.flags[i] = args.is_top_token(item, i) ? kKept | kTop : 0;
      }
      for (int k = t; k < args.clusters; k += kThreads) {
        shared.scale[k] = args.iterations > 0 ? centroid_scale(args, item, k) : 0.0f;
        shared.best[k] = 0;
      }
    });
    if (args.clusters > 0 && args.iterations > 0) representatives(block, shared, args, item);
    if (args.clusters > 0 && args.iterations == 0) seeds(block, shared, args, item);

    // The best of the others fill what is left: empty clusters, too few valid tokens.
    block.each([&](int t) {
      for (int i = t; i < args.tokens; i += kThreads) shared.best[args.rank[row + i]] = i;
    });
    block.each([&](int t) {
      int others = 0;
      for (int r = t * kEach; r < (t + 1) * kEach && r < args.tokens; ++r) others += shared.flags[shared.best[r]] == 0;
      shared.counts[t] = others;
    });
    const int missing = args.budget - args.tokens + block_scan<kThreads>(block, shared.counts, shared.groups);
    block.each([&](int t) {
      int before = shared.counts[t];
      for (int r = t * kEach; r < (t + 1) * kEach && r < args.tokens; ++r) {
        uint8_t& flags = shared.flags[shared.best[r]];
        if (flags == 0 && before++ < missing) flags = kKept;
      }
    });

    block.each([&](int t) {
      int kept = 0;
      for (int i = t * kEach; i < (t + 1) * kEach && i < args.tokens; ++i) kept += shared.flags[i] != 0;
      shared.counts[t] = kept;
    });
    block_scan<kThreads>(block, shared.counts, shared.groups);
    block.each([&](int t) {
      int at = shared.counts[t];
      for (int i = t * kEach; i < (t + 1) * kEach && i < args.tokens; ++i) {
        if (shared.flags[i] == 0) continue;
        args.kept[item * args.budget + at] = i;
        args.is_top[item * args.budget + at] = (shared.flags[i] & kTop) != 0;
        ++at;
      }
    });
  }

  // Of each cluster the first of the members within kTie of the one closest to the centroid.
  static FV_DEVICE void representatives(Block& block, Shared& shared, const Args& args, int64_t item) {
    PerThread<float[kEach], kThreads> similarity;
    const int32_t* const label = args.label + item * args.tokens;
    block.each([&](int t) {
FV_UNROLL
      for (int u = 0; u < kEach; ++u) {
        const int i = t + u * kThreads;
        if (i >= args.tokens || label[i] < 0) continue;
        const float scale = shared.scale[label[i]];
        const float sum = args.sums[(item * args.clusters + label[i]) * args.tokens + i];
        similarity[t][u] = scale == 0.0f ? kLow : sum * scale;
        keep_largest(shared.best[label[i]], ordered(similarity[t][u]));
      }
    });
    block.each([&](int t) {
      for (int k = t; k < args.clusters; k += kThreads) shared.closest[k] = kMaxTokens;
    });
    block.each([&](int t) {
FV_UNROLL
      for (int u = 0; u < kEach; ++u) {
        const int i = t + u * kThreads;
        if (i >= args.tokens || label[i] < 0) continue;
        // Without a centroid all tokens are equally far, members or not: the first token, if it is a member.
        const bool eligible = similarity[t][u] > kLow || i == 0;
        if (eligible && similarity[t][u] >= unordered(shared.best[label[i]]) - kTie) {
          keep_smallest(shared.closest[label[i]], i);
        }
      }
    });
    block.each([&](int t) {
      for (int k = t; k < args.clusters; k += kThreads) {
        if (shared.closest[k] < kMaxTokens) shared.flags[shared.closest[k]] = kKept;
      }
    });
  }

  // No iteration: every cluster is its seed. The same rule as above without a centroid.
  static FV_DEVICE void seeds(Block& block, Shared& shared, const Args& args, int64_t item) {
    block.each([&](int t) {
      for (int k = t; k < args.clusters; k += kThreads) {
        const int seed = args.seeds[item * args.clusters + k];
        if (seed < 0) continue;
        const float own = args.gram[(item * args.tokens + seed) * args.tokens + seed];
        if (own > kTiny || seed == 0) shared.flags[seed] = kKept;
      }
    });
  }
};

}  // namespace flashvlm
