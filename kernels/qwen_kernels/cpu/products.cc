// Products of float32 or bfloat16 rows with int8 and int4 matrices, for XLA on CPUs
// (https://docs.jax.dev/en/latest/ffi.html).
//
// A few rows read each weight once, and memory decides the time: weights stay as they are in memory and become float32
// or bfloat16, which hold them exactly, in registers. Sums are float32. int8 weights have a float32 scale for each
// output. int4 weights have a bfloat16 scale for each GROUP of an output's inputs, whose integers, plus 8, are in half
// as many bytes: those of the first half of the group in the low bits, those of the second half in the high ones.
// The bodies are compiled once for each instruction set, and the best one that the processor has is chosen when the
// library is loaded.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define INLINE static inline __attribute__((always_inline))
constexpr int64_t GROUP = 32;
// x[m, k], w[n, k], scale[n] -> y[m, n], of which n outputs are computed; rows of y are `stride` apart. x comes first.
#define ARGUMENTS \
  const int8_t *w, const float *scale, float *y, int64_t m, int64_t k, int64_t n, int64_t stride
// The same with w[n, k / 2] and scale[n, k / GROUP].
#define INT4_ARGUMENTS \
  const uint8_t *w, const uint16_t *scale, float *y, int64_t m, int64_t k, int64_t n, int64_t stride

// Calls OUTPUTS, a function of ARGUMENTS or INT4_ARGUMENTS for as many rows as its parameter says, for all m rows.
#define BY_ROWS(OUTPUTS)                                                                                       \
  for (; m >= 8; m -= 8, x += 8 * k, y += 8 * stride) OUTPUTS<8>(x, w, scale, y, k, n, stride);                \
  for (; m >= 4; m -= 4, x += 4 * k, y += 4 * stride) OUTPUTS<4>(x, w, scale, y, k, n, stride);                \
  for (; m >= 2; m -= 2, x += 2 * k, y += 2 * stride) OUTPUTS<2>(x, w, scale, y, k, n, stride);                \
  if (m) OUTPUTS<1>(x, w, scale, y, k, n, stride);

INLINE float number(float x) { return x; }
INLINE float number(uint16_t bfloat) {
  const uint32_t bits = (uint32_t)bfloat << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

#if defined(__x86_64__)
#include <immintrin.h>

// Of a group's 16 bytes: the integers of its first half, from -8 to 7, and those of its second half.
INLINE __m128i less_eight(__m128i bytes) {
  return _mm_sub_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)), _mm_set1_epi8(8));
}
INLINE __m128i first_half(const uint8_t *packed) { return less_eight(_mm_loadu_si128((const __m128i *)packed)); }
INLINE __m128i second_half(const uint8_t *packed) {
  return less_eight(_mm_srli_epi16(_mm_loadu_si128((const __m128i *)packed), 4));
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,fma")
namespace avx512 {
typedef float Input;
typedef __m512 Lanes, Operands;
constexpr int WIDTH = 16, SUMS = 32;
INLINE Lanes zero() { return _mm512_setzero_ps(); }
INLINE Lanes load(const float *p) { return _mm512_loadu_ps(p); }
INLINE Lanes floats(__m128i integers) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(integers)); }
INLINE Lanes widened(const int8_t *p) { return floats(_mm_loadu_si128((const __m128i *)p)); }
INLINE void unpack(const uint8_t *packed, Operands *weights) {
  weights[0] = floats(first_half(packed));
  weights[1] = floats(second_half(packed));
}
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
INLINE float sum(Lanes a) { return _mm512_reduce_add_ps(a); }
#include "product_body.h"
#include "int4_body.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512bf16,fma")
namespace avx512_bf16 {
typedef uint16_t Input;
typedef __m512bh Operands;
typedef __m512 Lanes;
constexpr int WIDTH = 32, SUMS = 32;
using avx512::all;
using avx512::multiply_add;
using avx512::sum;
using avx512::zero;
INLINE Operands load(const Input *p) { return (Operands)_mm512_loadu_si512(p); }
INLINE Operands widened(const int8_t *p) { return _mm512_cvtne2ps_pbh(avx512::widened(p + 16), avx512::widened(p)); }
INLINE void unpack(const uint8_t *packed, Operands *weights) {
  weights[0] = _mm512_cvtne2ps_pbh(avx512::floats(second_half(packed)), avx512::floats(first_half(packed)));
}
INLINE Lanes multiply_add(Operands a, Operands b, Lanes c) { return _mm512_dpbf16_ps(c, a, b); }
#include "product_body.h"
#include "int4_body.h"
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
INLINE void store(float *p, Lanes a) { _mm256_storeu_ps(p, a); }
INLINE Lanes widened(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Lanes all(float x) { return _mm256_set1_ps(x); }
INLINE float sum(Lanes a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}
#include "product_body.h"
#include "int4_avx2.h"
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
typedef float Input, Lanes, Operands;
constexpr int WIDTH = 1, SUMS = 8;
INLINE Lanes zero() { return 0; }
INLINE Lanes load(const float *p) { return *p; }
INLINE Lanes widened(const int8_t *p) { return *p; }
INLINE void unpack(const uint8_t *packed, Operands *weights) {
  for (int i = 0; i < GROUP / 2; ++i) {
    weights[i] = (packed[i] & 15) - 8;
    weights[i + GROUP / 2] = (packed[i] >> 4) - 8;
  }
}
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
INLINE Lanes all(float x) { return x; }
INLINE float sum(Lanes a) { return a; }
#include "product_body.h"
#include "int4_body.h"
}  // namespace portable

template <typename Input>
struct Products {
  void (*int8)(const Input *x, ARGUMENTS);
  void (*int4)(const Input *x, INT4_ARGUMENTS);
};

struct InstructionSet {
  const char *name;
  Products<float> floats;
  Products<uint16_t> bfloats;  // null where bfloat16 is not multiplied: rows come as float32 then
};

static const InstructionSet *known() {
  static const InstructionSet all[] = {
#if defined(__x86_64__)
      {"AVX-512 with bfloat16",
       {avx512::product, avx512::int4_product},
       {avx512_bf16::product, avx512_bf16::int4_product}},
      {"AVX-512", {avx512::product, avx512::int4_product}, {}},
      {"AVX2", {avx2::product, avx2::int4_product}, {}},
#endif
      {"portable", {portable::product, portable::int4_product}, {}},
      {}};
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

extern "C" int qwen_multiplies_bfloat16() { return chosen.bfloats.int8 != nullptr; }

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

using Floats = ffi::Buffer<ffi::F32, 3>;
using Bfloats = ffi::Buffer<ffi::BF16, 3>;
using Int8s = ffi::Buffer<ffi::S8, 3>;
using Int4s = ffi::Buffer<ffi::U8, 3>;
using OutputScales = ffi::Buffer<ffi::F32, 2>;
using GroupScales = ffi::Buffer<ffi::BF16, 3>;
using Result = ffi::Buffer<ffi::F32, 3>;

// rows[g, m, k], weights of g n outputs, their scales -> result[g, m, n]. An output has `size` weights (as they are
// stored) and `scales` scales.
template <typename Input, typename Weight, typename Scale, typename Function>
static ffi::Error multiply(ffi::ThreadPool pool, const Input *rows, const Weight *weights, const Scale *scale,
                           ffi::Span<const int64_t> shape, ffi::Result<Result> result, int64_t size, int64_t scales,
                           Function product) {
  const int64_t groups = shape[0], m = shape[1], k = shape[2], n = result->dimensions()[2];
  const int64_t of_group = (n + OUTPUTS - 1) / OUTPUTS, chunks = groups * of_group;
  float *out = result->typed_data();
  if (!product) return ffi::Error::InvalidArgument("this processor does not multiply bfloat16");
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t chunk; (chunk = progress->taken.fetch_add(1)) < chunks;) {
      const int64_t group = chunk / of_group, first = chunk % of_group * OUTPUTS, output = group * n + first;
      product(rows + group * m * k, weights + output * size, scale + output * scales, out + group * m * n + first, m, k,
              std::min(OUTPUTS, n - first), n);
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

static const float *elements(Floats &rows) { return rows.typed_data(); }
static const uint16_t *elements(Bfloats &rows) { return (const uint16_t *)rows.untyped_data(); }
static const Products<float> &products_of(Floats &) { return chosen.floats; }
static const Products<uint16_t> &products_of(Bfloats &) { return chosen.bfloats; }

template <typename Rows>
static ffi::Error int8_product(ffi::ThreadPool pool, Rows x, Int8s weights, OutputScales scale,
                               ffi::Result<Result> result) {
  const ffi::Span<const int64_t> shape = x.dimensions();
  return multiply(pool, elements(x), weights.typed_data(), scale.typed_data(), shape, result, shape[2], 1,
                  products_of(x).int8);
}

template <typename Rows>
static ffi::Error int4_product(ffi::ThreadPool pool, Rows x, Int4s weights, GroupScales scale,
                               ffi::Result<Result> result) {
  const ffi::Span<const int64_t> shape = x.dimensions();
  if (shape[2] % GROUP) return ffi::Error::InvalidArgument("the inputs of int4 weights must be whole groups");
  return multiply(pool, elements(x), weights.typed_data(), (const uint16_t *)scale.untyped_data(), shape, result,
                  shape[2] / 2, shape[2] / GROUP, products_of(x).int4);
}

#define HANDLER(NAME, FUNCTION, ROWS, WEIGHTS, SCALES)                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, FUNCTION<ROWS>,                                               \
                                ffi::Ffi::Bind()                                                    \
                                    .Ctx<ffi::ThreadPool>()                                         \
                                    .Arg<ROWS>()                                                    \
                                    .Arg<WEIGHTS>()                                                 \
                                    .Arg<SCALES>()                                                  \
                                    .Ret<Result>())
HANDLER(qwen_int8_product, int8_product, Floats, Int8s, OutputScales);
HANDLER(qwen_int8_product_bfloat16, int8_product, Bfloats, Int8s, OutputScales);
HANDLER(qwen_int4_product, int4_product, Floats, Int4s, GroupScales);
HANDLER(qwen_int4_product_bfloat16, int4_product, Bfloats, Int4s, GroupScales);
