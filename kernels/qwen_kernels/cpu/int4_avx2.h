// The product with int4 weights in integers, for AVX2, where widening weights takes longer than reading them: included
// after product_body.h. Rows are rounded to int8 with a scale for each group of inputs, as llama.cpp rounds them.
// Weights are multiplied as they are stored, from 0 to 15, and 8 times the sum of a group's inputs is taken off.

INLINE Lanes absolute(Lanes x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

// Rounds a group of a row: writes its integers, -8 times their sum, and their scale: NaN if an input is not finite.
INLINE void round_group(const float *x, int8_t *integers, float *offset, float *scale) {
  Lanes inputs[4], largest = zero(), unusual = zero();
  for (int i = 0; i < 4; ++i) {
    inputs[i] = load(x + i * WIDTH);
    largest = _mm256_max_ps(largest, absolute(inputs[i]));
    unusual = multiply_add(inputs[i], zero(), unusual);
  }
  float each[WIDTH], most = 0;
  _mm256_storeu_ps(each, largest);
  for (int i = 0; i < WIDTH; ++i) most = each[i] > most ? each[i] : most;
  const Lanes inverse = all(most > 0 ? 127 / most : 0);
  __m256i rounded[4];
  for (int i = 0; i < 4; ++i) rounded[i] = _mm256_cvtps_epi32(_mm256_mul_ps(inputs[i], inverse));
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(rounded[0], rounded[1]),
                                            _mm256_packs_epi32(rounded[2], rounded[3]));
  const __m256i in_order = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256((__m256i *)integers, in_order);
  int total = 0;
  for (int i = 0; i < GROUP; ++i) total += integers[i];
  *offset = -8.0f * total;
  *scale = most / 127 + sum(unusual);
}

// A row of which `k / GROUP` groups are rounded; products: scales of an output's groups times those of the row's.
struct Row {
  int8_t *integers;
  float *scales, *offsets, *products;
};

// Multiplies the scales of an output's groups by those of a row's; returns what the offsets add to the output.
INLINE Lanes multiply_scales(const uint16_t *scale, const Row &row, int64_t groups) {
  Lanes offset = zero();
  int64_t group = 0;
  for (; group + WIDTH <= groups; group += WIDTH) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(scale + group)));
    const Lanes products = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), load(row.scales + group));
    store(row.products + group, products);
    offset = multiply_add(products, load(row.offsets + group), offset);
  }
  float rest = 0;
  for (; group < groups; ++group) {
    row.products[group] = number(scale[group]) * row.scales[group];
    rest += row.products[group] * row.offsets[group];
  }
  return _mm256_add_ps(offset, _mm256_castps128_ps256(_mm_set_ss(rest)));
}

// One output of ROWS rows.
template <int ROWS>
INLINE void int4_output(const Row *rows, const uint8_t *w, const uint16_t *scale, float *y, int64_t k, int64_t stride) {
  Lanes sums[ROWS];
  for (int row = 0; row < ROWS; ++row) sums[row] = multiply_scales(scale, rows[row], k / GROUP);
  const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4), four_bits = _mm256_set1_epi8(15);
  for (int64_t group = 0; group < k / GROUP; ++group) {
    if (group % 4 == 0) __builtin_prefetch(w + group * GROUP / 2 + AHEAD);
    const __m128i packed = _mm_loadu_si128((const __m128i *)(w + group * GROUP / 2));
    const __m256i shifted = _mm256_srlv_epi32(_mm256_broadcastsi128_si256(packed), halves);
    const __m256i weights = _mm256_and_si256(shifted, four_bits);
    for (int row = 0; row < ROWS; ++row) {
      const __m256i inputs = _mm256_loadu_si256((const __m256i *)(rows[row].integers + group * GROUP));
      const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
      const Lanes products = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      sums[row] = multiply_add(products, _mm256_broadcast_ss(rows[row].products + group), sums[row]);
    }
  }
  for (int row = 0; row < ROWS; ++row) y[row * stride] = sum(sums[row]);
}

template <int ROWS>
INLINE void int4_outputs(const float *x, const uint8_t *w, const uint16_t *scale, float *y, int64_t k, int64_t n,
                         int64_t stride) {
  static thread_local std::vector<int8_t> integers;
  static thread_local std::vector<float> floats;
  const int64_t groups = k / GROUP;
  integers.resize(ROWS * k);
  floats.resize(ROWS * groups * 3);
  Row rows[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    float *scales = floats.data() + row * groups * 3;
    rows[row] = {integers.data() + row * k, scales, scales + groups, scales + 2 * groups};
    for (int64_t group = 0; group < groups; ++group)
      round_group(x + row * k + group * GROUP, rows[row].integers + group * GROUP, rows[row].offsets + group,
                  scales + group);
  }
  for (int64_t j = 0; j < n; ++j) int4_output<ROWS>(rows, w + j * (k / 2), scale + j * groups, y + j, k, stride);
}

static void int4_product(const float *x, INT4_ARGUMENTS) {
  BY_ROWS(int4_outputs)
}
