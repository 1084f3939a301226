// Products of float32 or bfloat16 rows with int8 matrices, for XLA on CPUs (https://docs.jax.dev/en/latest/ffi.html).
//
// A few rows read each weight once, and memory decides the time: weights stay int8 in memory and become float32 or
// bfloat16, which hold them exactly, in registers. Sums are float32. The body is compiled once for each instruction set,
// and the best one that the processor has is chosen when the library is loaded.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE static inline __attribute__((always_inline))
// x[m, k], w[n, k], scale[n] -> y[m, n], of which n outputs are computed; rows of y are `stride` apart. x comes first.
#define ARGUMENTS \
  const int8_t *w, const float *scale, float *y, int64_t m, int64_t k, int64_t n, int64_t stride

INLINE float number(float x) { return x; }
INLINE float number(uint16_t bfloat) {
  const uint32_t bits = (uint32_t)bfloat << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
namespace avx512 {
typedef float Input;
typedef __m512 Lanes, Operands;
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
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,fma")
namespace avx512_bf16 {
typedef uint16_t Input;
typedef __m512bh Operands;
typedef __m512 Lanes;
constexpr int WIDTH = 32, SUMS = 32;
using avx512::sum;
using avx512::zero;
INLINE Operands load(const Input *p) { return (Operands)_mm512_loadu_si512(p); }
INLINE Operands widened(const int8_t *p) { return _mm512_cvtne2ps_pbh(avx512::widened(p + 16), avx512::widened(p)); }
INLINE Lanes multiply_add(Operands a, Operands b, Lanes c) { return _mm512_dpbf16_ps(c, a, b); }
#include "product_body.h"
}  // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
typedef float Input;
typedef __m256 Lanes, Operands;
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
typedef float Input, Lanes, Operands;
constexpr int WIDTH = 1, SUMS = 8;
INLINE Lanes zero() { return 0; }
INLINE Lanes load(const float *p) { return *p; }
INLINE Lanes widened(const int8_t *p) { return *p; }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
INLINE float sum(Lanes a) { return a; }
#include "product_body.h"
}  // namespace portable

template <typename Input>
using Product = void (*)(const Input *x, ARGUMENTS);

struct InstructionSet {
  const char *name;
  Product<float> floats;
  Product<uint16_t> bfloats;  // null where bfloat16 is not multiplied: rows come as float32 then
};

static const InstructionSet *known() {
  static const InstructionSet all[] = {
#if defined(__x86_64__)
      {"AVX-512 with bfloat16", avx512::product, avx512_bf16::product},
      {"AVX-512", avx512::product, nullptr},
      {"AVX2", avx2::product, nullptr},
#endif
      {"portable", portable::product, nullptr},
      {nullptr, nullptr, nullptr}};
  return all;
}

static bool supported(const std::string &name) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (name == "AVX-512 with bfloat16") return avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "AVX-512") return avx512;
  if (name == "AVX2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

static InstructionSet best_instruction_set() {
  const InstructionSet *set = known();
  while (!supported(set->name)) ++set;
  return *set;
}

static InstructionSet chosen = best_instruction_set();

extern "C" const char *qwen_instruction_set() { return chosen.name; }

extern "C" int qwen_multiplies_bfloat16() { return chosen.bfloats != nullptr; }

// Makes the library use another instruction set that the processor has; returns whether there is one of that name.
extern "C" int qwen_use_instruction_set(const char *name) {
  for (const InstructionSet *set = known(); set->name; ++set)
    if (std::string(set->name) == name && supported(set->name)) {
      chosen = *set;
      return 1;
    }
  return 0;
}

struct Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

constexpr int64_t OUTPUTS = 64;  // of a chunk

using Matrices = ffi::Buffer<ffi::S8, 3>;
using Scales = ffi::Buffer<ffi::F32, 2>;
using Result = ffi::Buffer<ffi::F32, 3>;

// rows[g, m, k], weights[g, n, k], scale[g, n] -> result[g, m, n]
template <typename Input>
static ffi::Error multiply(ffi::ThreadPool pool, const Input *rows, ffi::Span<const int64_t> shape, Matrices weights,
                           Scales scale, ffi::Result<Result> result, Product<Input> product) {
  const int64_t groups = shape[0], m = shape[1], k = shape[2], n = weights.dimensions()[1];
  const int64_t of_group = (n + OUTPUTS - 1) / OUTPUTS, chunks = groups * of_group;
  const float *scales = scale.typed_data();
  const int8_t *matrix = weights.typed_data();
  float *out = result->typed_data();
  if (!product) return ffi::Error::InvalidArgument("this processor does not multiply bfloat16");
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

using Floats = ffi::Buffer<ffi::F32, 3>;
using Bfloats = ffi::Buffer<ffi::BF16, 3>;

static ffi::Error Int8Product(ffi::ThreadPool pool, Floats x, Matrices weights, Scales scale,
                              ffi::Result<Result> result) {
  return multiply<float>(pool, x.typed_data(), x.dimensions(), weights, scale, result, chosen.floats);
}

static ffi::Error Int8ProductBfloat16(ffi::ThreadPool pool, Bfloats x, Matrices weights, Scales scale,
                                      ffi::Result<Result> result) {
  return multiply<uint16_t>(pool, (const uint16_t *)x.untyped_data(), x.dimensions(), weights, scale, result,
                            chosen.bfloats);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qwen_int8_product, Int8Product,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Matrices>().Arg<Scales>().Ret<Result>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    qwen_int8_product_bfloat16, Int8ProductBfloat16,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Bfloats>().Arg<Matrices>().Arg<Scales>().Ret<Result>());
