// Attention of one new token of each row to the keys and values of its own past, as far as that goes: no mask, and no
// work for padding. Rows, and heads within them, do not depend on each other, and every sum has one fixed order.
// Included by cpu_mixed.cpp, whose vectors and conversions it uses.

extern "C" {

// Mirrored by kernels/attention.py, field by field. Strides are in elements; d is a multiple of 16.
struct Attention {
  const void *q, *keys, *values;  // [rows, heads * group, d], then [rows, tokens, heads, d] with strides
  const int64_t* lengths;         // [rows]: tokens of each row, the new one included
  void* out;                      // [rows, heads * group, d]
  int64_t rows, heads, group, d, key_row, key_token, key_head, value_row, value_token, value_head, dtype, threads;
  double scale;
};
}

namespace {

// exp(x) for x <= 0, to about 2 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
  using Ints = int32_t __attribute__((vector_size(64)));
  const Floats least = Floats{} - 87.0f;
  x = x < least ? least : x;
  const Floats shifted = x * 1.44269504088896341f - 0.5f;
  const Ints n = __builtin_convertvector(shifted, Ints);  // towards zero, and shifted is negative: rounds to nearest
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * (Floats)((n + 127) << 23);
}

// scores (padded to whole vectors) to weights that sum to one
inline void softmax(float* scores, int64_t n) {
  float largest = scores[0];
  for (int64_t t = 1; t < n; ++t) largest = std::max(largest, scores[t]);
  for (int64_t t = n; t % kLanes != 0; ++t) scores[t] = -INFINITY;
  Floats total{};
  for (int64_t t = 0; t < n; t += kLanes) {
    Floats v = exponential(load(scores + t) - largest);
    for (int64_t i = n - t; i < kLanes; ++i) v[i] = 0;
    total += v;
    std::memcpy(scores + t, &v, sizeof v);
  }
  const float factor = 1.0f / sum(total);
  for (int64_t t = 0; t < n; ++t) scores[t] *= factor;
}

template <class T>
void attend_row(const Attention& a, int64_t row, float* scores, float* acc, int64_t stride) {
  const int64_t n = a.lengths[row], queries = a.heads * a.group;
  const T* q = static_cast<const T*>(a.q) + row * queries * a.d;
  const T* keys = static_cast<const T*>(a.keys) + row * a.key_row;
  const T* values = static_cast<const T*>(a.values) + row * a.value_row;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* key = keys + t * a.key_token + h * a.key_head;
      for (int64_t g = h * a.group; g < (h + 1) * a.group; ++g) {
        Floats product{};
        for (int64_t c = 0; c < a.d; c += kLanes) product += load(q + g * a.d + c) * load(key + c);
        scores[g * stride + t] = static_cast<float>(a.scale) * sum(product);
      }
    }
  for (int64_t g = 0; g < queries; ++g) softmax(scores + g * stride, n);
  std::memset(acc, 0, sizeof(float) * queries * a.d);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* value = values + t * a.value_token + h * a.value_head;
      for (int64_t g = h * a.group; g < (h + 1) * a.group; ++g) {
        const float weight = scores[g * stride + t];
        for (int64_t c = 0; c < a.d; c += kLanes) {
          const Floats v = load(acc + g * a.d + c) + weight * load(value + c);
          std::memcpy(acc + g * a.d + c, &v, sizeof v);
        }
      }
    }
  store(acc, static_cast<T*>(a.out) + row * queries * a.d, queries * a.d);
}

template <class T>
void attend(const Attention& a) {
  const int64_t longest = *std::max_element(a.lengths, a.lengths + a.rows);
  const int64_t stride = (longest + kLanes - 1) / kLanes * kLanes, queries = a.heads * a.group;
#pragma omp parallel for schedule(dynamic) num_threads(a.threads) if (a.threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    thread_local std::vector<float> scratch;
    scratch.resize(queries * (stride + a.d));
    attend_row<T>(a, row, scratch.data(), scratch.data() + queries * stride, stride);
  }
}

}  // namespace

extern "C" void attend_past(const Attention* a) {
  if (a->dtype == 0) attend<float>(*a);
  else if (a->dtype == 1) attend<BFloat16>(*a);
  else attend<Float16>(*a);
}
