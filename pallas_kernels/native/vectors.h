// Products, attention, LoRA and sums of rows with vectors of WIDTH floats; ROWS are the rows that a product takes at a time.
// Included by kernels.cc once for each width.

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

// Returns the places whose sums lie in blocks of 2 * STEP lanes of a and b, added to blocks of STEP: a's first, then b's.
template <int STEP, int... I>
TARGET inline Vector halved(Vector a, Vector b, std::integer_sequence<int, I...>) {
  const Vector low = __builtin_shufflevector(a, b, (I / (2 * STEP) * 2 * STEP + I % STEP + (I & STEP ? WIDTH : 0))...);
  const Vector high = __builtin_shufflevector(a, b, (I / (2 * STEP) * 2 * STEP + I % STEP + STEP + (I & STEP ? WIDTH : 0))...);
  return low + high;
}

// Returns the total of each of WIDTH vectors, with the additions of `total`.
template <int STEP = WIDTH / 2>
TARGET inline Vector totals(Vector* of) {
  for (int i = 0; i < STEP; ++i) of[i] = halved<STEP>(of[i], of[i + STEP], std::make_integer_sequence<int, WIDTH>());
  if constexpr (STEP > 1) return totals<STEP / 2>(of);
  return of[0];
}

// COUNT queries of one kv head over the places [low, high] of their sequence, WIDTH at a time: softmax with the largest score so
// far.
template <typename T, int COUNT>
TARGET void attend_some(const Attention& a, const T* q, const int32_t* page, int64_t head, int64_t low, int64_t high, T* out) {
  const int64_t parts = a.H / WIDTH;
  Vector query[COUNT][MAX_HEAD / WIDTH], sum[COUNT][MAX_HEAD / WIDTH];
  const float scale = 1.0f / std::sqrt(float(a.H)), nothing = -std::numeric_limits<float>::infinity();
  float best[COUNT], weight[COUNT];
  for (int i = 0; i < COUNT; ++i) {
    best[i] = nothing, weight[i] = 0;
    for (int64_t part = 0; part < parts; ++part) query[i][part] = load(q + i * a.H + part * WIDTH), sum[i][part] = Vector{};
  }
  Ints lane;
  for (int i = 0; i < WIDTH; ++i) lane[i] = i;
  const auto row_of = [&](int64_t place) { return (page[place / a.Z] * a.Z + place % a.Z) * a.F + head * a.H; };
  int64_t row[WIDTH], next[WIDTH];  // where the keys and values of these places lie, and those of the ones after them
  const auto fetch = [&](const void* of, int64_t at) {  // ahead: the processor does not see where the next page is
    const char* line = static_cast<const char*>(of) + at * sizeof(T);
    for (int64_t b = 0; b < a.H * int64_t(sizeof(T)); b += 64) _mm_prefetch(line + b, _MM_HINT_T0);
  };
  for (int64_t place = low, i = low % WIDTH; i < WIDTH && place <= high; ++place, ++i) next[i] = row_of(place);
  for (int64_t start = low - low % WIDTH; start <= high; start += WIDTH) {
    const int64_t from = std::max(start, low), to = std::min<int64_t>(start + WIDTH - 1, high);
    std::copy(next, next + WIDTH, row);
    for (int64_t place = start + WIDTH; place < start + 2 * WIDTH && place <= high; ++place) {
      next[place - start - WIDTH] = row_of(place);
      fetch(a.k, next[place - start - WIDTH]);
    }
    Vector dots[COUNT][WIDTH] = {};
    for (int64_t place = from; place <= to; ++place) {
      fetch(a.v, row[place - start]);
      const T* k = static_cast<const T*>(a.k) + row[place - start];
      Vector dot[COUNT];
      for (int64_t part = 0; part < parts; ++part) {
        const Vector key = load(k + part * WIDTH);
        for (int i = 0; i < COUNT; ++i) dot[i] = part ? fused(query[i][part], key, dot[i]) : query[i][part] * key;
      }
      for (int i = 0; i < COUNT; ++i) dots[i][place - start] = dot[i];
    }
    const Ints read = (lane >= int32_t(from - start)) & (lane <= int32_t(to - start));
    alignas(64) float share[COUNT][WIDTH];
    for (int i = 0; i < COUNT; ++i) {
      const Vector score = read ? totals(dots[i]) * scale : Vector{} + nothing;
      const float most = std::max(best[i], largest(score));
      const float kept = best[i] == most ? 1.0f : exponential(Vector{} + (best[i] - most))[0];
      const Vector shares = exponential(score - most);
      weight[i] = weight[i] * kept + total(shares);
      best[i] = most;
      for (int64_t part = 0; part < parts; ++part) sum[i][part] *= kept;
      store_all(share[i], shares);
    }
    for (int64_t place = from; place <= to; ++place) {
      const T* v = static_cast<const T*>(a.v) + row[place - start];
      for (int64_t part = 0; part < parts; ++part) {
        const Vector value = load(v + part * WIDTH);
        for (int i = 0; i < COUNT; ++i) sum[i][part] = fused(share[i][place - start], value, sum[i][part]);
      }
    }
  }
  for (int i = 0; i < COUNT; ++i)
    for (int64_t part = 0; part < parts; ++part) store(out + i * a.H + part * WIDTH, sum[i][part] / weight[i], WIDTH);
}

template <typename T>
TARGET void attend(const Attention& a, int64_t lane, int64_t head, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int64_t position = a.position[lane * a.J + token], low = a.window ? std::max<int64_t>(0, position - a.window + 1) : 0;
    const int64_t at = ((lane * a.J + token) * a.N + head * a.M) * a.H;
    const int32_t* page = a.page + lane * a.C;
    const T* q = static_cast<const T*>(a.q) + at;
    T* out = static_cast<T*>(a.out) + at;
    if (position < 0) {
      std::fill(out, out + a.M * a.H, T(0));
      continue;
    }
    int64_t n = 0;
    for (; n + 3 <= a.M; n += 3) attend_some<T, 3>(a, q + n * a.H, page, head, low, position, out + n * a.H);
    for (; n + 2 <= a.M; n += 2) attend_some<T, 2>(a, q + n * a.H, page, head, low, position, out + n * a.H);
    for (; n < a.M; ++n) attend_some<T, 1>(a, q + n * a.H, page, head, low, position, out + n * a.H);
  }
}

// ---- LoRA -------------------------------------------------------------------------------------------------------------

template <typename T, typename W, int COUNT>
TARGET void adapt_together(const Lora& l, const int32_t* tokens, int64_t slot) {
  const int64_t R = l.rank[slot];
  static thread_local std::vector<float> wide, hidden;
  wide.resize(COUNT * l.X);
  hidden.resize(COUNT * R);
  float *x = wide.data(), *h = hidden.data();
  for (int i = 0; R && i < COUNT; ++i)
    for (int64_t k = 0; k < l.X; k += WIDTH) store_all(x + i * l.X + k, load(static_cast<const T*>(l.x) + tokens[i] * l.X + k));
  const W* a = static_cast<const W*>(l.a) + l.first[slot] * l.X;
  const W* b = static_cast<const W*>(l.b) + l.first[slot] * l.Y;
  for (int64_t r = 0; r < R; ++r, a += l.X) {
    Vector sum[COUNT] = {};
    for (int64_t k = 0; k < l.X; k += WIDTH) {
      const Vector row = load(a + k);
      for (int i = 0; i < COUNT; ++i) sum[i] = fused(row, load(x + i * l.X + k), sum[i]);
    }
    for (int i = 0; i < COUNT; ++i) h[i * R + r] = total(sum[i]) * l.scale[slot];
  }
  constexpr int WIDE = COUNT <= 2 ? 8 : COUNT <= 4 ? 4 : 2;  // vectors of y at a time: long runs of each row of b
  for (int64_t column = 0; column < l.Y; column += WIDE * WIDTH) {
    const int64_t parts = std::min<int64_t>(WIDE, (l.Y - column) / WIDTH);
    Vector sum[COUNT][WIDE] = {};
    for (int64_t r = 0; r < R; ++r)
      for (int64_t part = 0; part < parts; ++part) {
        const Vector row = load(b + r * l.Y + column + part * WIDTH);
        for (int i = 0; i < COUNT; ++i) sum[i][part] = fused(h[i * R + r], row, sum[i][part]);
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

// Draws a token; see sampling/op.py.
TARGET int32_t draw(const Draw& d) {
  constexpr int64_t SOME = 256;  // tokens of a block, of which only one is looked at alone
  static thread_local std::vector<float> scaled, share, sum;
  const int64_t blocks = (d.V + SOME - 1) / SOME;
  const float nothing = -std::numeric_limits<float>::infinity();
  scaled.assign(blocks * SOME, nothing);
  share.resize(blocks * SOME);
  sum.resize(blocks);
  Vector most = Vector{} + nothing;
  int64_t v = 0;
  for (; v + WIDTH <= d.V; v += WIDTH) most = load(d.x + v) > most ? load(d.x + v) : most;
  float best = largest(most);
  for (; v < d.V; ++v) best = std::max(best, d.x[v]);
  for (v = 0; v + WIDTH <= d.V; v += WIDTH) store_all(scaled.data() + v, (load(d.x + v) - best) / (Vector{} + d.temperature));
  for (; v < d.V; ++v) scaled[v] = (d.x[v] - best) / d.temperature;
  // Returns the total of the shares of those that are kept, and writes them, and the sums of blocks.
  const auto keep = [&](float floor) TARGET {
    double all = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      Vector some = {};
      for (int64_t i = block * SOME; i < (block + 1) * SOME; i += WIDTH) {
        const Vector s = load(scaled.data() + i), kept = s >= floor ? exponential(s) : Vector{};
        store_all(share.data() + i, kept);
        some += kept;
      }
      all += sum[block] = total(some);
    }
    return all;
  };
  float floor = d.top_k > 0 && d.top_k < d.V ? largest_with(scaled.data(), nullptr, d.V, double(d.top_k)) : nothing;
  double all = keep(floor);
  const float before = floor;
  if (d.top_p < 1) floor = std::max(floor, largest_with(scaled.data(), share.data(), d.V, d.top_p * all));
  if (d.min_p > 0) floor = std::max(floor, std::log(d.min_p));
  if (floor > before) all = keep(floor);
  double left = d.uniform * all;
  int64_t block = 0, last = 0;
  for (; block < blocks && left >= sum[block]; ++block) left -= sum[block];
  if (block == blocks) {  // rounded up to the whole: the last one that is kept
    for (v = 0; v < d.V; ++v) last = share[v] > 0 ? v : last;
    return int32_t(last);
  }
  for (v = block * SOME; v < std::min(d.V, (block + 1) * SOME); ++v) {
    if (share[v] > 0) last = v;
    if (left < share[v]) break;
    left -= share[v];
  }
  return int32_t(last);
}

}  // namespace AT
}  // namespace
