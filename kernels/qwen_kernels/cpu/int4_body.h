// The product with int4 weights, which become Operands in registers: included after product_body.h.

// One output of ROWS rows.
template <int ROWS>
INLINE void int4_output(const Input *x, const uint8_t *w, const uint16_t *scale, float *y, int64_t k, int64_t stride) {
  Lanes sums[ROWS];
  for (int row = 0; row < ROWS; ++row) sums[row] = zero();
  for (int64_t group = 0; group < k / GROUP; ++group) {
    if (group % 4 == 0) __builtin_prefetch(w + group * GROUP / 2 + AHEAD);
    Operands weights[GROUP / WIDTH];
    unpack(w + group * GROUP / 2, weights);
    const Lanes scales = all(number(scale[group]));
    for (int row = 0; row < ROWS; ++row) {
      Lanes products = zero();
      for (int i = 0; i < GROUP / WIDTH; ++i)
        products = multiply_add(weights[i], load(x + row * k + group * GROUP + i * WIDTH), products);
      sums[row] = multiply_add(products, scales, sums[row]);
    }
  }
  for (int row = 0; row < ROWS; ++row) y[row * stride] = sum(sums[row]);
}

template <int ROWS>
INLINE void int4_outputs(const Input *x, const uint8_t *w, const uint16_t *scale, float *y, int64_t k, int64_t n,
                         int64_t stride) {
  for (int64_t j = 0; j < n; ++j)
    int4_output<ROWS>(x, w + j * (k / 2), scale + j * (k / GROUP), y + j, k, stride);
}

static void int4_product(const Input *x, INT4_ARGUMENTS) {
  BY_ROWS(int4_outputs)
}
