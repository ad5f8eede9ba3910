// AMX for CPUs that have AVX-512 alone: `g++ -include amx_emulation.h` builds kernel.cpp for them.
//
// A tile is an array of each thread, and an instruction a function with the arithmetic of Intel's
// manual, order of the sums included. What would raise an exception on a CPU with AMX ends the
// process: a tile without a configuration, or shapes that do not fit. The three instructions of
// AVX512_BF16 that kernel.cpp uses are emulated too, where the compiler is told of none.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace emulation {

struct Tile {
  int rows, bytes;  // 0 while there is no configuration
  alignas(64) uint32_t data[16][16];
};

inline thread_local Tile tiles[8];
inline thread_local int64_t products;        // of tiles, since this thread's configuration
inline std::atomic<int64_t> all_products{0};  // of all threads

inline void require(bool condition, const char* problem) {
  if (condition) return;
  fprintf(stderr, "amx_emulation.h: %s\n", problem);
  abort();
}

inline Tile& configured(int number) {
  require(tiles[number].rows, "a tile is used without a configuration");
  return tiles[number];
}

inline void configure(const void* from) {
  const uint8_t* config = (const uint8_t*)from;
  require(config[0] == 1, "a palette that is not 1");
  for (int i = 0; i < 8; i++) {
    const int bytes = config[16 + 2 * i] + 256 * config[17 + 2 * i], rows = config[48 + i];
    require(rows <= 16 && bytes <= 64 && bytes % 4 == 0, "a tile larger than 16 rows of 64 bytes");
    require(!rows == !bytes, "a tile with rows, or columns, alone");
    tiles[i] = Tile{rows, bytes, {}};
  }
}

inline void release() {
  all_products += products;
  products = 0;
  for (Tile& tile : tiles) tile = Tile{};
}

inline void zero(int number) { memset(configured(number).data, 0, sizeof(Tile::data)); }

inline void load(int number, const void* base, int64_t stride) {
  zero(number);
  Tile& tile = tiles[number];
  for (int i = 0; i < tile.rows; i++)
    memcpy(tile.data[i], (const char*)base + i * stride, tile.bytes);
}

inline void save(int number, void* base, int64_t stride) {
  const Tile& tile = configured(number);
  for (int i = 0; i < tile.rows; i++) memcpy((char*)base + i * stride, tile.data[i], tile.bytes);
}

// The first, or second, bf16 of each pair as floats.
inline __m512 first(__m512i pairs) { return (__m512)_mm512_slli_epi32(pairs, 16); }
inline __m512 second(__m512i pairs) {
  return (__m512)_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000));
}

// c += a b: first and second numbers of the pairs are summed apart, from 0. Not inlined, so that
// no sum leaves the place where numbers below the normal ones count as 0.
__attribute__((noinline)) inline void multiply(Tile& c, const Tile& a, const Tile& b) {
  for (int i = 0; i < c.rows; i++) {
    __m512 one = _mm512_setzero_ps(), two = _mm512_setzero_ps();
    for (int k = 0; k < a.bytes / 4; k++) {
      const __m512i x = _mm512_set1_epi32(a.data[i][k]), y = _mm512_load_si512(b.data[k]);
      one = _mm512_fmadd_ps(first(x), first(y), one);
      two = _mm512_fmadd_ps(second(x), second(y), two);
    }
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(c.data[i]), _mm512_add_ps(one, two));
    _mm512_mask_store_ps(c.data[i], (1u << c.bytes / 4) - 1, sum);
  }
}

inline void multiply(int c, int a, int b) {
  const Tile &left = configured(a), &right = configured(b);
  require(c != a && c != b && a != b, "a product of a tile with itself");
  require(configured(c).rows == left.rows, "rows of a product that are not its left side's");
  require(tiles[c].bytes == right.bytes, "columns of a product that are not its right side's");
  require(left.bytes == 4 * right.rows, "sides of a product that do not fit");
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // FTZ and DAZ
  multiply(tiles[c], left, right);
  _mm_setcsr(before);
  products++;
}

inline long permit(long number, int code, int feature) {
  return number == SYS_arch_prctl && code == 0x1023 && feature == 18 ? 0 : -1;
}

#ifndef __AVX512BF16__

// The nearest bf16, to even; what is below the normal numbers is 0.
inline __m256i nearest(__m512 x) {
  const __m512i bits = (__m512i)x;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i y = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i cut = _mm512_srli_epi32(bits, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  y = _mm512_mask_or_epi32(y, nan, cut, _mm512_set1_epi32(0x40));
  y = _mm512_mask_and_epi32(y, _mm512_fpclass_ps_mask(x, 0x20), cut, _mm512_set1_epi32(0x8000));
  return _mm512_cvtepi32_epi16(y);
}

inline __m512i nearest_two(__m512 high, __m512 low) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(nearest(low)), nearest(high), 1);
}

inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(first(a), first(b), _mm512_fmadd_ps(second(a), second(b), sum));
}

#define _mm512_cvtneps_pbh(x) emulation::nearest(x)
#define _mm512_cvtne2ps_pbh(high, low) emulation::nearest_two(high, low)
#define _mm512_dpbf16_ps(sum, a, b) emulation::add_products(sum, (__m512i)(a), (__m512i)(b))

#endif

}  // namespace emulation

// How many products of tiles were computed by calls that have returned.
extern "C" int64_t amx_products() { return emulation::all_products; }

#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulation::configure(config)
#define _tile_release() emulation::release()
#define _tile_loadd(tile, base, stride) emulation::load(tile, base, stride)
#define _tile_stream_loadd(tile, base, stride) emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulation::save(tile, base, stride)
#define _tile_zero(tile) emulation::zero(tile)
#define _tile_dpbf16ps(c, a, b) emulation::multiply(c, a, b)
#define syscall(number, code, feature) emulation::permit(number, code, feature)
