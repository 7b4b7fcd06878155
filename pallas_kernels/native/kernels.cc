// Bodies of ops for x86 CPUs, called by XLA through its foreign function interface.
//
// Every row's result has the same bits in any row, beside any others and on any number of threads: each of its elements is
// computed from the row alone, by the same instructions in the same order.  So no kernel sums a part of a row on its own.
//
// vectors.h has what any processor with AVX2 runs, once for each width of vectors, tiles.h what the newest have instructions for.
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
  const void *x, *a, *b;      // x [T, X], rows of all slots a [rows, X], b [rows, Y]
  const float* scale;         // [S]
  const int32_t *first, *rank;  // [S]: a slot's first row, and the rows of its adapter
  void* y;
  int64_t X, Y;
  bool wide;  // a and b are float32
};

// The draw of a token from a row's logits (sampling/op.py).
struct Draw {
  const float* x;
  int64_t V;
  float temperature, top_p, min_p, uniform;
  int64_t top_k;
};

// Returns a number in the order of the floats, and the float of one.
inline uint32_t ordered(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
inline float unordered(uint32_t number) {
  const uint32_t bits = number >> 31 ? number & 0x7fffffffu : ~number;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Returns the largest float of which those of x at or above it have at least the wanted mass (`mass` of each; null: one each).
inline float largest_with(const float* x, const float* mass, int64_t V, double wanted) {
  uint32_t found = 0;
  double above = 0;
  std::vector<double> bin;
  for (int shift = 21, bits = 11; bits; bits = shift ? std::min(shift, 11) : 0, shift -= bits) {
    bin.assign(1 << bits, 0.0);
    const uint32_t low = (1u << bits) - 1;
    for (int64_t v = 0; v < V; ++v) {
      const uint32_t number = ordered(x[v]);
      if (uint64_t(number) >> (shift + bits) == found) bin[number >> shift & low] += mass ? mass[v] : 1.0f;
    }
    uint32_t b = low;
    for (; b && above + bin[b] < wanted; --b) above += bin[b];
    found = found << bits | b;
  }
  return unordered(found);
}

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
#include "vectors.h"
#undef WIDTH
#undef ROWS
#undef AT
#undef TARGET
#define WIDTH 16
#define ROWS 8
#define AT avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512")))
#include "vectors.h"
#undef TARGET
#include "tiles.h"

#define WIDEST(fits, ...) (isa >= AVX512 && (fits) ? avx512::__VA_ARGS__ : avx2::__VA_ARGS__)
namespace {

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

// Takes d [M, Y], with the scale of 8 bits, the layer and packed weights; returns d @ w.T.  Without tiles each of its rows reads all weights.
ffi::Error back(ffi::ThreadPool pool, Any d, Index layer, Any w, ffi::Result<Any> y) {
  const bool half = is_half(d), tiles = half && isa == AMX;
  const int64_t M = d.dimensions()[0], X = y->dimensions()[1];
  Product p{nullptr, nullptr, y->untyped_data(), M, 0, 0, 0, !is_half(*y), nullptr, {}, nullptr};
  p.N = layer_of(p, w, layer) * BLOCK;
  std::vector<char> copy;  // of d, with w's columns
  p.x = d.untyped_data();
  if (const bool floats = half && !tiles; floats || p.N != d.dimensions()[1]) {
    copy = widened_rows(p.x, M, d.dimensions()[1], p.N, half ? 2 : 4, floats);
    p.x = copy.data();
  }
  const bool few = p.N * p.K * p.size < SMALL;
  if (tiles) {
    divided(pool, (X + 31) / 32, few, [&](int64_t first, int64_t last) { tiled_back(p, X, first * 32, last * 32); });
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

// Takes x, the layer, tokens by slot, their slots, how many have one, each slot's first row, and a, b, scale, rank of each target.
ffi::Error lora(ffi::ThreadPool pool, Any x, Index layer, Index order, Index slots, Index count, Index first_row, ffi::RemainingArgs rows,
                ffi::RemainingRets results) {
  const int64_t T = x.dimensions()[0], X = x.dimensions()[1], visited = count.typed_data()[0], size = is_half(x) ? 2 : 4;
  const int32_t *token = order.typed_data(), *slot = slots.typed_data();
  std::vector<Lora> targets;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto a = rows.get<Any>(4 * i), b = rows.get<Any>(4 * i + 1);
    const auto scale = rows.get<ffi::Buffer<ffi::F32>>(4 * i + 2);
    const auto rank = rows.get<Index>(4 * i + 3);
    const auto y = results.get<Any>(i);
    if (!a.has_value() || !b.has_value() || !scale.has_value() || !rank.has_value() || !y.has_value())
      return ffi::Error::InvalidArgument("lora: not the arrays that it takes");
    const int64_t S = scale->dimensions()[1], Y = b->dimensions()[3], stored = is_half(*a) ? 2 : 4;
    const int64_t at = layer.typed_data()[0], row = at * a->dimensions()[1] * a->dimensions()[2];
    targets.push_back({x.untyped_data(), static_cast<const char*>(a->untyped_data()) + row * X * stored,
                       static_cast<const char*>(b->untyped_data()) + row * Y * stored, scale->typed_data() + at * S,
                       first_row.typed_data(), rank->typed_data(), (*y)->untyped_data(), X, Y, stored == 4});
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

// Takes logits x [B, V] and of each row its temperature, top-p, top-k, min-p and a number in [0, 1); returns the tokens drawn.
ffi::Error draw(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> temperature, ffi::Buffer<ffi::F32> top_p,
                Index top_k, ffi::Buffer<ffi::F32> min_p, ffi::Buffer<ffi::F32> uniform, ffi::ResultBuffer<ffi::S32> token) {
  const int64_t B = x.dimensions()[0], V = x.dimensions()[1];
  divided(pool, B, B * V < FEW, [=, to = token->typed_data()](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const Draw d{x.typed_data() + b * V, V, temperature.typed_data()[b], top_p.typed_data()[b], min_p.typed_data()[b],
                   uniform.typed_data()[b], top_k.typed_data()[b]};
      to[b] = d.temperature > 0 ? WIDEST(true, draw(d)) : 0;
    }
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
                              BIND.Arg<Any>().Arg<Index>().Arg<Index>().Arg<Index>().Arg<Index>().Arg<Index>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_norm, norm, BIND.Arg<Any>().Arg<Any>().Ret<Any>().Attr<float>("eps"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_logsumexp, logsumexp, BIND.Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxlora_draw, draw,
                              BIND.Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<Index>()
                                  .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::S32>>());

// Returns the hash of the sources, so that nothing runs that was built from another.
extern "C" const char* jaxlora_source() { return JAXLORA_SOURCE; }

// Chooses the best instruction set up to `most`, and returns it.
extern "C" int jaxlora_choose(int most) {
  isa = std::min(best(), Isa(most));
  return isa;
}
