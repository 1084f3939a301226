// Products of float32 rows with int8 matrices, for XLA on CPUs (https://docs.jax.dev/en/latest/ffi.html).
//
// A few rows read each weight once, and memory decides the time: weights stay int8 in memory and become float32 in
// registers. The body is compiled once for each instruction set, and the best one that the processor has is chosen when
// the library is loaded.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE static inline __attribute__((always_inline))
// x[m, k], w[n, k], scale[n] -> y[m, n], of which n outputs are computed; rows of y are `stride` apart.
#define ARGUMENTS                                                                                          \
  const float *x, const int8_t *w, const float *scale, float *y, int64_t m, int64_t k, int64_t n, int64_t stride

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
namespace avx512 {
typedef __m512 Lanes;
constexpr int WIDTH = 16, SUMS = 32;
INLINE Lanes zero() { return _mm512_setzero_ps(); }
INLINE Lanes load(const float *p) { return _mm512_loadu_ps(p); }
INLINE Lanes widened(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Lanes a) { return _mm512_reduce_add_ps(a); }
#include "product_body.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
typedef __m256 Lanes;
constexpr int WIDTH = 8, SUMS = 8;
INLINE Lanes zero() { return _mm256_setzero_ps(); }
INLINE Lanes load(const float *p) { return _mm256_loadu_ps(p); }
INLINE Lanes widened(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(Lanes a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#include "product_body.h"
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
typedef float Lanes;
constexpr int WIDTH = 1, SUMS = 8;
INLINE Lanes zero() { return 0; }
INLINE Lanes load(const float *p) { return *p; }
INLINE Lanes widened(const int8_t *p) { return *p; }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
INLINE float sum(Lanes a) { return a; }
#include "product_body.h"
}  // namespace portable

typedef void (*Product)(ARGUMENTS);

struct InstructionSet {
  const char *name;
  Product product;
};

static InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return {"AVX-512", avx512::product};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"AVX2", avx2::product};
#endif
  return {"portable", portable::product};
}

static InstructionSet chosen = best_instruction_set();

extern "C" const char *qwen_instruction_set() { return chosen.name; }

// Makes the library use another instruction set that the processor has; returns whether there is one of that name.
extern "C" int qwen_use_instruction_set(const char *name) {
  const InstructionSet known[] = {best_instruction_set(),
#if defined(__x86_64__)
                                  {"AVX2", __builtin_cpu_supports("avx2") ? avx2::product : nullptr},
#endif
                                  {"portable", portable::product}};
  for (const InstructionSet &set : known)
    if (set.product && std::string(set.name) == name) {
      chosen = set;
      return 1;
    }
  return 0;
}

struct Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

constexpr int64_t OUTPUTS = 64;  // of a chunk

using Rows = ffi::Buffer<ffi::F32, 3>;
using Matrices = ffi::Buffer<ffi::S8, 3>;
using Scales = ffi::Buffer<ffi::F32, 2>;

// x[g, m, k], weights[g, n, k], scale[g, n] -> result[g, m, n]
static ffi::Error Int8Product(ffi::ThreadPool pool, Rows x, Matrices weights, Scales scale,
                              ffi::Result<Rows> result) {
  const int64_t groups = x.dimensions()[0], m = x.dimensions()[1], k = x.dimensions()[2];
  const int64_t n = weights.dimensions()[1];
  const int64_t of_group = (n + OUTPUTS - 1) / OUTPUTS, chunks = groups * of_group;
  const float *rows = x.typed_data(), *scales = scale.typed_data();
  const int8_t *matrix = weights.typed_data();
  float *out = result->typed_data();
  const Product product = chosen.product;
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t chunk; (chunk = progress->taken.fetch_add(1)) < chunks;) {
      const int64_t group = chunk / of_group, first = chunk % of_group * OUTPUTS;
      product(rows + group * m * k, matrix + (group * n + first) * k, scales + group * n + first,
              out + group * m * n + first, m, k, std::min(OUTPUTS, n - first), n);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  // The pool may never start these tasks while this handler runs: several handlers that waited for theirs would wait
  // for ever. So this thread takes chunks too, and waits only for chunks that others have begun.
  for (int64_t thread = 1; thread < std::min<int64_t>(pool.num_threads(), chunks); ++thread) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < chunks; ++spins)
    if (spins > 1000) std::this_thread::yield();
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(qwen_int8_product, Int8Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<Matrices>()
                                  .Arg<Scales>()
                                  .Ret<Rows>());
