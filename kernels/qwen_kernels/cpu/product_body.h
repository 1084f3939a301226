// The product with int8 weights for one instruction set: included in a namespace that has Input (type of the rows),
// Operands (WIDTH inputs or weights in a register), Lanes (of sums), SUMS (how many of them the registers hold) and the
// operations on these.

constexpr int64_t NEAR = 24 << 10;  // bytes of rows that stay in the first cache beside the weights
constexpr int64_t AHEAD = 2048;     // bytes between a weight that is read and the one that is fetched

// OUTS outputs of ROWS rows. One output at a time reads the weights in order, which memory does fastest; several read
// the rows less often, which pays where there are many, or where they are so long that they leave the first cache.
// A sum waits for the one before it: where there are few of them, the inputs take turns with CHAINS sums.
template <int ROWS, int OUTS>
INLINE void output(const Input *x, const int8_t *w, const float *scale, float *y, int64_t k, int64_t stride) {
  constexpr int CHAINS = ROWS * OUTS >= 4 ? 1 : 4 / (ROWS * OUTS);
  const int64_t ahead = OUTS > 1 ? OUTS * k : AHEAD;
  Lanes sums[ROWS][OUTS][CHAINS];
  for (int row = 0; row < ROWS; ++row)
    for (int out = 0; out < OUTS; ++out)
      for (int chain = 0; chain < CHAINS; ++chain) sums[row][out][chain] = zero();
  int64_t i = 0;
  const auto step = [&](int chain) __attribute__((always_inline)) {
    Operands weights[OUTS];
    for (int out = 0; out < OUTS; ++out) {
      if (i % 64 == 0) __builtin_prefetch(w + out * k + i + ahead);
      weights[out] = widened(w + out * k + i);
    }
    for (int row = 0; row < ROWS; ++row) {
      const Operands inputs = load(x + row * k + i);
      for (int out = 0; out < OUTS; ++out)
        sums[row][out][chain] = multiply_add(weights[out], inputs, sums[row][out][chain]);
    }
    i += WIDTH;
  };
  while (i + CHAINS * WIDTH <= k)
    for (int chain = 0; chain < CHAINS; ++chain) step(chain);
  while (i + WIDTH <= k) step(0);
  for (int row = 0; row < ROWS; ++row)
    for (int out = 0; out < OUTS; ++out) {
      for (int chain = 1; chain < CHAINS; ++chain)
        sums[row][out][0] = multiply_add(sums[row][out][chain], all(1), sums[row][out][0]);
      float total = sum(sums[row][out][0]);
      for (int64_t rest = i; rest < k; ++rest) total += w[out * k + rest] * number(x[row * k + rest]);
      y[row * stride + out] = total * scale[out];
    }
}

template <int ROWS>
INLINE void outputs(const Input *x, const int8_t *w, const float *scale, float *y, int64_t k, int64_t n,
                    int64_t stride) {
  constexpr int OUTS = SUMS / ROWS < 1 ? 1 : SUMS / ROWS > 4 ? 4 : SUMS / ROWS;
  int64_t j = 0;
  if (ROWS >= 4 || ROWS * k * (int64_t)sizeof(Input) > NEAR)
    for (; j + OUTS <= n; j += OUTS) output<ROWS, OUTS>(x, w + j * k, scale + j, y + j, k, stride);
  for (; j < n; ++j) output<ROWS, 1>(x, w + j * k, scale + j, y + j, k, stride);
}

static void product(const Input *x, ARGUMENTS) {
  BY_ROWS(outputs)
}
