// Bodies of ops for x86 CPUs, called by XLA through its foreign function interface.
//
// Every row's result has the same bits in any row, beside any others and on any number of threads: each of its elements is
// computed from the row alone, by the same instructions in the same order.  So no kernel sums a part of a row on its own.
//
// The file includes itself once for each width of vectors.
#ifndef WIDTH

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Any = ffi::AnyBuffer;
using Index = ffi::Buffer<ffi::S32>;
using Half = uint16_t;  // bfloat16
namespace {

constexpr int64_t BLOCK = 32;           // output features of a block of packed weights; op.py's
constexpr int64_t FEATURES = 4;         // input features that the gradient computes at a time
constexpr int64_t SMALL = 1 << 15;      // bytes of weights that no second thread is woken for
constexpr int64_t FEW = 1 << 13;        // multiplications of attention, likewise
constexpr int64_t QUERIES = 16;         // tokens of a lane that are a thread's task in attention
constexpr int64_t MAX_HEAD = 256;       // features of a head
constexpr int64_t TOGETHER = 8;         // tokens of one slot that share a read of its rows

enum Isa { NONE, AVX2, AVX512, AVX512_BF16, AMX };
Isa isa = NONE;  // what runs; set once, when the library is loaded

// y[M, N] = x[M, K] @ w.  w is packed, [N / BLOCK, K / P, BLOCK, P]: P is 1 of float32, 2 of bfloat16, 4 of int8, which has a
// scale for each output feature.  Where a processor multiplies 8 bits, a row of x is digit[0] * 128 + digit[1] times the row's own
// scale, and sums are whole numbers.
struct Product {
  const void* x;           // bfloat16 where products are, else float32
  const char* w;
  void* y;
  int64_t M, K, N;         // K as w is padded
  int64_t size;            // bytes of a weight
  bool wide;               // y is float32, else bfloat16
  const float* scale;      // [N / BLOCK, BLOCK]
  const int8_t* digit[2];  // [M, K]
  const float* row_scale;  // [M]
};

// Attention of one run of a lane's tokens with one kv head, over the lane's pages.
struct Attention {
  const void *q, *k, *v;  // q [G, J, N, H]; k and v of the layer, [P, Z, F]
  const int32_t *page, *position;
  void* out;
  int64_t J, N, M, H, Z, F, C, window;  // window: 0 is none
};

// LoRA of one target and layer: y[t] = (scale[s] * (a[s] @ x[t])) @ b[s], s the slot of token t.
struct Lora {
  const void *x, *a, *b;  // x [T, X], a [S, R, X], b [S, R, Y]
  const float* scale;     // [S]
  void* y;
  int64_t R, X, Y;
  bool wide;  // a and b are float32
};

inline float widened(Half bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline Half narrowed(float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return Half(bits >> 16 | 0x40);
  return Half((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float read(const float* x) { return *x; }
inline float read(const Half* x) { return widened(*x); }
inline void write(float* y, float value) { *y = value; }
inline void write(Half* y, float value) { *y = narrowed(value); }

// Runs items [0, count) on this thread and on those of the pool that come, `chunk` at a time.  This thread waits only for what
// another has begun, never for one that is busy elsewhere.
struct Shared {
  std::function<void(int64_t, int64_t)> run;
  int64_t count, chunk;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    for (int64_t first; (first = next.fetch_add(chunk)) < count;) {
      const int64_t last = std::min(first + chunk, count);
      run(first, last);
      done.fetch_add(last - first, std::memory_order_release);
    }
  }
};

void divided(ffi::ThreadPool& pool, int64_t count, bool few, std::function<void(int64_t, int64_t)> run) {
  const int64_t threads = few ? 1 : std::min(count, pool.num_threads());
  if (threads <= 1) return run(0, count);
  auto shared = std::make_shared<Shared>();
  shared->run = std::move(run);
  shared->count = count;
  shared->chunk = std::max<int64_t>(1, count / (4 * threads));
  for (int64_t i = 1; i < threads; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins)
    spins < 1000 ? _mm_pause() : std::this_thread::yield();
}

// Calls `run` with a value of the type of bfloat16 or float32.
template <typename F>
void typed(bool half, F run) { half ? run(Half()) : run(float()); }
inline bool is_half(const Any& x) { return x.element_type() == ffi::BF16; }

}  // namespace

#define WIDTH 8
#define ROWS 2
#define AT avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "kernels.cc"
#undef WIDTH
#undef ROWS
#undef AT
#undef TARGET
#define WIDTH 16
#define ROWS 8
#define AT avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")))
#include "kernels.cc"
#undef TARGET

#define WIDEST(fits, ...) (isa >= AVX512 && (fits) ? avx512::__VA_ARGS__ : avx2::__VA_ARGS__)
namespace {

// ---- bfloat16 with AVX512-BF16: two k at a time -----------------------------------------------------------------------

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,fma")))

TARGET inline void store(const Product& p, int64_t row, int64_t block, __m512 low, __m512 high) {
  const int64_t at = row * p.N + block * BLOCK, left = p.N - block * BLOCK;
  const __mmask32 some = left >= BLOCK ? 0xffffffffu : (1u << left) - 1;
  if (p.wide) {
    auto* y = static_cast<float*>(p.y) + at;
    _mm512_mask_storeu_ps(y, __mmask16(some), low);
    _mm512_mask_storeu_ps(y + 16, __mmask16(some >> 16), high);
  } else {
    _mm512_mask_storeu_epi16(static_cast<Half*>(p.y) + at, some, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <int COUNT>
TARGET void pair_rows(const Product& p, int64_t row, int64_t block) {
  const auto* x = static_cast<const Half*>(p.x) + row * p.K;
  const auto* w = reinterpret_cast<const Half*>(p.w) + block * BLOCK * p.K;
  __m512 sum[COUNT][2];
  for (auto& of : sum) of[0] = of[1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < p.K; k += 2, w += 2 * BLOCK) {
    const auto low = (__m512bh)_mm512_loadu_si512(w), high = (__m512bh)_mm512_loadu_si512(w + BLOCK);
    for (int i = 0; i < COUNT; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * p.K + k, 4);
      const auto both = (__m512bh)_mm512_set1_epi32(pair);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], both, low);
      sum[i][1] = _mm512_dpbf16_ps(sum[i][1], both, high);
    }
  }
  for (int i = 0; i < COUNT; ++i) store(p, row + i, block, sum[i][0], sum[i][1]);
}

TARGET void pair_block(const Product& p, int64_t block) {
  int64_t row = 0;
  for (; row + 8 <= p.M; row += 8) pair_rows<8>(p, row, block);
  for (; row + 4 <= p.M; row += 4) pair_rows<4>(p, row, block);
  for (; row < p.M; ++row) pair_rows<1>(p, row, block);
}

// 8 bits, four k at a time.  The instruction wants digits without a sign: 128 are added, and what they add is taken off.
template <int COUNT>
TARGET void quad_rows(const Product& p, int64_t row, int64_t block) {
  const auto* w = reinterpret_cast<const int8_t*>(p.w) + block * BLOCK * p.K;
  const __m512i more = _mm512_set1_epi8(char(128));
  __m512i sum[COUNT][2][2], added[2] = {};
  for (auto& of : sum) of[0][0] = of[0][1] = of[1][0] = of[1][1] = _mm512_setzero_si512();
  for (int64_t k = 0; k < p.K; k += 4, w += 4 * BLOCK)
    for (int part = 0; part < 2; ++part) {
      const __m512i some = _mm512_loadu_si512(w + 64 * part);
      added[part] = _mm512_dpbusd_epi32(added[part], more, some);
      for (int i = 0; i < COUNT; ++i)
        for (int d = 0; d < 2; ++d) {
          int32_t quad;
          std::memcpy(&quad, p.digit[d] + (row + i) * p.K + k, 4);
          sum[i][d][part] = _mm512_dpbusd_epi32(sum[i][d][part], _mm512_set1_epi32(quad ^ int32_t(0x80808080)), some);
        }
    }
  for (int i = 0; i < COUNT; ++i) {
    alignas(64) int32_t whole[2][BLOCK];
    for (int d = 0; d < 2; ++d)
      for (int part = 0; part < 2; ++part) _mm512_store_si512(whole[d] + 16 * part, _mm512_sub_epi32(sum[i][d][part], added[part]));
    avx512::store_whole(p, row + i, block, whole[0], whole[1]);
  }
}

TARGET void quad_block(const Product& p, int64_t block) {
  int64_t row = 0;
  for (; row + 4 <= p.M; row += 4) quad_rows<4>(p, row, block);
  for (; row < p.M; ++row) quad_rows<1>(p, row, block);
}

#undef TARGET

// ---- bfloat16 with AMX: tiles of 16 rows by 16 features, 32 k at a time -----------------------------------------------

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,amx-int8,fma")))

struct alignas(64) Tiles {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

TARGET void configure(int64_t some, int64_t others) {  // 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights
  Tiles tiles;
  const auto first = uint8_t(some), second = uint8_t(others);
  for (int t : {0, 1, 4}) tiles.rows[t] = first;
  for (int t : {2, 3, 5}) tiles.rows[t] = second;
  tiles.rows[6] = tiles.rows[7] = 16;
  _tile_loadconfig(&tiles);
}

TARGET inline void no_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <typename T>
TARGET inline void store_sums(T* to) {  // [32, BLOCK]
  _tile_stored(0, to, 4 * BLOCK);
  _tile_stored(1, to + 16, 4 * BLOCK);
  _tile_stored(2, to + 16 * BLOCK, 4 * BLOCK);
  _tile_stored(3, to + 16 * BLOCK + 16, 4 * BLOCK);
}

// Fetches what is read three tiles later: the processor does not see what a tile's load will want.
TARGET inline void ahead(const char* w) {
  for (int line = 0; line < 32; ++line) _mm_prefetch(w + 6 * 32 * BLOCK + 64 * line, _MM_HINT_T0);
}

TARGET void tiled_blocks(const Product& p, int64_t first, int64_t last) {
  alignas(64) float sum[32][BLOCK];
  for (int64_t row = 0; row < p.M; row += 32) {
    const int64_t rows = std::min<int64_t>(32, p.M - row);
    const auto* x = static_cast<const Half*>(p.x) + row * p.K;
    configure(std::min<int64_t>(rows, 16), std::max<int64_t>(rows - 16, 1));
    for (int64_t block = first; block < last; ++block) {
      const auto* w = reinterpret_cast<const Half*>(p.w) + block * BLOCK * p.K;
      no_sums();
      for (int64_t k = 0; k < p.K; k += 32, w += 32 * BLOCK) {
        ahead(reinterpret_cast<const char*>(w));
        _tile_loadd(4, x + k, 2 * p.K);
        _tile_loadd(6, w, 4 * BLOCK);
        _tile_loadd(7, w + BLOCK, 4 * BLOCK);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows <= 16) continue;
        _tile_loadd(5, x + 16 * p.K + k, 2 * p.K);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_sums(sum[0]);
      for (int64_t i = 0; i < rows; ++i) store(p, row + i, block, _mm512_load_ps(sum[i]), _mm512_load_ps(sum[i] + 16));
    }
  }
  _tile_release();
}

// 8 bits: 16 rows' first digits on the left, and their second ones; 64 k at a time.
TARGET void tiled_bytes(const Product& p, int64_t first, int64_t last) {
  alignas(64) int32_t sum[2][16][BLOCK];
  for (int64_t row = 0; row < p.M; row += 16) {
    const int64_t rows = std::min<int64_t>(16, p.M - row);
    configure(rows, rows);
    for (int64_t block = first; block < last; ++block) {
      const auto* w = reinterpret_cast<const int8_t*>(p.w) + block * BLOCK * p.K;
      no_sums();
      for (int64_t k = 0; k < p.K; k += 64, w += 64 * BLOCK) {
        ahead(reinterpret_cast<const char*>(w));
        _tile_loadd(4, p.digit[0] + row * p.K + k, p.K);
        _tile_loadd(5, p.digit[1] + row * p.K + k, p.K);
        _tile_loadd(6, w, 4 * BLOCK);
        _tile_loadd(7, w + 2 * BLOCK, 4 * BLOCK);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      store_sums(sum[0][0]);
      for (int64_t i = 0; i < rows; ++i) avx512::store_whole(p, row + i, block, sum[0][i], sum[1][i]);
    }
  }
  _tile_release();
}

// Returns d [M, N] as tiles want it on the right: [N / 2, rows of 16], each word two neighbours of a row.
std::vector<uint32_t> pairs_of(const Half* d, int64_t M, int64_t N, int64_t width) {
  std::vector<uint32_t> words(N / 2 * width);
  for (int64_t some = 0; some < M; some += 16)  // whole lines of the cache
    for (int64_t n = 0; n < N / 2; ++n)
      for (int64_t m = some; m < std::min(M, some + 16); ++m) std::memcpy(&words[n * width + m], d + m * N + 2 * n, 4);
  return words;
}

// Input features [first, last) of d @ w.T, by tiles of their transpose: 32 features of w on the left, 32 rows of d on the right.
TARGET void tiled_back(const Product& p, const std::vector<uint32_t>& words, int64_t X, int64_t first, int64_t last) {
  alignas(64) Half left[32][32];
  alignas(64) float sum[32][32];
  alignas(64) Half even[32];
  for (int i = 0; i < 32; ++i) even[i] = Half(2 * i);
  const __m512i evens = _mm512_load_si512(even), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  const __m512i rows16 = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(32));
  const int64_t width = words.size() / (p.N / 2);
  configure(16, 16);
  for (int64_t k = first; k < last; k += 32)
    for (int64_t m = 0; m < p.M; m += 32) {
      no_sums();
      for (int64_t n = 0; n < p.N; n += BLOCK) {
        const char* stored = p.w + (n / BLOCK * p.K + k) * BLOCK * p.size;
        for (int i = 0; p.size == 1 && i < 32; ++i) {
          const __m512i low = _mm512_loadu_si512(stored + i / 4 * 4 * BLOCK), high = _mm512_loadu_si512(stored + i / 4 * 4 * BLOCK + 64);
          const __m128i by = _mm_cvtsi32_si128(24 - i % 4 * 8);
          const __m512 first16 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(low, by), 24));
          const __m512 last16 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(high, by), 24));
          _mm512_store_si512(left[i], (__m512i)_mm512_cvtne2ps_pbh(last16, first16));
        }
        for (int i = 0; p.size == 2 && i < 16; ++i) {
          const __m512i low = _mm512_loadu_si512(stored + 4 * i * BLOCK), high = _mm512_loadu_si512(stored + (4 * i + 2) * BLOCK);
          _mm512_store_si512(left[2 * i], _mm512_permutex2var_epi16(low, evens, high));
          _mm512_store_si512(left[2 * i + 1], _mm512_permutex2var_epi16(low, odds, high));
        }
        _tile_loadd(4, left[0], 64);
        _tile_loadd(5, left[16], 64);
        _tile_loadd(6, words.data() + n / 2 * width + m, 4 * width);
        _tile_loadd(7, words.data() + n / 2 * width + m + 16, 4 * width);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_sums(sum[0]);
      const Product y{nullptr, nullptr, p.y, p.M, 0, X, 0, p.wide, nullptr, {}, nullptr};
      for (int64_t i = 0; i < std::min<int64_t>(32, p.M - m); ++i)
        store(y, m + i, k / BLOCK, _mm512_i32gather_ps(rows16, sum[0] + i, 4), _mm512_i32gather_ps(rows16, sum[16] + i, 4));
    }
  _tile_release();
}

#undef TARGET

// ---- what XLA calls ---------------------------------------------------------------------------------------------------

void product_blocks(const Product& p, bool half, int64_t first, int64_t last) {
  if (p.size == 1 && isa == AMX) return tiled_bytes(p, first, last);
  if (half && p.size == 2 && isa == AMX) return tiled_blocks(p, first, last);
  for (int64_t block = first; block < last; ++block) {
    if (isa == AVX512_BF16 && (half || p.size == 1)) {
      p.size == 1 ? quad_block(p, block) : pair_block(p, block);
    } else if (p.size == 1) {
      WIDEST(true, wide_block<int8_t>(p, block));
    } else {
      typed(p.size == 2, [&](auto kind) { WIDEST(true, wide_block<decltype(kind)>(p, block)); });
    }
  }
}

// Rows of x as two digits in base 128 with a scale: x = (digit[0] * 128 + digit[1]) * scale, to 1 / 32512 of the row's largest.
struct Digits {
  std::vector<int8_t> digit[2];
  std::vector<float> scale;
};

Digits digits_of(const Any& x, int64_t K) {
  const int64_t M = x.dimensions()[0], X = x.dimensions()[1];
  Digits found{{std::vector<int8_t>(M * K), std::vector<int8_t>(M * K)}, std::vector<float>(M)};
  typed(is_half(x), [&](auto kind) {
    const auto* rows = static_cast<const decltype(kind)*>(x.untyped_data());
    for (int64_t m = 0; m < M; ++m)
      found.scale[m] = WIDEST(true, split(rows + m * X, X, found.digit[0].data() + m * K, found.digit[1].data() + m * K));
  });
  return found;
}

// Returns x's rows of X columns as rows of K, the others zero; `floats`: bfloat16 as float32.
std::vector<char> widened_rows(const void* x, int64_t M, int64_t X, int64_t K, int64_t size, bool floats) {
  std::vector<char> rows(M * K * (floats ? 4 : size));
  for (int64_t m = 0; m < M; ++m) {
    if (!floats) {
      std::memcpy(rows.data() + m * K * size, static_cast<const char*>(x) + m * X * size, X * size);
    } else {
      const auto* row = static_cast<const Half*>(x) + m * X;
      auto* wide = reinterpret_cast<float*>(rows.data()) + m * K;
      for (int64_t k = 0; k < X; ++k) wide[k] = widened(row[k]);
    }
  }
  return rows;
}

// Points p to the layer's weights, [L, blocks, K / P, ...]; returns the number of its blocks.
int64_t layer_of(Product& p, const Any& w, const Index& layer) {
  const auto axes = w.dimensions();
  p.size = ffi::ByteWidth(w.element_type());
  p.K = axes[2] * 4 / p.size;
  p.w = static_cast<const char*>(w.untyped_data()) + layer.typed_data()[0] * axes[1] * BLOCK * p.K * p.size;
  return axes[1];
}

// Takes x [M, X], the layer, and of each target its weights, in 8 bits also their scale; returns each target's product.
ffi::Error product(ffi::ThreadPool pool, Any x, Index layer, ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const bool half = is_half(x), floats = half && isa < AVX512_BF16;
  const int64_t M = x.dimensions()[0], X = x.dimensions()[1], each = weights.size() / results.size();
  const bool whole = each == 2 && isa >= AVX512_BF16;  // x in digits
  std::vector<Product> products;
  std::vector<int64_t> ends;  // of each target's blocks, counted through
  std::vector<char> copy;     // of x, with w's columns
  Digits digits;
  int64_t count = 0, nbytes = 0;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto w = weights.get<Any>(i * each);
    const auto y = results.get<Any>(i);
    if (!w.has_value() || !y.has_value()) return ffi::Error::InvalidArgument("product: not an array");
    Product p{x.untyped_data(), nullptr, (*y)->untyped_data(), M, 0, (*y)->dimensions()[1], 0, !is_half(**y), nullptr, {}, nullptr};
    const int64_t blocks = layer_of(p, *w, layer);
    if (each == 2) {
      const auto scale = weights.get<ffi::Buffer<ffi::F32>>(2 * i + 1);
      if (!scale.has_value()) return ffi::Error::InvalidArgument("product: not a scale");
      p.scale = scale->typed_data() + layer.typed_data()[0] * blocks * BLOCK;
    }
    if (whole) {
      if (!i) digits = digits_of(x, p.K);
      for (int d = 0; d < 2; ++d) p.digit[d] = digits.digit[d].data();
      p.row_scale = digits.scale.data();
    } else if (copy.empty() && (p.K != X || floats)) {
      copy = widened_rows(p.x, M, X, p.K, half ? 2 : 4, floats);
    }
    if (!copy.empty()) p.x = copy.data();
    ends.push_back(count += blocks);
    nbytes += blocks * BLOCK * p.K * p.size;
    products.push_back(p);
  }
  divided(pool, count, nbytes < SMALL, [&products, &ends, half](int64_t first, int64_t last) {
    for (size_t i = 0; i < products.size(); ++i) {
      const int64_t start = i ? ends[i - 1] : 0, from = std::max(first, start), to = std::min(last, ends[i]);
      if (from < to) product_blocks(products[i], half, from - start, to - start);
    }
  });
  return ffi::Error::Success();
}

// Takes d [M, Y], with the scale of 8 bits, the layer and packed weights; returns d @ w.T.  For few rows: each reads all weights.
ffi::Error back(ffi::ThreadPool pool, Any d, Index layer, Any w, ffi::Result<Any> y) {
  const bool half = is_half(d), tiles = half && isa == AMX;
  const int64_t M = d.dimensions()[0], X = y->dimensions()[1];
  Product p{nullptr, nullptr, y->untyped_data(), M, 0, 0, 0, !is_half(*y), nullptr, {}, nullptr};
  p.N = layer_of(p, w, layer) * BLOCK;
  const auto rows = widened_rows(d.untyped_data(), M, d.dimensions()[1], p.N, half ? 2 : 4, half && !tiles);
  p.x = rows.data();
  const bool few = p.N * p.K * p.size < SMALL;
  if (tiles) {
    const auto words = pairs_of(reinterpret_cast<const Half*>(rows.data()), M, p.N, (M + 31) / 32 * 32);
    divided(pool, (X + 31) / 32, few, [&](int64_t first, int64_t last) { tiled_back(p, words, X, first * 32, last * 32); });
    return ffi::Error::Success();
  }
  divided(pool, (X + FEATURES - 1) / FEATURES, few, [&](int64_t first, int64_t last) {
    first *= FEATURES, last *= FEATURES;
    p.size == 4 ? WIDEST(true, back_features<float>(p, X, first, last)) : p.size == 2 ? WIDEST(true, back_features<Half>(p, X, first, last)) : WIDEST(true, back_features<int8_t>(p, X, first, last));
  });
  return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, Any q, Any k, Any v, Index layer, Index page, Index position, ffi::Result<Any> out,
                     int64_t window) {
  const auto axes = q.dimensions(), pages = k.dimensions();
  const int64_t G = axes[0], H = axes[3], F = pages[3], K = F / H;
  const int64_t skipped = layer.typed_data()[0] * pages[1] * pages[2] * F * (is_half(q) ? 2 : 4);
  Attention a{q.untyped_data(), static_cast<const char*>(k.untyped_data()) + skipped,
              static_cast<const char*>(v.untyped_data()) + skipped, page.typed_data(), position.typed_data(),
              out->untyped_data(), axes[1], axes[2], axes[2] / K, H, pages[2], F, page.dimensions()[1], window};
  const int64_t runs = (a.J + QUERIES - 1) / QUERIES;
  int64_t work = 0;
  for (int64_t i = 0; i < G * a.J; ++i) work += (a.position[i] + 1) * a.N * H;
  divided(pool, G * K * runs, work < FEW, [&a, K, runs, half = is_half(q)](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t from = i % runs * QUERIES, to = std::min(a.J, from + QUERIES), head = i / runs % K, lane = i / runs / K;
      typed(half, [&](auto kind) { WIDEST(a.H % 16 == 0, attend<decltype(kind)>(a, lane, head, from, to)); });
    }
  });
  return ffi::Error::Success();
}

// Takes x, the layer, tokens by slot, their slots, how many have one, and a, b, scale of each target.
ffi::Error lora(ffi::ThreadPool pool, Any x, Index layer, Index order, Index slots, Index count, ffi::RemainingArgs rows,
                ffi::RemainingRets results) {
  const int64_t T = x.dimensions()[0], X = x.dimensions()[1], visited = count.typed_data()[0], size = is_half(x) ? 2 : 4;
  const int32_t *token = order.typed_data(), *slot = slots.typed_data();
  std::vector<Lora> targets;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto a = rows.get<Any>(3 * i), b = rows.get<Any>(3 * i + 1);
    const auto scale = rows.get<ffi::Buffer<ffi::F32>>(3 * i + 2);
    const auto y = results.get<Any>(i);
    if (!a.has_value() || !b.has_value() || !scale.has_value() || !y.has_value())
      return ffi::Error::InvalidArgument("lora: not the arrays that it takes");
    const int64_t S = a->dimensions()[1], R = a->dimensions()[2], Y = b->dimensions()[3], at = layer.typed_data()[0] * S;
    const int64_t stored = is_half(*a) ? 2 : 4;
    targets.push_back({x.untyped_data(), static_cast<const char*>(a->untyped_data()) + at * R * X * stored,
                       static_cast<const char*>(b->untyped_data()) + at * R * Y * stored, scale->typed_data() + at,
                       (*y)->untyped_data(), R, X, Y, stored == 4});
    for (int64_t t = visited; t < T; ++t) std::memset(static_cast<char*>(targets[i].y) + token[t] * Y * size, 0, Y * size);
  }
  std::vector<int64_t> starts;  // of tokens that are computed together
  for (int64_t t = 0; t < visited; ++t)
    if (t == 0 || slot[t] != slot[t - 1] || t - starts.back() == TOGETHER) starts.push_back(t);
  const int64_t groups = starts.size();
  starts.push_back(visited);
  divided(pool, groups * targets.size(), false, [&, token, slot, groups, half = is_half(x)](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Lora& l = targets[i / groups];
      const int64_t start = starts[i % groups], together = starts[i % groups + 1] - start;
      typed(half, [&](auto x_kind) {
        typed(!l.wide, [&](auto kind) {
          using X = decltype(x_kind);
          using W = decltype(kind);
          WIDEST((l.X | l.Y) % 16 == 0, adapt<X, W>(l, token + start, together, slot[start]));
        });
      });
    }
  });
  return ffi::Error::Success();
}

// Takes x [T, D] and a weight [D]; returns x / rms(x) * weight.
ffi::Error norm(ffi::ThreadPool pool, Any x, Any weight, ffi::Result<Any> y, float eps) {
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1];
  typed(is_half(x), [&](auto kind) {
    using X = decltype(kind);
    const auto *from = static_cast<const X*>(x.untyped_data()), *by = static_cast<const X*>(weight.untyped_data());
    auto* to = static_cast<X*>(y->untyped_data());
    divided(pool, T, T * D < FEW, [=](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) WIDEST(true, normalize(from + t * D, by, to + t * D, D, eps));
    });
  });
  return ffi::Error::Success();
}

// Takes x [T, V]; returns log(sum(exp(x))) of each row.
ffi::Error logsumexp(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t T = x.dimensions()[0], V = x.dimensions()[1];
  divided(pool, T, T * V < FEW, [from = x.typed_data(), to = y->typed_data(), V](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) to[t] = WIDEST(true, logsumexp(from + t * V, V));
  });
  return ffi::Error::Success();
}

Isa best() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return NONE;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq"))
    return AVX2;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return AVX512;
  constexpr long ASK = 0x1023, TILE_DATA = 18;  // Linux wants to be asked for the tiles' memory
  if (!__builtin_cpu_supports("amx-bf16") || !__builtin_cpu_supports("amx-int8") || syscall(SYS_arch_prctl, ASK, TILE_DATA) != 0) return AVX512_BF16;
  return AMX;
}

}  // namespace

#define BIND ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_product, product, BIND.Arg<Any>().Arg<Index>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_back, back, BIND.Arg<Any>().Arg<Index>().Arg<Any>().Ret<Any>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_attention, attention,
                              BIND.Arg<Any>().Arg<Any>().Arg<Any>().Arg<Index>().Arg<Index>().Arg<Index>().Ret<Any>()
                                  .Attr<int64_t>("window"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_lora, lora,
                              BIND.Arg<Any>().Arg<Index>().Arg<Index>().Arg<Index>().Arg<Index>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_norm, norm, BIND.Arg<Any>().Arg<Any>().Ret<Any>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_logsumexp, logsumexp, BIND.Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

// Returns the hash of this file, so that nothing runs that was built from another.
extern "C" const char* jaxlora_source() { return JAXLORA_SOURCE; }

// Chooses the best instruction set up to `most`, and returns it.
extern "C" int jaxlora_choose(int most) {
  isa = std::min(best(), Isa(most));
  return isa;
}

#else  // ---- once for each width of vectors -----------------------------------------------------------------------------

namespace {
namespace AT {

typedef float Vector __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH), aligned(1)));
typedef uint32_t Bits __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH), aligned(2)));
constexpr int PARTS = BLOCK / WIDTH;

TARGET inline Vector load(const float* x) { return *reinterpret_cast<const Vector*>(x); }
TARGET inline Vector load(const Half* x) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(x), Bits) << 16);
}

TARGET inline void store_all(float* y, Vector value) { *reinterpret_cast<Vector*>(y) = value; }
TARGET inline void store_all(Half* y, Vector value) {  // as `narrowed`
  const Bits bits = (Bits)value, even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits rounded = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : even;
  *reinterpret_cast<Halves*>(y) = __builtin_convertvector(rounded, Halves);
}

template <typename T>
TARGET inline void store(T* y, Vector value, int64_t count) {
  if (count >= WIDTH) return store_all(y, value);
  for (int64_t i = 0; i < count; ++i) write(y + i, value[i]);
}

// a * b + c, rounded once.  Never left to the compiler: it would choose differently from one count of rows to another.
TARGET inline Vector fused(Vector a, Vector b, Vector c) {
#if WIDTH == 16
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}
TARGET inline Vector fused(float a, Vector b, Vector c) { return fused(Vector{} + a, b, c); }

// Returns the vector with lanes i and i ^ STEP exchanged.
template <int STEP, int... I>
TARGET inline Vector exchanged(Vector x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ STEP)...);
}

template <int STEP = WIDTH / 2>
TARGET inline float largest(Vector x) {
  const Vector other = exchanged<STEP>(x, std::make_integer_sequence<int, WIDTH>());
  const Vector most = x > other ? x : other;
  if constexpr (STEP > 1) return largest<STEP / 2>(most);
  return most[0];
}

template <int STEP = WIDTH / 2>
TARGET inline float total(Vector x) {
  const Vector sum = x + exchanged<STEP>(x, std::make_integer_sequence<int, WIDTH>());
  if constexpr (STEP > 1) return total<STEP / 2>(sum);
  return sum[0];
}

// ---- products ---------------------------------------------------------------------------------------------------------

// Reads weights of WIDTH output features: of as many input features as alternate.
TARGET inline void read_some(const float* w, Vector* some) { some[0] = load(w); }
TARGET inline void read_some(const Half* w, Vector* some) {
  const Bits bits = *reinterpret_cast<const Bits*>(w);
  some[0] = (Vector)(bits << 16);
  some[1] = (Vector)(bits & 0xffff0000u);
}
TARGET inline void read_some(const int8_t* w, Vector* some) {
  const Ints bits = *reinterpret_cast<const Ints*>(w);
  for (int i = 0; i < 4; ++i) some[i] = __builtin_convertvector(bits << (24 - 8 * i) >> 24, Vector);
}

TARGET void store_block(const Product& p, int64_t row, int64_t block, const Vector* sum) {
  for (int part = 0; part < PARTS; ++part) {
    const int64_t column = block * BLOCK + part * WIDTH, at = row * p.N + column, left = p.N - column;
    const Vector y = p.scale ? sum[part] * load(p.scale + column) : sum[part];
    p.wide ? store(static_cast<float*>(p.y) + at, y, left) : store(static_cast<Half*>(p.y) + at, y, left);
  }
}

template <typename T, int COUNT>
TARGET void wide_rows(const Product& p, int64_t row, int64_t block) {
  constexpr int SOME = 4 / sizeof(T);  // input features that alternate in w
  const auto* x = static_cast<const float*>(p.x) + row * p.K;
  const auto* w = reinterpret_cast<const T*>(p.w) + block * BLOCK * p.K;
  Vector sum[COUNT][PARTS] = {};
  for (int64_t k = 0; k < p.K; k += SOME, w += SOME * BLOCK)
    for (int part = 0; part < PARTS; ++part) {
      Vector some[SOME];
      read_some(w + SOME * part * WIDTH, some);
      for (int i = 0; i < COUNT; ++i)
        for (int odd = 0; odd < SOME; ++odd) sum[i][part] = fused(x[i * p.K + k + odd], some[odd], sum[i][part]);
    }
  for (int i = 0; i < COUNT; ++i) store_block(p, row + i, block, sum[i]);
}

template <typename T>
TARGET void wide_block(const Product& p, int64_t block) {
  int64_t row = 0;
  for (; row + ROWS <= p.M; row += ROWS) wide_rows<T, ROWS>(p, row, block);
  for (; row < p.M; ++row) wide_rows<T, 1>(p, row, block);
}

// Stores sums of both digits.
TARGET void store_whole(const Product& p, int64_t row, int64_t block, const int32_t* first, const int32_t* second) {
  Vector sum[PARTS];
  for (int part = 0; part < PARTS; ++part) {
    const auto load_ints = [part](const int32_t* x) { return *reinterpret_cast<const Ints*>(x + part * WIDTH); };
    const Vector high = __builtin_convertvector(load_ints(first), Vector), low = __builtin_convertvector(load_ints(second), Vector);
    sum[part] = (high * 128.0f + low) * p.row_scale[row];
  }
  store_block(p, row, block, sum);
}

// Splits a row of x into digits in base 128, and returns their scale; NaN where an element is not finite.
template <typename T>
TARGET float split(const T* x, int64_t X, int8_t* high, int8_t* low) {
  Vector most = {}, zero = {};
  int64_t k = 0;
  for (; k + WIDTH <= X; k += WIDTH) {
    const Vector value = load(x + k), size = (Vector)((Bits)value & 0x7fffffffu);
    most = size > most ? size : most;
    zero += value * 0.0f;
  }
  float best = largest(most), nothing = total(zero);
  for (; k < X; ++k) best = std::max(best, std::fabs(read(x + k))), nothing += read(x + k) * 0.0f;
  const float by = best > 0 ? 16256.0f / best : 0;
  for (k = 0; k < X; ++k) {
    const int32_t whole = int32_t(std::nearbyint(read(x + k) * by)), first = (whole + 64) >> 7;
    high[k] = int8_t(first);
    low[k] = int8_t(whole - 128 * first);
  }
  return best / 16256.0f + nothing;
}

// Input features [first, last) of x @ w.T, x [M, N] of float32, FEATURES and COUNT rows at a time; y has X columns.
template <typename T, int COUNT>
TARGET void back_rows(const Product& p, int64_t X, int64_t row, int64_t first, int64_t last) {
  constexpr int SOME = 4 / sizeof(T);
  const auto* x = static_cast<const float*>(p.x) + row * p.N;
  for (int64_t k = first; k < last; k += FEATURES) {
    Vector sum[COUNT][FEATURES] = {};
    for (int64_t n = 0; n < p.N; n += WIDTH) {
      const auto* w = reinterpret_cast<const T*>(p.w) + (n / BLOCK * p.K + k) * BLOCK + n % BLOCK * SOME;
      Vector some[FEATURES];
      for (int f = 0; f < FEATURES; f += SOME) read_some(w + f * BLOCK, some + f);
      for (int i = 0; i < COUNT; ++i)
        for (int f = 0; f < FEATURES; ++f) sum[i][f] = fused(load(x + i * p.N + n), some[f], sum[i][f]);
    }
    for (int i = 0; i < COUNT; ++i)
      for (int64_t f = 0; f < FEATURES && k + f < X; ++f) {
        const int64_t at = (row + i) * X + k + f;
        p.wide ? write(static_cast<float*>(p.y) + at, total(sum[i][f])) : write(static_cast<Half*>(p.y) + at, total(sum[i][f]));
      }
  }
}

template <typename T>
TARGET void back_features(const Product& p, int64_t X, int64_t first, int64_t last) {
  int64_t row = 0;
  for (; row + WIDTH / 4 <= p.M; row += WIDTH / 4) back_rows<T, WIDTH / 4>(p, X, row, first, last);
  for (; row < p.M; ++row) back_rows<T, 1>(p, X, row, first, last);
}

// ---- attention --------------------------------------------------------------------------------------------------------

// e ** x for x <= 0: 2 ** n * p(r), with n whole and |r| <= ln 2 / 2.  At most 2 units in the last place off; 0 below -87.
TARGET inline Vector exponential(Vector x) {
  const Vector shift = Vector{} + 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds to whole numbers
  const Vector n = fused(1.44269504088896341f, x, shift) - shift;
  const Vector r = fused(2.12194440e-4f, n, fused(-0.693359375f, n, x));
  Vector p = Vector{} + 1.9875691500e-4f;
  p = fused(p, r, Vector{} + 1.3981999507e-3f);
  p = fused(p, r, Vector{} + 8.3334519073e-3f);
  p = fused(p, r, Vector{} + 4.1665795894e-2f);
  p = fused(p, r, Vector{} + 1.6666665459e-1f);
  p = fused(p, r, Vector{} + 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return x < -87.0f ? Vector{} : p * (Vector)power;
}

// One query over the places [low, high] of its sequence, WIDTH at a time: softmax with the largest score so far.
template <typename T>
TARGET void attend_one(const Attention& a, const T* q, const int32_t* page, int64_t head, int64_t low, int64_t high, T* out) {
  const int64_t parts = a.H / WIDTH;
  Vector query[MAX_HEAD / WIDTH], sum[MAX_HEAD / WIDTH] = {};
  const float scale = 1.0f / std::sqrt(float(a.H));
  for (int64_t part = 0; part < parts; ++part) query[part] = load(q + part * WIDTH);
  float best = -std::numeric_limits<float>::infinity(), weight = 0;
  for (int64_t start = low - low % WIDTH; start <= high; start += WIDTH) {
    const int64_t from = std::max(start, low), to = std::min<int64_t>(start + WIDTH - 1, high);
    Vector score = Vector{} - std::numeric_limits<float>::infinity();
    int64_t row[WIDTH];
    for (int64_t place = from; place <= to; ++place) {
      row[place - start] = (page[place / a.Z] * a.Z + place % a.Z) * a.F + head * a.H;
      const T* k = static_cast<const T*>(a.k) + row[place - start];
      Vector dot = query[0] * load(k);
      for (int64_t part = 1; part < parts; ++part) dot = fused(query[part], load(k + part * WIDTH), dot);
      score[place - start] = total(dot) * scale;
    }
    const float most = std::max(best, largest(score));
    const float kept = best == most ? 1.0f : exponential(Vector{} + (best - most))[0];
    const Vector share = exponential(score - most);
    weight = weight * kept + total(share);
    best = most;
    for (int64_t part = 0; part < parts; ++part) sum[part] *= kept;
    for (int64_t place = from; place <= to; ++place) {
      const T* v = static_cast<const T*>(a.v) + row[place - start];
      for (int64_t part = 0; part < parts; ++part) sum[part] = fused(share[place - start], load(v + part * WIDTH), sum[part]);
    }
  }
  for (int64_t part = 0; part < parts; ++part) store(out + part * WIDTH, sum[part] / weight, WIDTH);
}

template <typename T>
TARGET void attend(const Attention& a, int64_t lane, int64_t head, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int64_t position = a.position[lane * a.J + token];
    for (int64_t n = head * a.M; n < (head + 1) * a.M; ++n) {
      const int64_t at = ((lane * a.J + token) * a.N + n) * a.H;
      T* out = static_cast<T*>(a.out) + at;
      if (position < 0) {
        std::fill(out, out + a.H, T(0));
      } else {
        const int64_t low = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
        attend_one(a, static_cast<const T*>(a.q) + at, a.page + lane * a.C, head, low, position, out);
      }
    }
  }
}

// ---- LoRA -------------------------------------------------------------------------------------------------------------

template <typename T, typename W, int COUNT>
TARGET void adapt_together(const Lora& l, const int32_t* tokens, int64_t slot) {
  static thread_local std::vector<float> wide, hidden;
  wide.resize(COUNT * l.X);
  hidden.resize(COUNT * l.R);
  float *x = wide.data(), *h = hidden.data();
  for (int i = 0; i < COUNT; ++i)
    for (int64_t k = 0; k < l.X; k += WIDTH) store_all(x + i * l.X + k, load(static_cast<const T*>(l.x) + tokens[i] * l.X + k));
  const W* a = static_cast<const W*>(l.a) + slot * l.R * l.X;
  const W* b = static_cast<const W*>(l.b) + slot * l.R * l.Y;
  for (int64_t r = 0; r < l.R; ++r, a += l.X) {
    Vector sum[COUNT] = {};
    for (int64_t k = 0; k < l.X; k += WIDTH) {
      const Vector row = load(a + k);
      for (int i = 0; i < COUNT; ++i) sum[i] = fused(row, load(x + i * l.X + k), sum[i]);
    }
    for (int i = 0; i < COUNT; ++i) h[i * l.R + r] = total(sum[i]) * l.scale[slot];
  }
  constexpr int WIDE = COUNT <= 2 ? 8 : COUNT <= 4 ? 4 : 2;  // vectors of y at a time: long runs of each row of b
  for (int64_t column = 0; column < l.Y; column += WIDE * WIDTH) {
    const int64_t parts = std::min<int64_t>(WIDE, (l.Y - column) / WIDTH);
    Vector sum[COUNT][WIDE] = {};
    for (int64_t r = 0; r < l.R; ++r)
      for (int64_t part = 0; part < parts; ++part) {
        const Vector row = load(b + r * l.Y + column + part * WIDTH);
        for (int i = 0; i < COUNT; ++i) sum[i][part] = fused(h[i * l.R + r], row, sum[i][part]);
      }
    for (int i = 0; i < COUNT; ++i)
      for (int64_t part = 0; part < parts; ++part)
        store(static_cast<T*>(l.y) + tokens[i] * l.Y + column + part * WIDTH, sum[i][part], WIDTH);
  }
}

template <typename T, typename W>
TARGET void adapt(const Lora& l, const int32_t* tokens, int64_t count, int64_t slot) {
  for (; count >= 8; count -= 8, tokens += 8) adapt_together<T, W, 8>(l, tokens, slot);
  for (; count >= 4; count -= 4, tokens += 4) adapt_together<T, W, 4>(l, tokens, slot);
  for (; count >= 2; count -= 2, tokens += 2) adapt_together<T, W, 2>(l, tokens, slot);
  if (count) adapt_together<T, W, 1>(l, tokens, slot);
}

// ---- rows -------------------------------------------------------------------------------------------------------------

template <typename T>
TARGET void normalize(const T* x, const T* weight, T* y, int64_t D, float eps) {
  Vector sum = {};
  int64_t d = 0;
  for (; d + WIDTH <= D; d += WIDTH) sum = fused(load(x + d), load(x + d), sum);
  float squares = total(sum);
  for (; d < D; ++d) squares += read(x + d) * read(x + d);
  const float scale = 1.0f / std::sqrt(squares / float(D) + eps);
  for (d = 0; d < D; ++d) {  // rounded before the weight, as the model does
    T rounded;
    write(&rounded, read(x + d) * scale);
    write(y + d, read(&rounded) * read(weight + d));
  }
}

TARGET float logsumexp(const float* x, int64_t V) {
  Vector most = Vector{} - std::numeric_limits<float>::infinity(), sum = {};
  int64_t v = 0;
  for (; v + WIDTH <= V; v += WIDTH) most = load(x + v) > most ? load(x + v) : most;
  float best = largest(most);
  for (; v < V; ++v) best = std::max(best, x[v]);
  for (v = 0; v + WIDTH <= V; v += WIDTH) sum += exponential(load(x + v) - best);
  float all = total(sum);
  for (; v < V; ++v) all += exponential(Vector{} + (x[v] - best))[0];
  return best + std::log(all);
}

}  // namespace AT
}  // namespace

#endif
