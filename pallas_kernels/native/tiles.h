// Products with the instructions for pairs of bfloat16 and quads of 8 bits, and with tiles.  Included by kernels.cc.
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

typedef uint32_t Words __attribute__((vector_size(64)));

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

// Transposes 16 rows of 16 words.
template <int STEP = 8, int... I>
TARGET inline void transpose(Words* of, std::integer_sequence<int, I...> lanes) {
  for (int i = 0; i < 16; ++i) {
    if (i & STEP) continue;
    const Words a = of[i], b = of[i + STEP];
    of[i] = __builtin_shufflevector(a, b, (I & STEP ? 16 + I - STEP : I)...);
    of[i + STEP] = __builtin_shufflevector(a, b, (I & STEP ? 16 + I : I + STEP)...);
  }
  if constexpr (STEP > 1) transpose<STEP / 2>(of, lanes);
}

// Writes the weights of 32 input features from k on as tiles want their transpose on the right: [N / 2, 32], each word those of
// two neighbouring output features.
TARGET void turned(const Product& p, int64_t k, uint32_t* right) {
  alignas(64) Half even[32];
  for (int i = 0; i < 32; ++i) even[i] = Half(2 * i);
  const __m512i evens = _mm512_load_si512(even), odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  for (int64_t n = 0; n < p.N; n += BLOCK, right += 16 * 32) {
    const char* stored = p.w + (n / BLOCK * p.K + k) * BLOCK * p.size;
    Words feature[32];
    for (int i = 0; p.size == 1 && i < 32; ++i) {
      const __m512i low = _mm512_loadu_si512(stored + i / 4 * 4 * BLOCK), high = _mm512_loadu_si512(stored + i / 4 * 4 * BLOCK + 64);
      const __m128i by = _mm_cvtsi32_si128(24 - i % 4 * 8);
      const __m512 first16 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(low, by), 24));
      const __m512 last16 = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_sll_epi32(high, by), 24));
      feature[i] = (Words)_mm512_cvtne2ps_pbh(last16, first16);
    }
    for (int i = 0; p.size == 2 && i < 16; ++i) {
      const __m512i low = _mm512_loadu_si512(stored + 4 * i * BLOCK), high = _mm512_loadu_si512(stored + (4 * i + 2) * BLOCK);
      feature[2 * i] = (Words)_mm512_permutex2var_epi16(low, evens, high);
      feature[2 * i + 1] = (Words)_mm512_permutex2var_epi16(low, odds, high);
    }
    for (int half = 0; half < 2; ++half) {
      transpose(feature + 16 * half, std::make_integer_sequence<int, 16>());
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(right + 32 * i + 16 * half, (__m512i)feature[16 * half + i]);
    }
  }
}

// Input features [first, last) of x @ w.T, x [M, N], 32 at a time, whose weights are turned once for all rows; y has X columns.
TARGET void tiled_back(const Product& p, int64_t X, int64_t first, int64_t last) {
  static thread_local std::vector<uint32_t> right;
  right.resize(p.N / 2 * 32);
  alignas(64) float sum[32][BLOCK];
  const Product y{nullptr, nullptr, p.y, p.M, 0, X, 0, p.wide, nullptr, {}, nullptr};
  for (int64_t k = first; k < last; k += 32) {
    turned(p, k, right.data());
    for (int64_t row = 0; row < p.M; row += 32) {
      const int64_t rows = std::min<int64_t>(32, p.M - row);
      const auto* x = static_cast<const Half*>(p.x) + row * p.N;
      configure(std::min<int64_t>(rows, 16), std::max<int64_t>(rows - 16, 1));
      no_sums();
      for (int64_t n = 0; n < p.N; n += 32) {
        _tile_loadd(4, x + n, 2 * p.N);
        _tile_loadd(6, right.data() + n / 2 * 32, 128);
        _tile_loadd(7, right.data() + n / 2 * 32 + 16, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (rows <= 16) continue;
        _tile_loadd(5, x + 16 * p.N + n, 2 * p.N);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      store_sums(sum[0]);
      for (int64_t i = 0; i < rows; ++i) store(y, row + i, k / BLOCK, _mm512_load_ps(sum[i]), _mm512_load_ps(sum[i] + 16));
    }
  }
  _tile_release();
}

#undef TARGET

}  // namespace
