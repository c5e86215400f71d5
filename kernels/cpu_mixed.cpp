// Mixtures of LoRA adapters on a CPU, without intermediate [tokens, slots, width] tensors and without atomics.
//
// Three products make up the forward and the backward pass (s: slice, e: adapter of the pair p = (token, slot)):
//   shrink  h[s, p, j] = <M_s[row_e + j, range_s], x[t_p, range_s]>
//   expand  y[t, :]   += sum over p of t, s, j:  weight_p * scale_se * h[s, p, j] * M_s[row_e + j, :]
//   outer   dM_s[row_e + j, :] = sum over pairs p of e:  weight_p * scale_se * h[s, p, j] * x[t_p, :]
// Pairs are sorted by adapter first, so that each adapter is read once. Every sum has one fixed order, whatever the
// number of threads and whatever else is in the batch. No dependency but the C++ library: it builds in seconds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int64_t kScratchFloats = 128 * 1024;  // of one accumulator block: a quarter of an L2 cache, beside the rows
constexpr int64_t kMaxColumns = 4096;
constexpr int64_t kMinColumns = 256;

using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Shorts = uint16_t __attribute__((vector_size(32)));
using Halfs = _Float16 __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
  Shorts v;
  std::memcpy(&v, p, sizeof v);
  return (Floats)(__builtin_convertvector(v, Words) << 16);
}

inline Floats load(const Float16* p) {
  Halfs v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Floats);
}

template <class T>
inline Floats load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

inline void convert(float v, float* p) { *p = v; }
inline void convert(float v, Float16* p) { *p = static_cast<Float16>(v); }
inline void convert(float v, BFloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  p->bits = static_cast<uint16_t>((v == v ? rounded : bits | 0x400000) >> 16);
}

template <class T>
inline void store(const float* from, T* to, int64_t n) {
  for (int64_t c = 0; c < n; ++c) convert(from[c], to + c);
}

// `to` is padded to whole vectors.
template <class T>
inline void widen(const T* from, float* to, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    const Floats v = c + kLanes <= n ? load(from + c) : load_first(from + c, n - c);
    std::memcpy(to + c, &v, sizeof v);
  }
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// out[i][j] = <x[i], m + j * stride> over n elements. Each dot product has one accumulator, so its value does not
// depend on NT and NR.
template <int NT, int NR, class X, class T>
void dots(const X* const* x, const T* m, int64_t stride, int64_t n, float* const* out) {
  Floats acc[NT][NR] = {};
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    Floats xs[NT];
    for (int i = 0; i < NT; ++i) xs[i] = load(x[i] + c);
    for (int j = 0; j < NR; ++j) {
      const Floats row = load(m + j * stride + c);
      for (int i = 0; i < NT; ++i) acc[i][j] += xs[i] * row;
    }
  }
  if (c < n) {
    for (int j = 0; j < NR; ++j) {
      const Floats row = load_first(m + j * stride + c, n - c);
      for (int i = 0; i < NT; ++i) acc[i][j] += load_first(x[i] + c, n - c) * row;
    }
  }
  for (int i = 0; i < NT; ++i)
    for (int j = 0; j < NR; ++j) out[i][j] = sum(acc[i][j]);
}

// y[i] += sum over j of factor[i * factor_stride + j] * m[j], over n elements (y is padded to whole vectors).
template <int NY, int NM, class T>
void add_rows(float* const* y, const T* const* m, const float* factor, int64_t factor_stride, int64_t n) {
  float f[NY][NM];
  for (int i = 0; i < NY; ++i)
    for (int j = 0; j < NM; ++j) f[i][j] = factor[i * factor_stride + j];
  for (int64_t c = 0; c < n; c += kLanes) {
    Floats rows[NM];
    for (int j = 0; j < NM; ++j) rows[j] = c + kLanes <= n ? load(m[j] + c) : load_first(m[j] + c, n - c);
    for (int i = 0; i < NY; ++i) {
      Floats acc = load(y[i] + c);
      for (int j = 0; j < NM; ++j) acc += f[i][j] * rows[j];
      std::memcpy(y[i] + c, &acc, sizeof acc);
    }
  }
}

// All rows of m, in blocks; the order of the sum over j is that of one row after another.
template <int NY, class T>
void add_all_rows(float* const* y, const T* const* m, const float* factor, int64_t factor_stride, int64_t rows,
                  int64_t n) {
  constexpr int kBlock = 8;
  int64_t j = 0;
  for (; j + kBlock <= rows; j += kBlock) add_rows<NY, kBlock>(y, m + j, factor + j, factor_stride, n);
  for (; j < rows; ++j) add_rows<NY, 1>(y, m + j, factor + j, factor_stride, n);
}

}  // namespace

extern "C" {

// Mirrored by kernels/cpu.py, field by field. A null result is not computed.
struct Mixture {
  const void *x, *A, *B, *base;  // [tokens, dim], [slices, rows, dim], [rows, width], [tokens, width] or null
  const int32_t* offsets;        // [experts + 1]: first row of each adapter
  const float* scales;           // [slices, experts]
  const int32_t* indices;        // [tokens, slots], -1 is none
  const float* weights;          // [tokens, slots]
  const int64_t* widths;         // [slices]
  float* h;                      // [slices, tokens, slots, max_rank]
  void* y;                       // [tokens, width]
  const void* dy;                // [tokens, width]
  void *dx, *dA, *dB;            // shaped like x, A, B
  float* dw;                     // [tokens, slots]
  // `dtype` is that of x, base, y and their gradients, `adapter_dtype` that of A and B (bfloat16 under float32: forward only)
  int64_t tokens, slots, experts, slices, rows, dim, width, max_rank, dtype, adapter_dtype, threads;
};
}

namespace {

struct Range {
  int64_t begin, end;
};

// A matrix per slice, of which only the columns `ranges[s]` count.
struct Matrices {
  int64_t slice_stride, row_stride;
  std::vector<Range> ranges;
};

struct Group {
  int32_t expert;
  int64_t begin, end;  // in `Pairs::order`
};

// Pairs (token * slots + slot) sorted by adapter, then by token; those without an adapter are left out.
struct Pairs {
  std::vector<int32_t> order;
  std::vector<Group> groups;

  explicit Pairs(const Mixture& m) {
    const int64_t count = m.tokens * m.slots;
    std::vector<int64_t> starts(m.experts + 1, 0);
    for (int64_t p = 0; p < count; ++p)
      if (m.indices[p] >= 0) ++starts[m.indices[p] + 1];
    for (int64_t e = 0; e < m.experts; ++e) {
      if (starts[e + 1] > 0) groups.push_back({static_cast<int32_t>(e), starts[e], starts[e] + starts[e + 1]});
      starts[e + 1] += starts[e];
    }
    order.resize(starts[m.experts]);
    for (int64_t p = 0; p < count; ++p)
      if (m.indices[p] >= 0) order[starts[m.indices[p]]++] = static_cast<int32_t>(p);
  }
};

int64_t rank_of(const Mixture& m, int32_t e) { return m.offsets[e + 1] - m.offsets[e]; }

float* hidden(const Mixture& m, float* h, int64_t s, int64_t pair) {
  return h + (s * m.tokens * m.slots + pair) * m.max_rank;
}

template <class X, class T>
void shrink_block(const Mixture& m, const X* x, int64_t x_stride, const T* rows, int64_t row_stride, Range range,
                  const int32_t* pairs, int64_t count, int64_t rank, int64_t s, float* h) {
  for (int64_t i = 0; i < count;) {
    const int64_t step = count - i >= 4 ? 4 : count - i >= 2 ? 2 : 1;
    const X* tokens[4];
    float* out[4];
    for (int64_t q = 0; q < step; ++q) {
      tokens[q] = x + (pairs[i + q] / m.slots) * x_stride + range.begin;
      out[q] = hidden(m, h, s, pairs[i + q]);
    }
    const int64_t block = step == 4 ? 4 : 8;
    for (int64_t j = 0; j < rank;) {
      const T* row = rows + j * row_stride + range.begin;
      const int64_t n = range.end - range.begin;
      const bool whole = rank - j >= block;
      if (step == 4 && whole) dots<4, 4>(tokens, row, row_stride, n, out);
      else if (step == 4) dots<4, 1>(tokens, row, row_stride, n, out);
      else if (step == 2 && whole) dots<2, 8>(tokens, row, row_stride, n, out);
      else if (step == 2) dots<2, 1>(tokens, row, row_stride, n, out);
      else if (whole) dots<1, 8>(tokens, row, row_stride, n, out);
      else dots<1, 1>(tokens, row, row_stride, n, out);
      const int64_t done = whole ? block : 1;
      for (int64_t q = 0; q < step; ++q) out[q] += done;
      j += done;
    }
    i += step;
  }
}

// Adapters lie apart in memory, and each is read once: the next is asked for while one is worked on.
template <class T>
inline void prefetch(const T* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t c = 0; c < n; c += kLine) __builtin_prefetch(from + c);
}

template <class X, class T>
void shrink(const Mixture& m, const Pairs& pairs, const X* x, int64_t x_stride, const T* M, const Matrices& layout,
            float* h) {
  constexpr int64_t kPairs = 32;
  struct Item {
    int64_t s;
    const Group* group;
    int64_t begin, end;
  };
  std::vector<Item> items;
  for (int64_t s = 0; s < m.slices; ++s)
    for (const Group& g : pairs.groups)
      for (int64_t i = g.begin; i < g.end; i += kPairs) items.push_back({s, &g, i, std::min(i + kPairs, g.end)});
  std::memset(h, 0, sizeof(float) * m.slices * m.tokens * m.slots * m.max_rank);
#pragma omp parallel for schedule(static) num_threads(m.threads) if (m.threads > 1)
  for (size_t n = 0; n < items.size(); ++n) {
    const Item& item = items[n];
    const int32_t e = item.group->expert;
    const T* rows = M + item.s * layout.slice_stride + m.offsets[e] * layout.row_stride;
    if (n + 1 < items.size()) {
      const Item& next = items[n + 1];
      const int64_t row = m.offsets[next.group->expert];
      const Range range = layout.ranges[next.s];
      for (int64_t j = 0; j < rank_of(m, next.group->expert); ++j)
        prefetch(M + next.s * layout.slice_stride + (row + j) * layout.row_stride + range.begin, range.end - range.begin);
    }
    shrink_block(m, x, x_stride, rows, layout.row_stride, layout.ranges[item.s], pairs.order.data() + item.begin,
                 item.end - item.begin, rank_of(m, e), item.s, h);
  }
}

// Kept from call to call: fresh memory of this size costs more in page faults than the sums in it.
float* zeroed_scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  scratch.assign(floats, 0.0f);
  return scratch.data();
}

// A block of the result: `tokens` or rows by columns, small enough for the cache and alone on its thread.
struct Block {
  int64_t slice;
  Range rows, columns;
};

int64_t column_step(int64_t rows, int64_t width, int64_t threads) {
  const int64_t fits = std::clamp(kScratchFloats / std::max<int64_t>(rows, 1), kMinColumns, kMaxColumns);
  const int64_t shared = (width + threads - 1) / threads;
  return std::max<int64_t>((std::min(fits, shared) + kLanes - 1) / kLanes * kLanes, kLanes);
}

std::vector<Block> blocks_of(int64_t slice, Range rows, int64_t row_step, Range columns, int64_t threads) {
  std::vector<Block> blocks;
  const int64_t step = column_step(std::min(row_step, rows.end - rows.begin), columns.end - columns.begin, threads);
  for (int64_t t = rows.begin; t < rows.end; t += row_step)
    for (int64_t c = columns.begin; c < columns.end; c += step)
      blocks.push_back({slice, {t, std::min(t + row_step, rows.end)}, {c, std::min(c + step, columns.end)}});
  return blocks;
}

// Adds what one adapter gives to the tokens of `pairs` (ascending) in one block, four tokens at a time. A token that
// stands twice in a group of four would lose one of its sums, so such a pair waits for the next group.
template <class T>
void expand_group(const Mixture& m, const Block& block, int32_t e, const int32_t* pairs, int64_t count, const float* h,
                  int64_t s, const T* const* rows, int64_t stride, float* acc) {
  const int64_t rank = rank_of(m, e);
  std::vector<float> factors(4 * rank);
  for (int64_t i = 0; i < count;) {
    int64_t step = count - i >= 4 ? 4 : count - i >= 2 ? 2 : 1;
    for (int64_t q = 1; q < step; ++q)
      if (pairs[i + q] / m.slots == pairs[i + q - 1] / m.slots) step = 1;
    float* y[4];
    for (int64_t q = 0; q < step; ++q) {
      const int64_t pair = pairs[i + q];
      y[q] = acc + (pair / m.slots - block.rows.begin) * stride;
      const float factor = m.weights[pair] * m.scales[s * m.experts + e];
      const float* from = hidden(m, const_cast<float*>(h), s, pair);
      for (int64_t j = 0; j < rank; ++j) factors[q * rank + j] = factor * from[j];
    }
    const int64_t n = block.columns.end - block.columns.begin;
    if (step == 4) add_all_rows<4>(y, rows, factors.data(), rank, rank, n);
    else if (step == 2) add_all_rows<2>(y, rows, factors.data(), rank, rank, n);
    else add_all_rows<1>(y, rows, factors.data(), rank, rank, n);
    i += step;
  }
}

// `sum_slices`: every slice adds to every block (the backward pass to x); else a block belongs to one slice.
template <class X, class T>
void expand(const Mixture& m, const Pairs& pairs, const float* h, const T* M, const Matrices& layout, bool sum_slices,
            const X* base, X* y, int64_t y_stride) {
  constexpr int64_t kTokens = 1024;
  std::vector<Block> blocks;
  for (int64_t s = 0; s < (sum_slices ? 1 : m.slices); ++s)
    for (const Block& b : blocks_of(s, {0, m.tokens}, kTokens, layout.ranges[s], m.threads)) blocks.push_back(b);
#pragma omp parallel for schedule(static) num_threads(m.threads) if (m.threads > 1)
  for (size_t n = 0; n < blocks.size(); ++n) {
    const Block& block = blocks[n];
    const int64_t tokens = block.rows.end - block.rows.begin, columns = block.columns.end - block.columns.begin;
    const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes;
    float* acc = zeroed_scratch(tokens * stride);
    for (int64_t t = 0; base != nullptr && t < tokens; ++t)
      widen(base + (block.rows.begin + t) * y_stride + block.columns.begin, acc + t * stride, columns);
    std::vector<const T*> rows;
    for (int64_t s = block.slice; s < (sum_slices ? m.slices : block.slice + 1); ++s)
      for (size_t i = 0; i < pairs.groups.size(); ++i) {
        const Group& g = pairs.groups[i];
        if (i + 1 < pairs.groups.size()) {
          const int32_t next = pairs.groups[i + 1].expert;
          for (int64_t j = 0; j < rank_of(m, next); ++j)
            prefetch(M + s * layout.slice_stride + (m.offsets[next] + j) * layout.row_stride + block.columns.begin, columns);
        }
        const int32_t *from = pairs.order.data() + g.begin, *to = pairs.order.data() + g.end;
        from = std::lower_bound(from, to, block.rows.begin * m.slots);
        to = std::lower_bound(from, to, block.rows.end * m.slots);
        if (from == to) continue;
        rows.resize(rank_of(m, g.expert));
        for (size_t j = 0; j < rows.size(); ++j)
          rows[j] = M + s * layout.slice_stride + (m.offsets[g.expert] + j) * layout.row_stride + block.columns.begin;
        expand_group(m, block, g.expert, from, to - from, h, s, rows.data(), stride, acc);
      }
    for (int64_t t = 0; t < tokens; ++t)
      store(acc + t * stride, y + (block.rows.begin + t) * y_stride + block.columns.begin, columns);
  }
}

// Rows of adapters that no token uses are set to zero. `h` carries no weight; `weights` and `scales` are applied here.
template <class T>
void outer(const Mixture& m, const Pairs& pairs, const float* h, const T* x, int64_t x_stride, T* dM,
           const Matrices& layout) {
  struct Item {
    const Group* group;
    Block block;
  };
  std::vector<Item> items;
  for (int64_t s = 0; s < m.slices; ++s)
    for (const Group& g : pairs.groups)
      for (const Block& b : blocks_of(s, {0, rank_of(m, g.expert)}, 64, layout.ranges[s], m.threads))
        items.push_back({&g, b});
#pragma omp parallel for schedule(static) num_threads(m.threads) if (m.threads > 1)
  for (size_t n = 0; n < items.size(); ++n) {
    const auto& [group, block] = items[n];
    const int64_t ranks = block.rows.end - block.rows.begin, columns = block.columns.end - block.columns.begin;
    const int64_t stride = (columns + kLanes - 1) / kLanes * kLanes, count = group->end - group->begin;
    float* acc = zeroed_scratch(ranks * stride);
    std::vector<float> factors(ranks * count);
    std::vector<const T*> rows(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t pair = pairs.order[group->begin + i];
      const float factor = m.weights[pair] * m.scales[block.slice * m.experts + group->expert];
      const float* from = hidden(m, const_cast<float*>(h), block.slice, pair) + block.rows.begin;
      for (int64_t j = 0; j < ranks; ++j) factors[j * count + i] = factor * from[j];
      rows[i] = x + (pair / m.slots) * x_stride + block.columns.begin;
    }
    for (int64_t j = 0; j < ranks;) {
      float* y[4];
      const int64_t step = ranks - j >= 4 ? 4 : 1;
      for (int64_t q = 0; q < step; ++q) y[q] = acc + (j + q) * stride;
      if (step == 4) add_all_rows<4>(y, rows.data(), factors.data() + j * count, count, count, columns);
      else add_all_rows<1>(y, rows.data(), factors.data() + j * count, count, count, columns);
      j += step;
    }
    const int64_t row = m.offsets[group->expert] + block.rows.begin;
    for (int64_t j = 0; j < ranks; ++j)
      store(acc + j * stride,
            dM + block.slice * layout.slice_stride + (row + j) * layout.row_stride + block.columns.begin, columns);
  }
}

// dw = scale * <h, B^T dy>, summed over slices
void weight_gradient(const Mixture& m, const float* g) {
  const int64_t count = m.tokens * m.slots;
  for (int64_t p = 0; p < count; ++p) {
    float total = 0;
    for (int64_t s = 0; s < m.slices && m.indices[p] >= 0; ++s) {
      const float *left = hidden(m, m.h, s, p), *right = hidden(m, const_cast<float*>(g), s, p);
      float product = 0;
      for (int64_t j = 0; j < m.max_rank; ++j) product += left[j] * right[j];
      total += m.scales[s * m.experts + m.indices[p]] * product;
    }
    m.dw[p] = total;
  }
}

Matrices down(const Mixture& m) {
  return {m.rows * m.dim, m.dim, std::vector<Range>(m.slices, Range{0, m.dim})};
}

Matrices up(const Mixture& m) {
  Matrices layout{0, m.width, {}};
  for (int64_t s = 0, begin = 0; s < m.slices; begin += m.widths[s++])
    layout.ranges.push_back({begin, begin + m.widths[s]});
  return layout;
}

bool acceptable(const Mixture& m) {
  for (int64_t p = 0; p < m.tokens * m.slots; ++p)
    if (m.indices[p] < -1 || m.indices[p] >= m.experts || !std::isfinite(m.weights[p])) return false;
  return true;
}

template <class X, class T>
void forward(const Mixture& m) {
  const Pairs pairs(m);
  shrink(m, pairs, static_cast<const X*>(m.x), m.dim, static_cast<const T*>(m.A), down(m), m.h);
  expand(m, pairs, m.h, static_cast<const T*>(m.B), up(m), false, static_cast<const X*>(m.base),
         static_cast<X*>(m.y), m.width);
}

template <class T>
void backward(const Mixture& m) {
  const Pairs pairs(m);
  const T *x = static_cast<const T*>(m.x), *dy = static_cast<const T*>(m.dy);
  if (m.dB != nullptr) {
    std::memset(m.dB, 0, sizeof(T) * m.rows * m.width);
    outer(m, pairs, m.h, dy, m.width, static_cast<T*>(m.dB), up(m));
  }
  if (m.dx == nullptr && m.dA == nullptr && m.dw == nullptr) return;
  std::vector<float> g(m.slices * m.tokens * m.slots * m.max_rank);
  shrink(m, pairs, dy, m.width, static_cast<const T*>(m.B), up(m), g.data());
  if (m.dw != nullptr) weight_gradient(m, g.data());
  if (m.dx != nullptr)
    expand(m, pairs, g.data(), static_cast<const T*>(m.A), down(m), true, static_cast<const T*>(nullptr),
           static_cast<T*>(m.dx), m.dim);
  if (m.dA != nullptr) {
    std::memset(m.dA, 0, sizeof(T) * m.slices * m.rows * m.dim);
    outer(m, pairs, g.data(), x, m.dim, static_cast<T*>(m.dA), down(m));
  }
}

}  // namespace

extern "C" {

// Both return 1, and do nothing, where an index is out of range or a weight not finite.
int mixed_forward(const Mixture* m) {
  if (!acceptable(*m)) return 1;
  if (m->dtype == 0 && m->adapter_dtype == 1) forward<float, BFloat16>(*m);
  else if (m->dtype == 0) forward<float, float>(*m);
  else if (m->dtype == 1) forward<BFloat16, BFloat16>(*m);
  else forward<Float16, Float16>(*m);
  return 0;
}

int mixed_backward(const Mixture* m) {
  if (!acceptable(*m)) return 1;
  if (m->dtype == 0) backward<float>(*m);
  else if (m->dtype == 1) backward<BFloat16>(*m);
  else backward<Float16>(*m);
  return 0;
}
}

#include "cpu_attention.cpp"
