// The C entry points: checks, workspace, launches. Compiled by nvcc for GPUs and by g++ for the host emulation.
#include "flashvlm_kernels.h"

#include "lloyd_steps.h"
#include "score.h"

namespace flashvlm {
namespace {

static_assert(kMaxTokens == FLASHVLM_MAX_TOKENS && kMaxText == FLASHVLM_MAX_TEXT, "kernels hold what the API allows");

// Of integers and floats alike, all exact as double; false for NaN.
bool within(double value, double low, double high) { return low <= value && value <= high; }

bool aligned(const void* pointer, size_t bytes) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

bool good_shape(int32_t batch, int32_t tokens, int32_t width) {
  return within(batch, 1, FLASHVLM_MAX_BATCH) && within(tokens, 1, FLASHVLM_MAX_TOKENS) &&
         within(width, 8, FLASHVLM_MAX_WIDTH) && width % 8 == 0;
}

// Hands out pieces of the workspace; with no workspace it only measures.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += divide_up<size_t>(static_cast<size_t>(count) * sizeof(T), 256) * 256;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Sizes of pieces must not shrink where a shape grows: slices come and go with the tiles, so their most is taken.
size_t carve_score(ScoreArgs& args, int64_t batch, void* workspace) {
  args.token_tiles = divide_up(args.tokens, kTile);
  args.text_tiles = divide_up(args.text, kTile);
  const int64_t tiles = static_cast<int64_t>(args.token_tiles) * args.text_tiles;
  const Slices slices = slices_of(tiles, args.width, kFillBlocks);
  args.slices = slices.count;
  args.slice_width = slices.width;
  args.pool_blocks = divide_up(args.tokens, kPoolTokens);
  Carver carver(workspace);
  carver.take(args.partial, batch * most_partial_tiles(tiles, kFillBlocks) * kTileElements);
  carver.take(args.token_squares, batch * most_partial_tiles(args.token_tiles, kFillBlocks) * kTile);
  carver.take(args.text_squares, batch * most_partial_tiles(args.text_tiles, kFillBlocks) * kTile);
  carver.take(args.pooled, batch * args.tokens);
  carver.take(args.best_of_block, batch * args.pool_blocks);
  return carver.used();
}

size_t carve_lloyd(LloydArgs& args, int64_t batch, void* workspace) {
  args.clusters = args.budget - args.top_count;
  args.token_tiles = divide_up(args.tokens, kTile);
  args.gram_tiles = args.clusters > 0 ? args.token_tiles * (args.token_tiles + 1) / 2 : 0;
  args.rank_blocks = divide_up(args.tokens, kRankTokens);
  args.near_blocks = divide_up(args.tokens, kNearRows);
  args.sum_blocks = divide_up(args.tokens, kSumRows);
  Carver carver(workspace);
  carver.take(args.rank, batch * args.tokens);
  if (args.clusters == 0) {
    args.slices = 1;
    args.slice_width = args.width;
    return carver.used();
  }
  const Slices slices = slices_of(args.gram_tiles, args.width, kFillBlocks);
  args.slices = slices.count;
  args.slice_width = slices.width;
  const int64_t tokens = batch * args.tokens, clusters = batch * args.clusters;
  carver.take(args.label, tokens);
  carver.take(args.seeds, clusters);
  carver.take(args.partial, batch * most_partial_tiles(args.gram_tiles, kFillBlocks) * kTileElements);
  carver.take(args.gram, tokens * args.tokens);
  carver.take(args.sums, clusters * args.tokens);
  carver.take(args.norm_parts, clusters * args.sum_blocks);
  return carver.used();
}

template <class T>
int32_t run_score(const ScoreArgs& args, int32_t batch, void* stream) {
  int32_t status = launch<ScoreTiles<T>>({args.token_tiles * args.text_tiles, args.slices, batch}, args, stream);
  if (status == 0) status = launch<ScorePool>({args.pool_blocks, batch, 1}, args, stream);
  if (status == 0) status = launch<ScoreFuse>({divide_up(args.tokens, kFuseThreads), batch, 1}, args, stream);
  return status;
}

template <class T>
int32_t run_lloyd(const LloydArgs& args, int32_t batch, void* stream) {
  int32_t status =
      launch<GramTilesAndRanks<T>>({args.gram_tiles + args.rank_blocks, args.slices, batch}, args, stream);
  if (args.clusters > 0 && status == 0) {
    status = launch<GramAndFirstLabels>({args.gram_tiles + args.near_blocks, batch, 1}, args, stream);
    const Grid sums{args.sum_blocks, divide_up(args.clusters, ClusterSums::kClusters), batch};
    for (int i = 0; i < args.iterations && status == 0; ++i) {
      if (i > 0) status = launch<NearestCentroid>({args.near_blocks, batch, 1}, args, stream);
      if (status == 0) status = launch<ClusterSums>(sums, args, stream);
    }
  }
  if (status == 0) status = launch<KeepTokens>({1, batch, 1}, args, stream);
  return status;
}

}  // namespace
}  // namespace flashvlm

using namespace flashvlm;

extern "C" {

size_t flashvlm_score_workspace(int32_t batch, int32_t tokens, int32_t text, int32_t width) {
  if (!good_shape(batch, tokens, width) || !within(text, 1, FLASHVLM_MAX_TEXT)) return 0;
  ScoreArgs args{};
  args.tokens = tokens;
  args.text = text;
  args.width = width;
  return carve_score(args, batch, nullptr);
}

size_t flashvlm_lloyd_workspace(int32_t batch, int32_t tokens, int32_t width, int32_t budget, int32_t top_count) {
  if (!good_shape(batch, tokens, width) || !within(budget, 1, tokens) || !within(top_count, 0, budget)) return 0;
  LloydArgs args{};
  args.tokens = tokens;
  args.width = width;
  args.budget = budget;
  args.top_count = top_count;
  return carve_lloyd(args, batch, nullptr);
}

int32_t flashvlm_score(const flashvlm_score_call* call, void* workspace, size_t workspace_bytes, void* stream) {
  if (call == nullptr) return FLASHVLM_BAD_POINTER;
  const size_t needed = flashvlm_score_workspace(call->batch, call->tokens, call->text, call->width);
  if (needed == 0) return FLASHVLM_BAD_SHAPE;
  if (!within(call->dtype, FLASHVLM_FLOAT32, FLASHVLM_BFLOAT16) || (call->mask_bytes != 1 && call->mask_bytes != 4)) {
    return FLASHVLM_BAD_DTYPE;
  }
  if (!within(call->eta, 0.0f, 1.0f) || !within(call->temperature, 1e-6f, 1e6f) ||
      !within(call->pool_temperature, 1e-6f, 1e6f) || !within(call->eps, 1e-30f, 0.5f)) {
    return FLASHVLM_BAD_PARAMETER;
  }
  if (!aligned(call->projected, 16) || !aligned(call->query, 16) || !aligned(call->query_mask, call->mask_bytes) ||
      !aligned(call->saliency, 4) || !aligned(call->valid, call->mask_bytes) || !aligned(call->scores, 4) ||
      !aligned(workspace, 16)) {
    return FLASHVLM_BAD_POINTER;
  }
  if (workspace_bytes < needed) return FLASHVLM_SMALL_WORKSPACE;
  ScoreArgs args{};
  args.tokens = call->tokens;
  args.text = call->text;
  args.width = call->width;
  args.eta = call->eta;
  args.temperature = call->temperature;
  args.pool_temperature = call->pool_temperature;
  args.eps = call->eps;
  args.projected = call->projected;
  args.query = call->query;
  args.query_mask = Mask{call->query_mask, call->mask_bytes};
  args.valid = Mask{call->valid, call->mask_bytes};
  args.saliency = call->saliency;
  args.scores = call->scores;
  carve_score(args, call->batch, workspace);
  switch (call->dtype) {
    case FLASHVLM_FLOAT32: return run_score<Float32>(args, call->batch, stream);
    case FLASHVLM_FLOAT16: return run_score<Float16>(args, call->batch, stream);
    default: return run_score<BFloat16>(args, call->batch, stream);
  }
}

int32_t flashvlm_lloyd(const flashvlm_lloyd_call* call, void* workspace, size_t workspace_bytes, void* stream) {
  if (call == nullptr) return FLASHVLM_BAD_POINTER;
  if (!good_shape(call->batch, call->tokens, call->width)) return FLASHVLM_BAD_SHAPE;
  if (!within(call->dtype, FLASHVLM_FLOAT32, FLASHVLM_BFLOAT16) || (call->mask_bytes != 1 && call->mask_bytes != 4)) {
    return FLASHVLM_BAD_DTYPE;
  }
  if (!within(call->budget, 1, call->tokens) || !within(call->top_count, 0, call->budget) ||
      !within(call->iterations, 0, 100)) {
    return FLASHVLM_BAD_PARAMETER;
  }
  if (!aligned(call->features, 16) || !aligned(call->scores, 4) || !aligned(call->valid, call->mask_bytes) ||
      !aligned(call->kept, 4) || !aligned(call->is_top, 4) || !aligned(workspace, 16)) {
    return FLASHVLM_BAD_POINTER;
  }
  LloydArgs args{};
  args.tokens = call->tokens;
  args.width = call->width;
  args.budget = call->budget;
  args.top_count = call->top_count;
  args.iterations = call->iterations;
  args.features = call->features;
  args.scores = call->scores;
  args.valid = Mask{call->valid, call->mask_bytes};
  args.kept = call->kept;
  args.is_top = call->is_top;
  if (workspace_bytes < carve_lloyd(args, call->batch, workspace)) return FLASHVLM_SMALL_WORKSPACE;
  switch (call->dtype) {
    case FLASHVLM_FLOAT32: return run_lloyd<Float32>(args, call->batch, stream);
    case FLASHVLM_FLOAT16: return run_lloyd<Float16>(args, call->batch, stream);
    default: return run_lloyd<BFloat16>(args, call->batch, stream);
  }
}

const char* flashvlm_status_text(int32_t status) {
  switch (status) {
    case FLASHVLM_OK: return "success";
    case FLASHVLM_BAD_SHAPE: return "shape: expected N to 4096, L to 512, a width that is a multiple of 8 up to 65536";
    case FLASHVLM_BAD_DTYPE: return "dtype: expected float32, float16 or bfloat16, and masks of 1 or 4 bytes";
    case FLASHVLM_BAD_PARAMETER: return "parameter: a constant of the method is outside its range";
    case FLASHVLM_BAD_POINTER:
      return "pointer: expected tokens, query and workspace aligned to 16 bytes, the rest to its elements";
    case FLASHVLM_SMALL_WORKSPACE: return "workspace: smaller than flashvlm_*_workspace says";
    default: break;
  }
#ifdef __CUDACC__
  if (status > 0) return cudaGetErrorString(static_cast<cudaError_t>(status));
#endif
  return "unknown status";
}

#ifndef __CUDACC__
// Of the emulation only: the order of threads in a phase (0 forwards, 1 backwards, 2 shuffled); launches since asked.
FLASHVLM_API void flashvlm_emulation_order(int32_t order) { emulation.order = order; }
FLASHVLM_API int32_t flashvlm_emulation_launches() { return std::exchange(emulation.launches, 0); }
#endif

}  // extern "C"
