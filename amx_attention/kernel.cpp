// Causal attention on Intel's AMX matrix units, forward and backward, bf16 in and out.
//
// All products are written so that keys are rows and queries are columns: of S^T = K Q^T a vector
// register then holds 16 queries, whose maxima, sums and offsets are its lanes, and P^T leaves the
// registers as the operand that the next products read. With c = 1/sqrt(D), P = exp(c S - L) and L
// the log-sum-exp of each query, block by block (arXiv 2205.14135, 2307.08691):
//
//   forward    O^T += V^T P^T
//   backward   dV += P^T dO    dS = c P * (dO V^T - rowsum(dO * O))    dK += dS^T Q
//              dQ^T += K^T dS^T
//
// A row holds one segment or many, documents that do not see each other. A segment's head of keys,
// with the queries that share it, is one thread's work, in one order and in blocks that begin with
// the segment: a call gives the same bits each time, and a document alone the same as among others.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

namespace {

using bf16 = uint16_t;
using pair = uint32_t;     // two bf16, which AMX multiplies with two neighbours of a row
constexpr int BLOCK = 64;  // queries, and keys, of a block
const float LOG2E = 1.44269504f, LN2 = 0.69314718f, LOWEST = -1e30f;

template <class T>
struct Rows {  // of a head, (T, D); or single numbers, (T)
  T* data;
  int64_t stride;
  T* operator[](int t) const { return data + t * stride; }
};

struct Segment {  // tokens of a row that see each other
  int row, start, length;
};

template <class T>
struct Tensor {  // (B, H, T, D) or (B, H, T), with these strides; that of D is 1
  T* data;
  const int64_t* strides;
  Rows<T> head(Segment part, int h) const {
    T* row = data + part.row * strides[0] + h * strides[1];
    return {row + part.start * strides[2], strides[2]};
  }
};

struct Shape {
  int T, D, padded;  // queries, width, and T in whole blocks
  Shape(int T, int D) : T(T), D(D), padded((T + BLOCK - 1) / BLOCK * BLOCK) {}
  int64_t size() const { return int64_t(padded) * D; }
};

class Scratch {  // a thread's memory, which it keeps from call to call
  char* next;

 public:
  explicit Scratch(int64_t bytes) {
    static thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes) memory.resize(bytes);
    next = memory.data();
  }
  template <class T>
  T* take(int64_t count) {
    char* start = (char*)((uintptr_t(next) + 63) / 64 * 64);
    next = start + count * sizeof(T);
    return (T*)start;
  }
};

// ===================================== OPERANDS =====================================

const __m512i LANES = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);

void store(bf16* out, __m512 x) {
  _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x));
}

// x (T, D) with rows of zeros up to whole blocks.
void copy_rows(Rows<bf16> x, Shape n, bf16* out) {
  for (int t = 0; t < n.T; t++) memcpy(out + int64_t(t) * n.D, x[t], 2 * n.D);
  memset(out + int64_t(n.T) * n.D, 0, 2 * (n.size() - int64_t(n.T) * n.D));
}

// x (padded, D) as pairs of rows, (padded / 2, D).
void pair_rows(const bf16* x, Shape n, pair* out) {
  for (int t = 0; t < n.padded; t += 2, x += 2 * n.D, out += n.D)
    for (int d = 0; d < n.D; d++) out[d] = x[d] | pair(x[n.D + d]) << 16;
}

// x (padded, D) as pairs of columns, transposed, (D / 2, padded).
void pair_columns(const bf16* x, Shape n, pair* out) {
  const __m512i index = _mm512_mullo_epi32(LANES, _mm512_set1_epi32(n.D / 2));
  for (int t = 0; t < n.padded; t += 16, x += 16 * n.D)
    for (int d = 0; d < n.D; d += 2)
      _mm512_storeu_si512(out + int64_t(d / 2) * n.padded + t,
                          _mm512_i32gather_epi32(index, x + d, 4));
}

// x (padded, D) transposed, (D, padded).
void transpose(const bf16* x, Shape n, bf16* out) {
  const __m512i index = _mm512_mullo_epi32(LANES, _mm512_set1_epi32(n.D / 2));
  for (int t = 0; t < n.padded; t += 16, x += 16 * n.D)
    for (int d = 0; d < n.D; d += 2) {
      const __m512i two = _mm512_i32gather_epi32(index, x + d, 4);
      __m256i* at = (__m256i*)(out + int64_t(d) * n.padded + t);
      _mm256_storeu_si256(at, _mm512_cvtepi32_epi16(two));
      at = (__m256i*)(out + int64_t(d + 1) * n.padded + t);
      _mm256_storeu_si256(at, _mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16)));
    }
}

// out (T, D) = the transpose of x (D, columns), each row times its factor.
void write_transposed(const float* x, int columns, const float* factors, int T, int D,
                      Rows<bf16> out) {
  const __m512i index = _mm512_mullo_epi32(LANES, _mm512_set1_epi32(columns));
  for (int t = 0; t < T; t++)
    for (int d = 0; d < D; d += 16) {
      const __m512 y = _mm512_i32gather_ps(index, x + int64_t(d) * columns + t, 4);
      store(out[t] + d, factors ? _mm512_mul_ps(y, _mm512_set1_ps(factors[t])) : y);
    }
}

// out (T, D) = x (T, D).
void write_rows(const float* x, Shape n, Rows<bf16> out) {
  for (int t = 0; t < n.T; t++)
    for (int d = 0; d < n.D; d += 16) store(out[t] + d, _mm512_loadu_ps(x + int64_t(t) * n.D + d));
}

// ===================================== PRODUCTS =====================================

struct Tiles {  // all eight tiles of this thread, while this exists: 16 rows of 64 bytes
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// c (rows, columns) = a (rows, depth) b (depth, columns), or c + that; b is in pairs of rows. The
// sizes are multiples of 32, the leading dimensions in elements.
template <bool ADD>
inline void product(float* c, int64_t ldc, const bf16* a, int64_t lda, const pair* b, int64_t ldb,
                    int rows, int columns, int depth) {
  for (int i = 0; i < rows; i += 32)
    for (int j = 0; j < columns; j += 32) {
      float *top = c + i * ldc + j, *low = top + 16 * ldc;
      if (ADD) {
        _tile_loadd(0, top, 4 * ldc);
        _tile_loadd(1, top + 16, 4 * ldc);
        _tile_loadd(2, low, 4 * ldc);
        _tile_loadd(3, low + 16, 4 * ldc);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int k = 0; k < depth; k += 32) {
        _tile_loadd(4, a + i * lda + k, 2 * lda);
        _tile_loadd(5, a + (i + 16) * lda + k, 2 * lda);
        _tile_loadd(6, b + k / 2 * ldb + j, 4 * ldb);
        _tile_loadd(7, b + k / 2 * ldb + j + 16, 4 * ldb);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, top, 4 * ldc);
      _tile_stored(1, top + 16, 4 * ldc);
      _tile_stored(2, low, 4 * ldc);
      _tile_stored(3, low + 16, 4 * ldc);
    }
}

// 2^x to 3e-6 of it: 2^n times a minimax polynomial in f = x - n, |f| <= 1/2.
inline __m512 exp2_ps(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 y = _mm512_set1_ps(0.0095701f);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05591786f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24024745f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.69312181f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.99999926f));
  return _mm512_scalef_ps(y, n);
}

// Halves of a register in turn: of 32 bf16, numbers 0, 16, 1, 17, ...
const __m512i WEAVE = _mm512_or_si512(
    LANES, _mm512_slli_epi32(_mm512_add_epi32(LANES, _mm512_set1_epi32(16)), 16));

// Two rows of 16 as 16 pairs.
inline void store_pairs(pair* out, __m512 first, __m512 second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(WEAVE, both));
}

// Which of the queries m to m + 15 see key n.
inline __mmask16 sees(int m, int n) {
  return _mm512_cmpge_epi32_mask(LANES, _mm512_set1_epi32(n - m));
}

// ===================================== FORWARD =====================================

// For 16 queries, from the scores s (BLOCK, BLOCK) of a block of keys: P^T relative to the largest
// score so far, as pairs; `top` (in units of 1/c), `sum` and o (D, BLOCK) follow the largest. The
// first query is number `first` of the keys' block, where that hides keys from it.
template <bool HIDE>
inline void block_softmax(float* s, int first, float c, float* top, float* sum, float* o, int D,
                          pair* p) {
  const __m512 before = _mm512_loadu_ps(top), factor = _mm512_set1_ps(c);
  __m512 most = before;
  for (int r = 0; r < BLOCK; r++) {
    __m512 x = _mm512_loadu_ps(s + r * BLOCK);
    if (HIDE) {
      x = _mm512_mask_blend_ps(sees(first, r), _mm512_set1_ps(LOWEST), x);
      _mm512_storeu_ps(s + r * BLOCK, x);
    }
    most = _mm512_max_ps(most, x);
  }
  const __m512 offset = _mm512_mul_ps(most, factor);
  const __m512 shrink = exp2_ps(_mm512_fmsub_ps(before, factor, offset));
  __m512 total = _mm512_mul_ps(_mm512_loadu_ps(sum), shrink);
  for (int r = 0; r < BLOCK; r += 2) {
    const float* at = s + r * BLOCK;
    const __m512 a = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(at), factor, offset));
    const __m512 b = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(at + BLOCK), factor, offset));
    total = _mm512_add_ps(total, _mm512_add_ps(a, b));
    store_pairs(p + r / 2 * BLOCK, a, b);
  }
  if (_mm512_cmpneq_ps_mask(before, most))
    for (int d = 0; d < D; d++, o += BLOCK)
      _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), shrink));
  _mm512_storeu_ps(top, most);
  _mm512_storeu_ps(sum, total);
}

// O (T, D) and L (T) of a head of queries, given K (padded, D) and V^T (D, padded).
void forward_queries(Rows<bf16> q, const bf16* k, const bf16* v_t, Rows<bf16> out, Rows<float> lse,
                     Shape n, Scratch memory) {
  const float c = LOG2E / sqrtf(n.D);
  bf16* rows = memory.take<bf16>(n.size());
  pair *columns = memory.take<pair>(n.size() / 2), *p = memory.take<pair>(BLOCK * BLOCK / 2);
  float *s = memory.take<float>(BLOCK * BLOCK), *o = memory.take<float>(BLOCK * n.D);
  copy_rows(q, n, rows);
  pair_columns(rows, n, columns);
  for (int m = 0; m < n.padded; m += BLOCK) {
    float top[BLOCK], sum[BLOCK] = {};
    for (float& x : top) x = LOWEST;
    memset(o, 0, 4 * BLOCK * n.D);
    for (int key = 0; key <= m; key += BLOCK) {
      product<false>(s, BLOCK, k + int64_t(key) * n.D, n.D, columns + m, n.padded, BLOCK, BLOCK,
                     n.D);
      for (int i = 0; i < BLOCK; i += 16)
        (key == m ? block_softmax<true> : block_softmax<false>)(s + i, i, c, top + i, sum + i,
                                                                o + i, n.D, p + i);
      product<true>(o, BLOCK, v_t + key, n.padded, p, BLOCK, n.D, BLOCK, BLOCK);
    }
    const int count = n.T - m < BLOCK ? n.T - m : BLOCK;
    for (int t = 0; t < count; t++) {
      *lse[m + t] = top[t] * c * LN2 + logf(sum[t]);
      sum[t] = 1 / sum[t];
    }
    write_transposed(o, BLOCK, sum, count, n.D, {out[m], out.stride});
  }
}

// ===================================== BACKWARD =====================================

// P^T and dS^T of a block, from S^T and dP^T (BLOCK, BLOCK): as rows, and dS^T as pairs of rows too.
template <bool HIDE>
inline void block_gradients(const float* s, const float* dp, const float* lse, const float* delta,
                            float scale, bf16* p, bf16* ds, pair* ds_pairs) {
  const __m512 c = _mm512_set1_ps(scale * LOG2E), factor = _mm512_set1_ps(scale);
  for (int i = 0; i < BLOCK; i += 16) {
    const __m512 offset = _mm512_loadu_ps(lse + i), shift = _mm512_loadu_ps(delta + i);
    for (int r = 0; r < BLOCK; r += 2) {
      __m512 g[2];
      for (int j = 0; j < 2; j++) {
        const int at = (r + j) * BLOCK + i;
        __m512 x = exp2_ps(_mm512_fmsub_ps(_mm512_loadu_ps(s + at), c, offset));
        if (HIDE) x = _mm512_maskz_mov_ps(sees(i, r + j), x);
        const __m512 centred = _mm512_fmsub_ps(_mm512_loadu_ps(dp + at), factor, shift);
        g[j] = _mm512_mul_ps(x, centred);
        store(p + at, x);
        store(ds + at, g[j]);
      }
      store_pairs(ds_pairs + r / 2 * BLOCK + i, g[0], g[1]);
    }
  }
}

// The sum of a * b over D.
float dot(const bf16* a, const bf16* b, int D) {
  __m512 sum = _mm512_setzero_ps();
  for (int d = 0; d < D; d += 32)
    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + d),
                           (__m512bh)_mm512_loadu_si512(b + d));
  return _mm512_reduce_add_ps(sum);
}

struct Keys {  // K, V (padded, D) and K^T (D, padded) of a head, and the sums that become dK and dV
  bf16 *k, *v, *k_t;
  float *dk, *dv;
};

// dQ of a head of queries, whose parts of dK and dV are added to those of its keys.
void backward_queries(Rows<bf16> dout, Rows<bf16> q, Rows<bf16> out, Rows<float> lse, Rows<bf16> dq,
                      const Keys& keys, Shape n, Scratch memory) {
  const float scale = 1 / sqrtf(n.D);
  bf16 *rows = memory.take<bf16>(n.size()), *p = memory.take<bf16>(BLOCK * BLOCK);
  bf16* ds = memory.take<bf16>(BLOCK * BLOCK);
  pair *q_rows = memory.take<pair>(n.size() / 2), *q_columns = memory.take<pair>(n.size() / 2);
  pair *g_rows = memory.take<pair>(n.size() / 2), *g_columns = memory.take<pair>(n.size() / 2);
  pair* ds_pairs = memory.take<pair>(BLOCK * BLOCK / 2);
  float *s = memory.take<float>(BLOCK * BLOCK), *dp = memory.take<float>(BLOCK * BLOCK);
  float *offset = memory.take<float>(n.padded), *shift = memory.take<float>(n.padded);
  float* dq_t = memory.take<float>(n.size());
  copy_rows(q, n, rows);
  pair_rows(rows, n, q_rows);
  pair_columns(rows, n, q_columns);
  copy_rows(dout, n, rows);
  pair_rows(rows, n, g_rows);
  pair_columns(rows, n, g_columns);
  for (int t = 0; t < n.padded; t++) {  // no query beyond the end has a weight for any key
    offset[t] = t < n.T ? *lse[t] * LOG2E : -LOWEST;
    shift[t] = t < n.T ? scale * dot(dout[t], out[t], n.D) : 0;
  }
  memset(dq_t, 0, 4 * n.size());
  for (int key = 0; key < n.padded; key += BLOCK) {
    const int64_t at = int64_t(key) * n.D;
    for (int m = key; m < n.padded; m += BLOCK) {
      product<false>(s, BLOCK, keys.k + at, n.D, q_columns + m, n.padded, BLOCK, BLOCK, n.D);
      product<false>(dp, BLOCK, keys.v + at, n.D, g_columns + m, n.padded, BLOCK, BLOCK, n.D);
      (key == m ? block_gradients<true> : block_gradients<false>)(s, dp, offset + m, shift + m,
                                                                  scale, p, ds, ds_pairs);
      const int64_t row = int64_t(m / 2) * n.D;
      product<true>(keys.dv + at, n.D, p, BLOCK, g_rows + row, n.D, BLOCK, n.D, BLOCK);
      product<true>(keys.dk + at, n.D, ds, BLOCK, q_rows + row, n.D, BLOCK, n.D, BLOCK);
      product<true>(dq_t + m, n.padded, keys.k_t + key, n.padded, ds_pairs, BLOCK, n.D, BLOCK,
                    BLOCK);
    }
  }
  write_transposed(dq_t, n.padded, nullptr, n.T, n.D, dq);
}

// ===================================== THREADS =====================================

struct Work {
  Segment part;
  int head;  // of keys
};

// The work for all heads and segments, the longest first: what is left for the end is short. Of
// segments as long as each other, the heads come in turn: side by side, threads would write to the
// same lines of memory.
std::vector<Work> divide(const int64_t* starts, int segments, int T, int G) {
  std::vector<Work> all;
  for (int g = 0; g < G; g++)
    for (int i = 0; i < segments; i++) {
      const int length = starts[i + 1] - starts[i];
      if (length) all.push_back({{int(starts[i] / T), int(starts[i] % T), length}, g});
    }
  std::stable_sort(all.begin(), all.end(), [](const Work& a, const Work& b) {
    return a.part.length > b.part.length;
  });
  return all;
}

// Let the threads do(part, g) all of it, with tiles of their own.
template <class Do>
void each(const std::vector<Work>& all, Do work) {
#pragma omp parallel
  {
    Tiles tiles;
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < all.size(); i++) work(all[i].part, all[i].head);
  }
}

}  // namespace

// ===================================== CALLED FROM PYTHON =====================================
// q, out and their gradients are (B, H, T, D), k, v and theirs (B, G, T, D) with H a multiple of G,
// lse is float (B, H, T). strides holds three of each, in the order of the arguments. D is a
// multiple of 32. Segment i is tokens starts[i] to starts[i + 1] - 1 of all B T, in one row.

// Ask Linux for the tiles, which a process does not have by itself; 0 if it grants them.
extern "C" int amx_permission() { return syscall(SYS_arch_prctl, 0x1023, 18); }

extern "C" void amx_attention_forward(bf16* q, bf16* k, bf16* v, bf16* out, float* lse,
                                      const int64_t* strides, const int64_t* starts, int segments,
                                      int H, int G, int T, int D) {
  const Tensor<bf16> tq{q, strides}, tk{k, strides + 3}, tv{v, strides + 6}, to{out, strides + 9};
  const Tensor<float> tl{lse, strides + 12};
  each(divide(starts, segments, T, G), [&](Segment part, int g) {
    const Shape n(part.length, D);
    Scratch memory(10 * n.size() + 6 * BLOCK * BLOCK + 4 * BLOCK * D + 1024);
    bf16 *keys = memory.take<bf16>(n.size()), *rows = memory.take<bf16>(n.size());
    bf16* values = memory.take<bf16>(n.size());
    copy_rows(tk.head(part, g), n, keys);
    copy_rows(tv.head(part, g), n, rows);
    transpose(rows, n, values);
    for (int h = g * H / G; h < (g + 1) * H / G; h++)
      forward_queries(tq.head(part, h), keys, values, to.head(part, h), tl.head(part, h), n,
                      memory);
  });
}

extern "C" void amx_attention_backward(bf16* dout, bf16* q, bf16* k, bf16* v, bf16* out, float* lse,
                                       bf16* dq, bf16* dk, bf16* dv, const int64_t* strides,
                                       const int64_t* starts, int segments, int H, int G, int T,
                                       int D) {
  const Tensor<bf16> tg{dout, strides}, tq{q, strides + 3}, tk{k, strides + 6}, tv{v, strides + 9};
  const Tensor<bf16> to{out, strides + 12}, tdq{dq, strides + 18}, tdk{dk, strides + 21};
  const Tensor<bf16> tdv{dv, strides + 24};
  const Tensor<float> tl{lse, strides + 15};
  each(divide(starts, segments, T, G), [&](Segment part, int g) {
    const Shape n(part.length, D);
    Scratch memory(28 * n.size() + 8 * n.padded + 14 * BLOCK * BLOCK + 2048);
    Keys keys{memory.take<bf16>(n.size()), memory.take<bf16>(n.size()),
              memory.take<bf16>(n.size()), memory.take<float>(n.size()),
              memory.take<float>(n.size())};
    copy_rows(tk.head(part, g), n, keys.k);
    copy_rows(tv.head(part, g), n, keys.v);
    transpose(keys.k, n, keys.k_t);
    memset(keys.dk, 0, 4 * n.size());
    memset(keys.dv, 0, 4 * n.size());
    for (int h = g * H / G; h < (g + 1) * H / G; h++)
      backward_queries(tg.head(part, h), tq.head(part, h), to.head(part, h), tl.head(part, h),
                       tdq.head(part, h), keys, n, memory);
    write_rows(keys.dk, n, tdk.head(part, g));
    write_rows(keys.dv, n, tdv.head(part, g));
  });
}
