// The product for one instruction set: included in a namespace that has Lanes, WIDTH and its operations on them.

// One output of ROWS rows. Reading one row of weights at a time keeps the processor's prefetcher ahead.
template <int ROWS>
INLINE void output(const float *x, const int8_t *w, float scale, float *y, int64_t k, int64_t stride) {
  Lanes sums[ROWS];
  for (int row = 0; row < ROWS; ++row) sums[row] = zero();
  int64_t i = 0;
  for (; i + WIDTH <= k; i += WIDTH) {
    const Lanes weights = widened(w + i);
    for (int row = 0; row < ROWS; ++row) sums[row] = multiply_add(weights, load(x + row * k + i), sums[row]);
  }
  for (int row = 0; row < ROWS; ++row) {
    float total = sum(sums[row]);
    for (int64_t rest = i; rest < k; ++rest) total += w[rest] * x[row * k + rest];
    y[row * stride] = total * scale;
  }
}

template <int ROWS>
INLINE void outputs(const float *x, const int8_t *w, const float *scale, float *y, int64_t k, int64_t n,
                    int64_t stride) {
  for (int64_t j = 0; j < n; ++j) output<ROWS>(x, w + j * k, scale[j], y + j, k, stride);
}

static void product(ARGUMENTS) {
  for (; m >= 8; m -= 8, x += 8 * k, y += 8 * stride) outputs<8>(x, w, scale, y, k, n, stride);
  for (; m >= 4; m -= 4, x += 4 * k, y += 4 * stride) outputs<4>(x, w, scale, y, k, n, stride);
  for (; m >= 2; m -= 2, x += 2 * k, y += 2 * stride) outputs<2>(x, w, scale, y, k, n, stride);
  if (m) outputs<1>(x, w, scale, y, k, n, stride);
}
