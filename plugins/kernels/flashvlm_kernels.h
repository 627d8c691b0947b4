// FlashVLM's token selection on a GPU: plain C entry points, no TensorRT.
//
// B batch, N visual tokens, D language-model width, Dv vision width, L text tokens, K budget. Tensors are dense,
// row-major device memory; projected, query, features and the workspace are aligned to 16 bytes. Nothing is
// allocated, nothing synchronises, every result is the same in every run and every item the same alone as in a batch.
// The calls can be captured in a CUDA graph, after one ordinary call: CUDA loads a kernel when it is first launched.
#ifndef FLASHVLM_KERNELS_H_
#define FLASHVLM_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FLASHVLM_API __attribute__((visibility("default")))
#else
#define FLASHVLM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  FLASHVLM_MAX_TOKENS = 4096,
  FLASHVLM_MAX_TEXT = 512,
  FLASHVLM_MAX_WIDTH = 65536,
  FLASHVLM_MAX_BATCH = 65535,
};

typedef enum { FLASHVLM_FLOAT32 = 0, FLASHVLM_FLOAT16 = 1, FLASHVLM_BFLOAT16 = 2 } flashvlm_dtype;

// 0 is success, a positive status is a cudaError_t, a negative one of these.
typedef enum {
  FLASHVLM_OK = 0,
  FLASHVLM_BAD_SHAPE = -1,      // a size is outside the limits above, or a width is no multiple of 8
  FLASHVLM_BAD_DTYPE = -2,      // an unknown flashvlm_dtype, or masks of neither 1 nor 4 bytes
  FLASHVLM_BAD_PARAMETER = -3,  // a constant of the method is outside its range
  FLASHVLM_BAD_POINTER = -4,    // null or unaligned
  FLASHVLM_SMALL_WORKSPACE = -5,
} flashvlm_status;

typedef struct {
  int32_t batch, tokens, text, width;
  int32_t dtype;        // flashvlm_dtype of projected and query
  int32_t mask_bytes;   // 1: bool, 4: int32; of query_mask and valid
  float eta, temperature, pool_temperature, eps;
  const void* projected;   // [B, N, D]
  const void* query;       // [B, L, D]
  const void* query_mask;  // [B, L]
  const float* saliency;   // [B, N]
  const void* valid;       // [B, N]
  float* scores;           // [B, N], written
} flashvlm_score_call;

typedef struct {
  int32_t batch, tokens, width;
  int32_t dtype;       // flashvlm_dtype of features
  int32_t mask_bytes;  // 1: bool, 4: int32; of valid
  int32_t budget;      // K, 1 to N
  int32_t top_count;   // of the K by score, 0 to K; the rest are representatives
  int32_t iterations;  // of Lloyd, 0 to 100
  const void* features;  // [B, N, Dv]; not read where top_count equals budget
  const float* scores;   // [B, N]
  const void* valid;     // [B, N]
  int32_t* kept;         // [B, K] ascending and distinct, written
  int32_t* is_top;       // [B, K] 1 where chosen by score, written
} flashvlm_lloyd_call;

// Bytes of workspace; never less for a larger size, so the largest sizes of a range serve all of it. 0: bad sizes.
FLASHVLM_API size_t flashvlm_score_workspace(int32_t batch, int32_t tokens, int32_t text, int32_t width);
FLASHVLM_API size_t flashvlm_lloyd_workspace(int32_t batch, int32_t tokens, int32_t width, int32_t budget,
                                             int32_t top_count);

// The scores of flashvlm_export.selection.ops.text_guided_score. stream is a cudaStream_t.
FLASHVLM_API int32_t flashvlm_score(const flashvlm_score_call* call, void* workspace, size_t workspace_bytes,
                                    void* stream);

// The choice of flashvlm_export.selection.flashvlm.flashvlm, given its scores.
FLASHVLM_API int32_t flashvlm_lloyd(const flashvlm_lloyd_call* call, void* workspace, size_t workspace_bytes,
                                    void* stream);

// One line on a status, for people; never null.
FLASHVLM_API const char* flashvlm_status_text(int32_t status);

#ifdef __cplusplus
}
#endif

#endif  // FLASHVLM_KERNELS_H_
